"""Keys of version 0.1 that have another name now: refused in recipes, understood in studies begun with them."""

RENAMED = {"tokens_per_pass": "micro_batch_tokens", "early": "intermediate_checkpoints"}
