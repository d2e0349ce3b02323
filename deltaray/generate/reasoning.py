"""The reasoning of thinking models told from their answers, by vLLM's own parsers. Needs vllm."""

import re
from collections.abc import Sequence
from typing import Any

from deltaray.failures import reason_of
from deltaray.generate.requests import Output

PROMPT_END = 32  # tokens at a prompt's end among which a closed reasoning block would be


class Splitter:
    """One of vLLM's reasoning parsers, made even: what the parsers leave open about markers and white space is fixed.

    The text is wanted with special tokens (`skip_special_tokens=False`), for some models' markers are such.
    """

    def __init__(self, name: str, tokenizer: Any) -> None:
        """ValueError for a parser that vLLM does not know, or that cannot split this tokenizer's answers."""
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.reasoning import ReasoningParserManager

        known = ReasoningParserManager.list_registered()
        if name not in known:
            raise ValueError(f"reasoning: vLLM has no parser {name!r}; it has {', '.join(known)}")
        # The prompt says whether a model thinks (see `split`), so every parser is told that it does.
        thinking = {"enable_thinking": True, "thinking": True}
        self.tokenizer = tokenizer
        self.request = ChatCompletionRequest(messages=[], model="")
        try:
            parser = ReasoningParserManager.get_reasoning_parser(name)
            self.parser: Any = parser(tokenizer, chat_template_kwargs=thinking)
            _, _ = self.parser.extract_reasoning("", self.request)  # some only work inside vLLM's server
        except Exception as error:
            message = f"reasoning: vLLM's parser {name!r} cannot split the answers of this model: {error!r}"
            raise ValueError(message) from error
        self.start, self.end = self.parser.reasoning_start_str, self.parser.reasoning_end_str
        self.special = re.compile("|".join(map(re.escape, tokenizer.all_special_tokens)) or r"(?!)")

    def divide(self, output: Output, prompt: Sequence[int]) -> Output:
        """The output with its reasoning kept apart; an error of its own row where vLLM's parser breaks on it."""
        try:
            text, reasoning = self.split(output["text"], prompt)
        except BaseException as error:
            return output | {"finish_reason": "error", "error": f"reasoning parser: {reason_of(error)}"}
        return output | {"text": text, "reasoning": reasoning}

    def split(self, text: str, prompt: Sequence[int]) -> tuple[str, str | None]:
        """The answer and its reasoning (None where there is none), both without special tokens.

        An answer that was cut while it reasoned is empty. White space at the seam belongs to the template and goes.
        """
        if self.closed(prompt):
            return self.special.sub("", text), None
        reasoning, answer = self.parser.extract_reasoning(text, self.request)
        reasoning = self.special.sub("", (reasoning or "").removeprefix(self.start or "")).strip()
        answer = self.special.sub("", answer or "")
        return (answer.lstrip(), reasoning) if reasoning else (answer, None)

    def closed(self, prompt: Sequence[int]) -> bool:
        """Whether the prompt ends in a finished reasoning block, as templates write it when thinking is off."""
        tail: str = self.tokenizer.decode(list(prompt[-PROMPT_END:]))
        return bool(self.end) and tail.rstrip().endswith(self.end)
