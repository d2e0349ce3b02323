"""What vLLM is asked and what it answers: seeds, sampling parameters, outputs. Needs vllm only where it makes them."""

import functools
import hashlib
import json
from collections.abc import Sequence
from typing import Any

from deltaray.text.screen import one_line

Output = dict[str, Any]
"""One answer: token_ids (the end token included), tokens, text (without special tokens and without the reasoning),
reasoning (or None), finish_reason (stop | length | error), error (what went wrong, or None); prompt_logprobs where
the sampling settings ask for them."""


LONGEST_ERROR = 1000
"""Characters of a row's error that are kept."""


def request_seed(base: int, prompt_id: str, sample: int) -> int:
    """The seed of one answer: the same in every run, process and place, different for every answer."""
    key = json.dumps([base, prompt_id, sample]).encode()
    digest = hashlib.blake2b(key, digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # vLLM wants a signed 64 bit number


def sampling_parameters(
    settings: str, prompt_ids: Sequence[str], samples: Sequence[int], keep_special: bool = False
) -> list[Any]:
    """vLLM's SamplingParams of every (prompt, sample index), samples innermost.

    `settings` is JSON in vLLM's own words. `seed` (default 0) is the base of every answer's own seed; null leaves
    sampling unseeded: a little faster on GPUs, not repeatable. Greedy decoding needs and gets none. `keep_special`
    leaves special tokens in the texts.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    fields = json.loads(settings)
    base = fields.pop("seed", 0)
    if "n" in fields:
        raise ValueError("n is the unit's `samples`")
    fields |= {"output_kind": RequestOutputKind.FINAL_ONLY} | ({"skip_special_tokens": False} if keep_special else {})
    make = functools.partial(SamplingParams, **fields)
    seeded = base is not None and fields.get("temperature", 1.0) > 0
    return [
        make(seed=request_seed(base, prompt_id, sample) if seeded else None)
        for prompt_id in prompt_ids
        for sample in samples
    ]


def output_of(completion: Any) -> Output:
    """Ours from vLLM's `CompletionOutput`; a reason that is neither stop nor length is an error."""
    reason, error = completion.finish_reason, None
    if reason not in ("stop", "length"):
        reason, error = "error", f"vLLM ended the request: {reason}"
    return _output(list(completion.token_ids), completion.text, reason, error)


def prompt_logprobs(result: Any) -> dict[str, Any]:
    """`prompt_logprobs` of a `RequestOutput` that has them: (log-prob, rank) of every prompt token but the first."""
    if result.prompt_logprobs is None:
        return {}
    tokens = zip(result.prompt_token_ids[1:], result.prompt_logprobs[1:], strict=True)
    return {"prompt_logprobs": [(found[token].logprob, found[token].rank) for token, found in tokens]}


def failed(message: str) -> Output:
    """The answer of a prompt that could not be answered; the reason is kept as one printable line."""
    return _output([], "", "error", one_line(message[: 4 * LONGEST_ERROR])[:LONGEST_ERROR])


def sound(output: Output) -> Output:
    """The output with texts that a table can hold: half characters become U+FFFD. Pure."""
    texts = {name: readable(output[name]) for name in ("text", "reasoning", "error") if isinstance(output[name], str)}
    return output | texts


def readable(text: str) -> str:
    """The text with U+FFFD for half characters, which JSON may hold and Arrow may not. Pure."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _output(ids: list[int], text: str, reason: str, error: str | None) -> Output:
    fields = {"text": text, "reasoning": None, "finish_reason": reason, "error": error}
    return {"token_ids": ids, "tokens": len(ids), **fields}
