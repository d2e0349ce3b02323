"""A seeded fuzzer of everything that comes in from outside: recipes and `--set`, files of prompts and preferences,
folders of models, and tampered `out` folders.

Each door has a module with `prepare(folder) -> check`; `check(random)` makes one hostile input, gives it to the door
and returns how that ended. An input is made from its door, the run's seed and its number alone, so that any can be made
again:

    python -m tests.fuzz --door recipes --seed 1 --only 4711

`tests/test_fuzz.py` runs some inputs of every door; `python -m tests.fuzz --inputs 100000` many, each door in a process
of its own, and writes `tests/benchmarks/results/fuzz.json`.
"""
