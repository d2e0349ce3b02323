"""How large what comes in from outside may be. What is larger is refused at once, by name, before it costs memory or
time; the README lists these numbers. Nothing that people write comes near them.
"""

# --- recipes, and every other YAML file that is read ------------------------------------------------------------
RECIPE_BYTES = 1 << 20
"""Of a file, and of one `--set`."""
RECIPE_VALUES = 10_000
"""Keys and values, with aliases written out."""
RECIPE_DEPTH = 32
"""Sections inside sections."""
WHOLE_NUMBER = 2**63 - 1
"""The largest whole number, and its negative the smallest: what 64 bits hold."""
NAME_CHARACTERS = 100
"""Of a name that becomes a folder's."""
PATH_BYTES, PART_BYTES = 4000, 240
"""Of a path, and of one name in it: file systems allow 4,096 and 255."""

# --- what a recipe is written out to ----------------------------------------------------------------------------
SEEDS = 1_000
STUDY_ITEMS = 10_000
"""Models, pairings, students to train, merges and evaluated models of a study, over all seeds and grids."""
TRIALS = 5_000
"""Of one exploration."""

# --- data -------------------------------------------------------------------------------------------------------
ROW_BYTES = 1 << 26
"""Of one row of JSON Lines, and of one field of CSV."""
JSON_FILE_BYTES = 1 << 30
"""Of a JSON file that is one list, which is read whole, and of what it unpacks to."""
TEMPLATE_BYTES = 1 << 20
"""Of a chat template in a file."""

# --- folders of models, and of studies --------------------------------------------------------------------------
CONFIG_BYTES = 1 << 24
"""Of a JSON file of settings in a model's folder (not `tokenizer.json`), and of one in `out`."""
TOKENIZER_BYTES = 1 << 29
MODEL_LAYERS = 10_000
"""Layers, experts and the like that a model's configuration may count."""
