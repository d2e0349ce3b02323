"""How other people's servers say that an answer has ended: one table for all of them. Pure."""

from typing import Any

_WORDS = {
    "stop": """stop eos eos_token eos_found end end_turn end_of_turn end_of_text endoftext stop_sequence stop_token
        stop_string stop_sequence_reached stopped stopped_eos stopped_word complete completed finish finished done
        normal success""",
    "length": """length max_tokens max_length max_len max_output_tokens max_completion_tokens max_new_tokens
        model_length token_limit maximum_tokens stopped_limit model_context_window_exceeded context_length
        context_length_exceeded length_limit""",
    "refused": """content_filter content_filtered safety recitation refusal refused blocked blocklist
        prohibited_content spii sensitive language image_safety guardrail_intervened guardrails error_toxic
        moderation flagged""",
    "tool": """tool_calls tool_call tool_use function_call pause_turn malformed_function_call unexpected_tool_call
        malformed_tool_use too_many_tool_calls""",
    "error": """error abort aborted cancelled canceled cancel user_cancel timeout time_limit error_limit not_finished
        other finish_reason_unspecified unspecified network_error insufficient_system_resource
        malformed_model_output malformed_response failed failure repetition incomplete unknown""",
}
FINISH = {word: kind for kind, words in _WORDS.items() for word in words.split()}
"""What a server's word means, by the word in lower case with underscores: the answer came to its end (`stop`), reached
its limit (`length`), was held back (`refused`), calls a tool that nobody here answers (`tool`) or broke off (`error`).
OpenAI, Anthropic, Gemini, Cohere, Mistral, Bedrock, watsonx, Together, TGI, vLLM, SGLang, llama.cpp and others."""
PREFIXES = ("finish_reason_", "reason_", "stop_reason_")


def finish_of(word: Any, tokens: int, most: int | None) -> tuple[str, str | None]:
    """(`stop` or `length`, None), or (`error`, why the row failed).

    A server that gives no word is believed by the number of tokens that it has counted, if it has.

    Args:
        tokens: of the answer, as the server counts them; 0: it does not.
        most: asked for at most.
    """
    if word is None or word == "":
        if not tokens or most is None:
            return "error", "the server does not say how the answer ended (no finish_reason)"
        return ("length" if tokens >= most else "stop"), None
    kind = FINISH.get(_plain(str(word)))
    if kind in ("stop", "length"):
        return kind, None
    if kind is None:
        return "error", f"the server ended the answer with a finish_reason that is unknown: {str(word)!r}"
    return "error", f"the server ended the answer: {word}"


def _plain(word: str) -> str:
    plain = word.strip().casefold().replace("-", "_").replace(" ", "_")
    for prefix in PREFIXES:
        if plain not in FINISH:
            plain = plain.removeprefix(prefix)
    return plain
