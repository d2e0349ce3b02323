"""The data contracts: what every stored table looks like. Imports nothing of ours.

Everything expensive is computed once per *response* and keyed by (prompt_id, teacher, sample): its text
(`RESPONSES`), its score (`SCORES`), its reference log-probability (`REFERENCES`). A pairing (`PAIRS`) is then only
a join of two responses to one prompt. Tables are Parquet; a teacher, scorer, student or pairing is a folder
(`teacher=<name>`), and those names are not repeated in the rows: readers of the level above make columns of them. All
types are such that pandas, pyarrow, `datasets` and Ray Data read them (`datasets` knows no maps).
"""

import pyarrow as pa

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
"""A conversation: turns in order, roles `system`, `user`, `assistant`, `tool`."""

NUMBERS = pa.list_(pa.struct([("key", pa.string()), ("value", pa.float64())]))
"""Numbers by name, each name once (`store.numbers_of`, `store.number_of`)."""

CONVERSATION = pa.field("conversation", pa.string())
"""Null for ordinary prompts. Where turns call tools or report back, or the prompt brings tools: JSON of
`{"messages": [every turn with all its fields], "tools": [function schemas] or null}`, which is what chat templates are
given; a list of {role, content} cannot hold it."""

PROMPTS = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("messages", MESSAGES, nullable=False),  # all turns before the answer
        pa.field("answer", pa.string()),  # what a verifier compares with, if known
        pa.field("source", pa.string()),  # where the prompt comes from
        pa.field("error", pa.string()),  # why it cannot be asked (text that is not Unicode), else null
        CONVERSATION,
    ]
)

EXTENSIONS = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),  # of the prompt that was to be extended
        pa.field("sample", pa.int32(), nullable=False),  # always 0
        pa.field("messages", MESSAGES, nullable=False),  # the extended prompt; empty if it failed or a turn was cut
        pa.field("tokens", pa.int32()),  # of `messages`, in the student's tokens
        pa.field("dropped", pa.string()),  # `kind: words`: why it is not used though it was written, else null
        pa.field("error", pa.string()),  # why it could not be written, else null
    ]
)

RESPONSES = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("sample", pa.int32(), nullable=False),  # 0 … samples-1
        pa.field("text", pa.string(), nullable=False),  # the answer, without special tokens and reasoning
        pa.field("reasoning", pa.string()),  # what a thinking model thought before it, where told apart
        pa.field("prompt_token_ids", pa.list_(pa.int32()), nullable=False),  # as the engine received them
        pa.field("token_ids", pa.list_(pa.int32()), nullable=False),  # as the engine produced them
        pa.field("tokens", pa.int32(), nullable=False),  # len(token_ids), in the teacher's tokens
        pa.field("finish_reason", pa.string(), nullable=False),  # stop | length | error
        pa.field("error", pa.string()),  # why the row counts as failed (not asked, refused, empty, …), else null
    ]
)

SCORES = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("sample", pa.int32(), nullable=False),
        pa.field("score", pa.float64()),  # on the scorer's own scale; null = could not be scored
        pa.field("note", pa.string()),  # `kind: words`: why it could not, or what the score rests on
        pa.field("parts", NUMBERS),  # what the score is made from, by name
    ]
)

TOKENS = pa.schema(
    [
        pa.field("prompt_token_ids", pa.list_(pa.int32())),  # of a response, in a student's tokens; empty if it failed
        pa.field("token_ids", pa.list_(pa.int32())),  # end token included
        pa.field("refusal", pa.string()),  # why the student's template has no place for it, else null
    ]
)

REFERENCES = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("sample", pa.int32(), nullable=False),
        pa.field("logp", pa.float64(), nullable=False),  # sum over response tokens, nats
        pa.field("tokens", pa.int32(), nullable=False),  # response tokens summed over, end token included
    ]
)

PAIRS = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("prompt", MESSAGES, nullable=False),
        pa.field("chosen", MESSAGES, nullable=False),  # the one final assistant turn
        pa.field("rejected", MESSAGES, nullable=False),
        pa.field("chosen_model", pa.string(), nullable=False),
        pa.field("rejected_model", pa.string(), nullable=False),
        pa.field("chosen_score", pa.float64()),
        pa.field("rejected_score", pa.float64()),
        pa.field("delta", pa.float64()),
        pa.field("chosen_tokens", pa.int32(), nullable=False),  # in the student's tokens, end token included
        pa.field("rejected_tokens", pa.int32(), nullable=False),
        pa.field("source", pa.string()),
        pa.field("answer", pa.string()),
        pa.field("chosen_sample", pa.int32(), nullable=False),  # with the model: the key of its response
        pa.field("rejected_sample", pa.int32(), nullable=False),
        pa.field("chosen_reasoning", pa.string()),  # thoughts that are kept apart from `chosen`
        pa.field("rejected_reasoning", pa.string()),
        pa.field("prompt_token_ids", pa.list_(pa.int32()), nullable=False),  # the student's, before any cut
        pa.field("chosen_token_ids", pa.list_(pa.int32()), nullable=False),  # chosen_tokens of them
        pa.field("rejected_token_ids", pa.list_(pa.int32()), nullable=False),
        CONVERSATION,  # the prompt's
    ]
)

REQUESTS = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),  # a digest of all the rest
        pa.field("token_ids", pa.list_(pa.int32()), nullable=False),  # context, and what is scored behind it
        pa.field("scored", pa.int32(), nullable=False),  # the last so many tokens get log-probs; 0: go on writing
        pa.field("sampling", pa.string(), nullable=False),  # JSON in vLLM's words
        pa.field("truncated", pa.bool_(), nullable=False),  # the context has lost its beginning
    ]
)
"""What a task of lm-evaluation-harness asks one model."""

REPLIES = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("sample", pa.int32(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("logprob", pa.float64()),  # of the scored tokens, nats; null where the model wrote
        pa.field("greedy", pa.bool_()),  # whether each of them is the most probable one
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("error", pa.string()),
    ]
)
"""What it replied."""

SAMPLES = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),  # `<task>#<doc_id>`, the same for every model
        pa.field("task", pa.string(), nullable=False),  # of a group, the one that the document belongs to
        pa.field("doc_id", pa.int64(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("continuations", pa.list_(pa.string()), nullable=False),  # what was scored; empty for written answers
        pa.field("logprobs", pa.list_(pa.float64()), nullable=False),  # of each of them
        pa.field("answers", pa.list_(pa.string()), nullable=False),  # what was written
        pa.field("filtered", pa.string()),  # JSON of what the headline metric's filter made of it
        pa.field("target", pa.string(), nullable=False),
        pa.field("metrics", NUMBERS, nullable=False),  # by `metric,filter`
        pa.field("value", pa.float64(), nullable=False),  # the headline metric's
    ]
)
"""The sample log of one (model, harness task)."""

METRICS = (
    "step", "epoch", "loss", "learning_rate", "logps_chosen", "logps_rejected", "rewards_chosen",
    "rewards_rejected", "rewards_margin", "rewards_accuracy", "grad_norm", "tokens", "tokens_per_second",
)  # fmt: skip
"""Keys of every line of `training/<name>/metrics.jsonl`; log-probs are means over response tokens."""

MORE_METRICS = (
    "samples", "heldout_loss", "heldout_accuracy", "heldout_margin", "generated_tokens", "generated_score",
    "routing_drift",
)  # fmt: skip
"""Keys that some lines have, besides `signatures`: names of the failure signatures first seen at that step.

`routing_drift`, of mixtures of experts: the share of (token, layer) of some held-out tokens that go to other experts
than when the run started."""
