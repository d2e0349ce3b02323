"""A model as lm-evaluation-harness sees it, whose answers come from our pools.

The harness builds all requests of a task before it asks for the first answer. So a task is gone through twice: once to
note what it asks, and once, when the pools have answered, to hand the answers out and let the harness score them. In
between a request is a row like any prompt: engines are shared by models of one architecture, adapters are served on
their base, replicas grow with the cluster, and what is answered is committed. The harness's own vLLM class would start
an engine per model in one process, which answers nothing twice only if it is never killed.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from deltaray.data.tokens import turn_end
from deltaray.errors import UserError

Request = dict[str, Any]
"""A row of `contracts.REQUESTS`."""
Reply = dict[str, Any]
"""A row of `contracts.REPLIES`."""

NEW_TOKENS = 256
"""Where a task does not say; the harness's default."""
SCORING = {"temperature": 0.0, "max_tokens": 1, "prompt_logprobs": 0, "detokenize": False}


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """Notes requests while it has no replies; afterwards it hands them out."""

    backend = "causal"

    def __init__(
        self,
        tokenizer: Any,
        max_length: int,
        seed: int = 0,
        replies: Mapping[tuple[str, int], Reply] | None = None,
    ) -> None:
        """`replies` are those to the requests that were noted, by prompt id and sample."""
        super().__init__()
        self.tokenizer, self.max_length, self.seed, self.replies = tokenizer, max_length, seed, replies
        self.requests: dict[str, Request] = {}
        self.samples = 1
        self.eos = tokenizer.decode([self.eot_token_id]) or tokenizer.eos_token

    # --- text to tokens ---------------------------------------------------------------------------------------
    @property
    def eot_token_id(self) -> int:
        eos = self.tokenizer.eos_token_id
        return turn_end(self.tokenizer) if eos is None else int(eos)

    @property
    def prefix_token_id(self) -> int:
        """What a text without context stands behind."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids as the tokenizer makes them; a text that a chat template has begun with BOS gets no second one."""
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **options))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
                **self.tokenizer.template_arguments,
            )
        )

    # --- the harness's questions ------------------------------------------------------------------------------
    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        seen: Counter[int] = Counter()
        found = []
        for request in requests:
            context, settings = request.args
            sampling, until = self._sampling(settings)
            room = self.max_length - sampling["max_tokens"]
            reply = self._reply(self.tok_encode(context), 0, sampling, room, seen[id(request)])
            found.append(postprocess_generated_text(reply["text"], until, None))
            seen[id(request)] += 1
        self.samples = max([self.samples, *seen.values()])
        return found

    def _sampling(self, settings: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """vLLM's words for the harness's settings, and where the answer ends."""
        asked = dict(normalize_gen_kwargs(settings, NEW_TOKENS))
        until = handle_stop_sequences(asked.pop("until"), eos=self.eos)
        asked["max_tokens"] = asked.pop("max_gen_toks")
        if asked["max_tokens"] >= self.max_length:
            raise UserError(
                f"asks for {asked['max_tokens']} new tokens, and the model has room for {self.max_length} in all; "
                f"write `generation: {{max_gen_toks: N}}` with a smaller number"
            )
        asked.pop("do_sample", None)
        shown = {"skip_special_tokens": False, "spaces_between_special_tokens": False}
        return {**shown, **asked, "stop": until, "seed": self.seed}, until

    def _loglikelihood_tokens(
        self, requests: Iterable[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        found = []
        for _, context, continuation in requests:
            ids = [*context, *continuation]
            reply = self._reply(ids, len(continuation), SCORING, self.max_length - 1, 0)
            found.append((reply["logprob"], reply["greedy"]))
        return found

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return list(super().loglikelihood(requests, disable_tqdm=disable_tqdm))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Each text whole, in windows that predict every token once with as much context as there is room for."""
        found = []
        for request in requests:
            ids = self.tok_encode(request.args[0])
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length - 2, 1)
            parts = self._loglikelihood_tokens((None, *make_disjoint_window(window)) for window in windows)
            found.append(sum(logprob for logprob, _ in parts))
        return found

    # --- noting and handing out -------------------------------------------------------------------------------
    def _reply(self, ids: list[int], scored: int, sampling: dict[str, Any], room: int, sample: int) -> Reply:
        """The reply to a request; while they are noted, one that says nothing.

        Args:
            room: the last so many ids are asked.
        Raises:
            KeyError: the task asks something else than when its requests were noted.
        """
        asked = {
            "token_ids": ids[-room:],
            "scored": min(scored, room - 1),
            "sampling": json.dumps(sampling, sort_keys=True),
            "truncated": len(ids) > room,
        }
        name = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]
        if self.replies is not None:
            return self.replies[name, sample]
        self.requests[name] = {"prompt_id": name, **asked}
        return {"text": "", "logprob": 0.0, "greedy": False}
