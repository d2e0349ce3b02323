"""Whether transformers has built what `tokenizer.json` says.

Some of its classes (Llama's, Gemma's, Qwen2's, T5's, …) take only vocabulary and merges from the file and write the
normalizer, pre-tokenizer and decoder themselves. Where a `tokenizer_config.json` names the wrong one, texts lose their
spaces or are cut into other tokens than the model was trained on, without a word.
"""

from collections.abc import Iterator
from typing import Any

from deltaray.text.words import short

TEXTS = (
    "The quick brown fox doesn't jump over 12 lazy dogs, does it? It's $3.50 (or 1,234,567.89)!",
    "  two spaces first, and two at the end  ",
    "one\ntwo\n\nthree\n\n\n\tfour\r\n    five  six   seven\t\teight \n",
    "\n",
    " ",
    "for i in range(3):\n    if x[i] >= 0 and y != None:\n\t\tprint(f'{i:>4}', end=\"\")  # 2**10\n",
    '{"key": [1, 2.5e-3, null], "url": "https://example.org/a_b-c?d=e&f=%20"}',
    "# Title\n\n* **bold** _it_ `code`\n\n| a | b |\n|---|---|\n\n```python\npass\n```\n$\\frac{1}{2}$",
    "Übermäßig schöne Äpfel, naïve café, señor, œuvre; e\u0301 and \u00e9, \ufb01 \u00bd \u2167",
    "Привет, мир! Γειά σου Κόσμε. שלום עולם. مرحبا بالعالم. नमस्ते दुनिया। สวัสดีชาวโลก",
    "你好，世界。今天是2024年5月17日。こんにちは世界、カタカナ。안녕하세요 세계",
    "😀 👩‍👩‍👧‍👦 🇩🇪 👍🏽 ✅ → ≠ ∑ “quoted” – dash — … \u00a0 \u200b end",
    "camelCase snake_case SCREAMING_CASE kebab-case x1y2z3 0x1F 007 3.14159 10000000000",
    "aaaaaaaaaaaaaaaaaaaaaaaa !!!!!!!! ........ ======== --------",
    "<b>tags</b> & <think>thoughts</think> <tool_call>{}</tool_call> [INST] [/INST] @name #tag",
)
VOCABULARY_SAMPLES, PER_TEXT, ADDED_SAMPLES = 1200, 60, 300


def difference(tokenizer: Any, file: Any, named: frozenset[str], prefixed: bool) -> str | None:
    """How a tokenizer of transformers differs from its `tokenizer.json`; None where it does not.

    Args:
        tokenizer: a fast tokenizer.
        file: the `tokenizers.Tokenizer` of the file alone.
        named: tokens that the other files of the folder name, which may come on top of the file's.
        prefixed: whether `tokenizer_config.json` decides about a space before each text, whatever the file says.
    """
    file.no_truncation()
    file.no_padding()
    theirs, ours = file.get_vocab(), tokenizer.get_vocab()
    for token, number in theirs.items():
        if ours.get(token) != number:
            return f"token {number} is {token!r} in the file, not there"
    if more := sorted(ours.keys() - theirs.keys() - named):
        return f"it has a token {more[0]!r} that no file names"
    texts = [*TEXTS, *_vocabulary_texts(file)]
    for text, encoding in zip(texts, file.encode_batch(texts, add_special_tokens=False), strict=True):
        ids, found = encoding.ids, _ids(tokenizer, text)
        if found != ids and not (prefixed and _prefix_apart(tokenizer, file, text, found, ids)):
            place = next((at for at, pair in enumerate(zip(found, ids, strict=False)) if pair[0] != pair[1]), 0)
            return f"{short(text)!r} becomes other tokens, from the {place + 1}. on"
        said, read = file.decode(ids, skip_special_tokens=False), _text(tokenizer, ids)
        if said != read and not (prefixed and said.strip(" ") == read.strip(" ")):
            return f"{short(said)!r} is read as {short(read)!r}"
    return _of_added(tokenizer, file)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _text(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _prefix_apart(tokenizer: Any, file: Any, text: str, found: list[int], ids: list[int]) -> bool:
    """Whether only a space before the text tells the two apart."""
    return found == file.encode(f" {text}", add_special_tokens=False).ids or ids == _ids(tokenizer, f" {text}")


def _vocabulary_texts(file: Any) -> Iterator[str]:
    """Texts that hold tokens from all over the vocabulary: they show merges that are missing or in another order."""
    size = file.get_vocab_size(with_added_tokens=False)
    numbers = list(range(0, size, max(1, size // VOCABULARY_SAMPLES)))
    for start in range(0, len(numbers), PER_TEXT):
        yield " ".join(file.decode([number]) for number in numbers[start : start + PER_TEXT])


def _of_added(tokenizer: Any, file: Any) -> str | None:
    """Added tokens must be found in a text, or not be, as the file says. What stands beside them may differ: the
    configuration can say that they take the spaces around them along."""
    added = sorted(file.get_added_tokens_decoder().items())
    for number, token in added[:: max(1, len(added) // ADDED_SAMPLES)]:
        text = f"a{token.content}b"
        if (number in file.encode(text, add_special_tokens=False).ids) != (number in _ids(tokenizer, text)):
            return f"{token.content!r} is one token in one of the two only"
    return None


def loses_text(tokenizer: Any) -> bool:
    """Whether plain words do not come back from a tokenizer that has no `tokenizer.json` to be compared with.

    Case and spaces at the ends are not asked for: several kinds (BERT's, T5's) change them by design.
    """
    text = "a small house by the sea has two doors and one window"
    return _text(tokenizer, _ids(tokenizer, text)).strip().lower() != text
