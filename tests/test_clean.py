"""What must not be said: keys in any dress, controls on a terminal, formulas in CSV files."""

import base64
import json
import random
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pytest
from rich.table import Table

from deltaray.cli.submit.follow import Follower
from deltaray.data.storage.cells import csv_bytes
from deltaray.failures import reason_of
from deltaray.runtime.terminal import Terminal
from deltaray.text import Cleaner, keep_secret, printable, without_secrets
from deltaray.text import secrets as clean_secrets


def keys(count: int) -> Iterator[str]:
    """Of services' usual alphabets and lengths, seeded."""
    draw = random.Random(17)
    for number in range(count):
        letters = string.ascii_letters + string.digits + ("-_" if number % 2 else "+/=.")
        yield "".join(draw.choice(letters) for _ in range(draw.choice([16, 20, 32, 51, 88])))


def dresses(key: str) -> Iterator[tuple[str, str]]:
    raw = key.encode()
    yield "as it is", key
    yield "quoted", json.dumps({"k": key})
    yield "another case", key.swapcase()
    yield "hexadecimal", raw.hex()
    yield "hexadecimal with colons", raw.hex(":").upper()
    yield "backwards", key[::-1]
    yield "letter by letter", " ".join(key)
    yield "percent", quote(key, safe="")
    yield "percent, all", "".join(f"%{byte:02X}" for byte in raw)
    yield "percent, twice", quote("".join(f"%{byte:02x}" for byte in raw), safe="")
    yield "JSON's escapes", "".join(f"\\u{byte:04x}" for byte in raw)
    yield "JSON in JSON", json.dumps("".join(f"\\u{byte:04X}" for byte in raw))
    yield "HTML's escapes", "".join(f"&#{byte};" for byte in raw)
    yield "half of each", "".join(f"%{byte:02x}" if place % 3 else f"&#x{byte:x};" for place, byte in enumerate(raw))
    for before in ("", "a", "ab", "Authorization: Bearer ", "user:"):
        yield f"Base64 behind {before!r}", base64.b64encode(before.encode() + raw + b"\0q").decode()
        yield f"Base64 of addresses behind {before!r}", base64.urlsafe_b64encode(before.encode() + raw + b"!").decode()
    yield "Base64 in lines", base64.encodebytes(b"q" * 50 + raw).decode()
    yield "Base64, percent", quote(base64.b64encode(raw).decode(), safe="")


def test_a_key_is_found_in_every_dress_and_the_words_around_it_stay() -> None:
    for key in keys(10):
        cleaner = Cleaner([key])
        for name, form in dresses(key):
            cleaned = cleaner.clean(f"no such key: <{form}>, said the server")
            assert not cleaner.holds(cleaned) and "[key]" in cleaned, (name, key, form)
            assert cleaned.startswith("no such key: <") and cleaned.endswith(">, said the server"), (name, key, cleaned)


def test_texts_without_the_key_stay_the_same_object() -> None:
    cleaner = Cleaner(["sk-planted-7f3a9c"])
    for text in ("sk-planted", "100% of it & \\n more &#65; %41", "[key]", "", "7f3a9c sk planted", "\ud83d"):
        assert cleaner.clean(text) is text
    tree = {"a": [{"b": "c"}, None, 1.5], "d": "%25"}
    assert cleaner.clean_all(tree) is tree
    found = cleaner.clean_all({"sk-planted-7f3a9c": ["x", {"y": "is SK-PLANTED-7F3A9C"}], "n": 1})
    assert found == {"[key]": ["x", {"y": "is [key]"}], "n": 1}


def test_short_keys_are_words_of_their_own_and_only_where_that_is_asked_for() -> None:
    assert Cleaner(["unused"]).clean("the key unused is unknown") == "the key unused is unknown"
    in_errors = Cleaner(["unused"], short=True)
    assert in_errors.clean("the key 'unused' is unknown; unusedness is not") == (
        "the key '[key]' is unknown; unusedness is not"
    )
    assert Cleaner(["password9"]).clean("my password9 is not Password 9") == "my [key] is not Password 9"


@pytest.mark.parametrize("text", ["%25" * 300_000, "\\" * 900_000, "&#" * 400_000, "s-k-p" * 200_000, "%73 " * 200_000])
def test_a_text_made_to_be_slow_is_not(text: str) -> None:
    """Looked at in a time that grows with the length alone: these take a second at most, not hours."""
    cleaner = Cleaner(["sk-planted-7f3a9c"])
    assert cleaner.clean(text) is text
    assert not cleaner.holds(cleaner.clean(text[:50_000] + "sk-planted-7f3a9%63"))


# --- messages -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cannot reach https://ann:pa/ss@host:80/x", "cannot reach https://…@host:80/x"),
        ("see http://ann@host/x", "see http://…@host/x"),
        ("http://host:8000/v1/@cf/model", "http://host:8000/v1/@cf/model"),
        ("https://h/v1?api_key=abcd&n=1", "https://h/v1?api_key=…&n=1"),
        ("https://h/v1?a=1&X-Amz-Signature=0af", "https://h/v1?a=1&X-Amz-Signature=…"),
        ("{'password': 'abc d', 'n': 1}", "{'password': …, 'n': 1}"),
        ('input_value={"hf_token": "ab"}', 'input_value={"hf_token": …}'),
        ("  secret: abc", "  secret: …"),
        ("arguments.hf_token: holds a secret", "arguments.hf_token: holds a secret"),
        ("risk-assessment-of-many-teachers", "risk-assessment-of-many-teachers"),
        ("sk-learn-pipelines-and-more", "sk-learn-pipelines-and-more"),
        ("Bearer certificates were issued", "Bearer certificates were issued"),
        ("Bearer abc123defg", "…"),
    ],
)
def test_messages_keep_everything_but_credentials(text: str, shown: str) -> None:
    assert without_secrets(text, frozenset()) == shown


# --- the terminal ---------------------------------------------------------------------------------------------------
HOSTILE = "\x1b]0;owned\x07 \x1b[2J\x9b31m [red]x[/red] [/] :smile: \r\x08 \u202etxt \udc9f \udfff"


def test_what_is_printed_moves_no_cursor_and_is_no_markup(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOUSE_KEY", "planted-in-the-house-31")
    monkeypatch.setattr(clean_secrets, "_named", set())
    keep_secret(["HOUSE_KEY"])
    terminal = Terminal()
    text = f"{HOSTILE} planted-in-the-house-31"
    terminal.say(text)
    terminal.result(text)
    terminal.result_json({"said": text})
    table = Table(title=text)
    table.add_column(text)
    table.add_row(text)
    terminal.out.print(table)
    with terminal.progress("stage", "units") as progress:
        progress.update(text, 1, 1, note=text)
    stdout, stderr = capfd.readouterr()
    for shown in (stdout, stderr):
        assert printable(shown) == shown
        assert "planted" not in shown.replace("\n", "").replace(" ", "")
        assert "[red]x[/red]" in shown and ":smile:" in shown and "\\x1b]0;owned" in shown


def test_a_followed_log_is_cleaned_line_by_line_wherever_it_was_cut(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOUSE_KEY", "planted-in-the-house-31")
    monkeypatch.setattr(clean_secrets, "_named", {"HOUSE_KEY"})
    follower, log = Follower(None, "job", Terminal()), "\x1b[31mone\x1b[0m planted-in-the-house-31\x1b[2J two\nlast"
    for end in range(1, len(log) + 1):
        follower._show(log[end - 1 : end], end - 1)
    follower._show(log, 0)  # the connection had broken: it comes again
    follower._show("\n", len(log))
    assert capfd.readouterr().err == "one …\\x1b[2J two\nlast\n"


def test_the_reason_of_a_row_is_one_printable_line() -> None:
    assert reason_of(ValueError("a\x1b[2Jb\r\nerror: c\x07")) == "ValueError: a\\x1b[2Jb error: c\\x07"


# --- CSV ------------------------------------------------------------------------------------------------------------
def test_no_cell_is_a_formula_and_numbers_stay_numbers() -> None:
    texts = [
        "=1+1",
        "+cmd|' /C calc'!A0",
        "-1+2",
        "@SUM(A1)",
        "\t=1",
        "\r=1",
        " =1",
        "＝1",
        "-0.5 1e-3",
        "+4",
        "a-b",
        None,
    ]
    table = pa.table({"=note": texts, "number": [-1.5, *range(1, len(texts))]})
    lines = csv_bytes(table).decode().split("\n")
    cells = [line.rpartition(",")[0].strip('"') for line in "\n".join(lines).split("\n")]
    assert cells[0] == "'=note" and cells[1] == "'=1+1" and lines[1].endswith(",-1.5")
    assert [cell[:1] for cell in cells[1:9]] == ["'"] * 8
    assert cells[9:12] == ["-0.5 1e-3", "+4", "a-b"]


def test_ray_tunes_own_csv_is_harmless_too() -> None:
    from deltaray.tune.progress import cells

    result: dict[str, Any] = {"note": "=HYPERLINK(1)", "step": -3, "config": {"choice": {"label": "@x"}}}
    assert cells(result) == {"note": "'=HYPERLINK(1)", "step": -3, "config": {"choice": {"label": "'@x"}}}


def test_every_csv_goes_through_this_door() -> None:
    """A writer that is added later must, too."""
    source = Path(__file__).parents[1] / "deltaray"
    found = {str(file.relative_to(source)) for file in source.rglob("*.py") if "write_csv(" in file.read_text()}
    found |= {str(file.relative_to(source)) for file in source.rglob("*.py") if "csv.writer(" in file.read_text()}
    assert found == {"data/storage/cells.py"}
