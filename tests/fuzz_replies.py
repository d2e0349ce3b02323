"""Replies of servers, made wrong at random: whatever comes, it is one row that fails, or an answer that can be stored.

    PYTHONPATH=. python tests/fuzz_replies.py --count 100000 --seed 1

A seed gives the same replies again. Everything goes the way of a study's replies but for the wire.
"""

import argparse
import asyncio
import base64
import copy
import io
import json
import random
import resource
import time
from collections import Counter
from functools import partial
from typing import Any
from unittest.mock import patch
from urllib.parse import quote

import httpx2
import pyarrow.parquet as pq
from completions_server import unit

from deltaray.errors import StageError
from deltaray.generate.endpoint import Endpoint, EndpointSpec
from deltaray.generate.search.retrievers import passages_in
from deltaray.generate.stage import responses_table
from deltaray.generate.stream import sound
from deltaray.runtime.server import parsed
from deltaray.text import Cleaner, printable

KEY = "plum-7Qz4/Ty81+vWc02mRx"
SLOW = 5.0
GOOD = {
    "id": "c1",
    "model": "m",
    "choices": [
        {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": "four", "reasoning_content": "two and two", "tool_calls": None},
            "logprobs": {"content": [{"token": "four", "logprob": -0.5, "top_logprobs": []}]},
        }
    ],
    "usage": {"prompt_tokens": 3, "completion_tokens": 7},
}
FOUND = {"result": [[{"document": {"contents": "a passage"}, "score": 1.0}], [{"contents": "another"}]]}
RAW = ["1e999", "-1e999", "NaN", "Infinity", "9" * 5000, "1" + "0" * 300, "-0", "tru", "", '"\\ud800"', '"\\u0000"']
"""Tokens that no serializer writes."""
HOLE = "@@hole@@"


def dressed(draw: random.Random) -> str:
    """The key as a server may write it."""
    raw = KEY.encode()
    return draw.choice(
        [
            KEY, KEY.upper(), KEY[::-1], quote(KEY, safe=""), "".join(f"%{byte:02x}" for byte in raw), raw.hex(),
            base64.b64encode(b"Bearer " + raw).decode(), base64.urlsafe_b64encode(b"x" + raw + b"y").decode(),
            base64.encodebytes(b"z" * 50 + raw).decode(), "".join(f"\\u{byte:04x}" for byte in raw),
            "".join(f"&#{byte};" for byte in raw), json.dumps(json.dumps({"Authorization": f"Bearer {KEY}"})),
        ]
    )  # fmt: skip


def odd(draw: random.Random) -> Any:
    """A value that nobody expects."""
    values: list[Any] = [
        None, True, False, 0, -1, 7.5, 2**31, 2**63, 10**40, -(2**70), "", "0", "7", "stop", "error", "\x1b[2J\r\n\0",
        "\ud83d", "\udcff half", "x" * 3000, [], {}, [[]], [None], [{}], ["text"], {"type": "text"}, [{"type": "text"}],
        {"error": {"code": draw.choice([400, 401, 403, 404, 429, 500, "503", -1, {}]), "message": dressed(draw)}},
        [{"id": 1, "function": {"name": None, "arguments": [1]}}], {"a": {"a": {"a": [dressed(draw)]}}},
        HOLE, dressed(draw), f"Incorrect API key provided: {dressed(draw)}.", copy.deepcopy(GOOD), GOOD["choices"] * 3,
    ]  # fmt: skip
    return copy.deepcopy(draw.choice(values))


def places(node: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything inside."""
    inside = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [place for key, value in inside for place in ((node, key), *places(value))]


def mutated(draw: random.Random, start: Any) -> bytes:
    """A reply with one to four mistakes."""
    reply: Any = copy.deepcopy(start)
    for _ in range(draw.randint(1, 4)):
        if not (found := places(reply)) or draw.random() < 0.03:
            reply = odd(draw)
            continue
        holder, key = draw.choice(found)
        if draw.random() < 0.2:
            del holder[key]
        elif draw.random() < 0.15 and isinstance(holder, dict):
            holder[draw.choice(["error", "tool_calls", "refusal", "usage", "choices", dressed(draw)])] = odd(draw)
        else:
            holder[key] = odd(draw)
    text = json.dumps(reply, ensure_ascii=draw.random() < 0.7)
    text = text.replace(f'"{HOLE}"', draw.choice([*RAW, "[" * 3000 + "]" * 3000, '{"a":' * 200 + "1" + "}" * 200]))
    raw = text.encode("utf-8", "surrogatepass")
    if draw.random() < 0.1:
        at = draw.randrange(len(raw) + 1)
        raw = draw.choice(
            [raw[:at], raw[:at] + bytes([draw.randrange(256)]) + raw[at:], raw + raw, b"\xef\xbb\xbf" + raw]
        )
    return raw


def response(draw: random.Random) -> httpx2.Response:
    """Mostly an answer, sometimes a refusal, with headers to match."""
    status = 200 if draw.random() < 0.85 else draw.choice([204, 301, 307, 400, 401, 403, 404, 422, 429, 500, 503])
    headers = {
        "content-type": draw.choice(["application/json"] * 9 + ["text/html", "application/json; charset=latin-1"])
    }
    if draw.random() < 0.05:
        waits = ["-1", "nan", "1e999", "soon", "Mon, 99 Foo 99999 99:99:99 GMT", dressed(draw).replace("\n", "")]
        headers |= {"retry-after": draw.choice(waits), "location": f"http://other/{quote(KEY)}"}
    if draw.random() < 0.02:
        headers["content-encoding"] = draw.choice(["gzip", "br", "x"])
    return httpx2.Response(status, headers=headers, stream=httpx2.ByteStream(mutated(draw, GOOD)))


def answer(reply: httpx2.Response) -> str:
    """What becomes of a reply: "answer", "failed", or "refused", for all rows; AssertionError if it is wrong."""
    spec = EndpointSpec(model="the-model", url="http://host/v1", retries=0)
    wire = partial(httpx2.AsyncClient, transport=httpx2.MockTransport(lambda _: reply))
    with patch("httpx2.AsyncClient", wire):
        engine = Endpoint(spec, KEY)
    asked = unit(0, 1, reasoning="qwen3")
    try:
        [[output]] = asyncio.run(engine.generate(asked))
    except StageError as error:
        assert "gives no answers" in str(error) and clean(str(error)), error
        return "refused"
    output = sound(output)
    table = responses_table(asked | {"outputs": [[output]]})
    pq.write_table(table, io.BytesIO())
    [row] = table.to_pylist()
    assert (row["error"] is None) or row["text"] == "" or row["error"].startswith("empty"), row
    assert 0 <= row["tokens"] < 2**31 and row["finish_reason"] in ("stop", "length", "error"), row
    assert clean(json.dumps(row, ensure_ascii=False)), row
    assert row["error"] is None or printable(row["error"]) == row["error"], row
    return "answer" if output["error"] is None else "failed"


def clean(text: str) -> bool:
    return not Cleaner([KEY]).holds(text)


def search(raw: bytes) -> str:
    try:
        found = passages_in(parsed(raw), 2)
    except ValueError:
        return "search failed"
    assert len(found) == 2 and all(isinstance(text, str) and text.encode() is not None for of in found for text in of)
    return "search answer"


def fuzz(count: int, seed: int) -> dict[str, Any]:
    """What became of so many replies; the first that breaks a rule is raised with its number and bytes."""
    kinds: Counter[str] = Counter()
    slowest = 0.0
    for number in range(count):
        draw, began = random.Random(f"{seed} {number}"), time.process_time()
        reply = response(draw) if draw.random() < 0.9 else mutated(draw, FOUND)
        try:
            kinds[search(reply) if isinstance(reply, bytes) else answer(reply)] += 1
        except BaseException as error:
            said = reply if isinstance(reply, bytes) else (reply.status_code, reply.headers)
            raise AssertionError(f"reply {number} of seed {seed}: {said!r:.3000}") from error
        slowest = max(slowest, time.process_time() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return {"count": count, "seed": seed, **kinds, "slowest_seconds": round(slowest, 2), "peak_mib": round(peak)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    print(json.dumps(fuzz(given.count, given.seed), indent=2))
