"""Prompts extended to several turns: which, how far, in whose words."""

from collections import Counter
from typing import Any

import pytest
from extensions import KINDS, SHARES, is_asked_as_user, row, section

from deltaray.data.prompts.rows import prompt_row
from deltaray.generate.extend.rules import Draft, drawn_kind, echoes, exchanges, extended_row


# --- which prompts ----------------------------------------------------------------------------------------------
def test_the_draw_is_seeded_disjoint_and_keeps_its_shares() -> None:
    rows = [row(f"{n}+1=") for n in range(4000)]
    kinds = [drawn_kind(section(), it) for it in rows]
    counts = Counter(kinds)
    for kind, spec in SHARES.items():
        assert abs(counts[kind] - 4000 * spec["share"]) < 4 * (4000 * spec["share"]) ** 0.5  # four standard errors
    assert [drawn_kind(section(), it) for it in reversed(rows)] == kinds[::-1]
    others = [drawn_kind(section().model_copy(update={"seed": 1}), it) for it in rows]
    assert sum(a != b for a, b in zip(kinds, others, strict=True)) / 4000 > 0.5
    elsewhere = Counter(drawn_kind(section(), row(f"{n}+1=", "else")) for n in range(4000))
    assert elsewhere["paraphrase"] == 0 < elsewhere["repeat"]
    assert {drawn_kind(section(repeat={"share": 1}), it) for it in rows} == {"repeat"}


@pytest.mark.parametrize(
    "raw",
    [
        {"messages": [*row()["messages"], {"role": "assistant", "content": "2"}, {"role": "user", "content": "sure?"}]},
        {"prompt": "1+1=\udc80"},
        {"prompt": "1+1=", "tools": [{"function": {"name": "add"}}]},
    ],
)
def test_prompts_of_several_turns_with_tools_or_errors_stay(raw: dict[str, Any]) -> None:
    assert drawn_kind(section(repeat={"share": 1}), prompt_row(raw)) is None


# --- turn by turn -----------------------------------------------------------------------------------------------
def finished(draft: Draft) -> list[list[dict[str, Any]]]:
    """Completes a draft; returns what was asked."""
    asked = []
    while not draft.finished:
        asked.append(draft.question())
        assert is_asked_as_user(asked[-1]) == (draft.speaker == "user")
        draft.add(f" {draft.speaker} {len(asked)} ")
    return asked


@pytest.mark.parametrize("system", [None, "be brief"])
@pytest.mark.parametrize(
    ("kind", "turns"), [(kind, turns) for kind in KINDS[:3] for turns in range(4, 9)] + [("repeat", 5)]
)
def test_conversations_keep_the_limit_and_the_prompts_place(kind: str, turns: int, system: str | None) -> None:
    spec, lengths = section(**{kind: {"share": 1, "turns": turns}}), Counter[int]()
    origin = row(system=system)["messages"]
    head, query = origin[:-1], origin[-1]
    for number in range(40):
        draft = Draft(kind, origin, exchanges(spec, kind, f"p{number}"))
        finished(draft)
        messages = draft.messages()
        talk = messages[len(head) :]
        assert messages[: len(head)] == head
        assert [turn["role"] for turn in talk] == [("user", "assistant")[n % 2] for n in range(len(talk))]
        assert talk[-1]["role"] == "user" and len(talk) + 1 <= turns
        assert talk[0 if kind == "self_talk" else -1] == query
        if kind == "repeat":
            assert all(turn == query for turn in talk[::2])
        else:
            assert not echoes(messages)
        lengths[len(talk) + 1] += 1
    assert set(lengths) == set(range(4, turns + 1, 2))  # all that the limit allows


def test_answers_are_asked_for_as_in_a_chat_and_questions_know_what_was_said() -> None:
    origin = row("why?", system="be brief")["messages"]
    talk = Draft("self_talk", origin, 2)
    asked = finished(talk)
    assert asked[0] == origin and asked[2] == [*origin, *talk.written[:2]]
    assert "[user]\nwhy?" in asked[1][0]["content"] and "[assistant]\n assistant 1 " in asked[1][0]["content"]
    assert [turn["content"] for turn in talk.written] == [" assistant 1 ", "user 2", " assistant 3 ", "user 4"]
    for kind in ("related_query", "paraphrase"):
        before = Draft(kind, origin, 2)
        asked = finished(before)
        assert asked[1] == [origin[0], before.written[0]] and asked[3] == [origin[0], *before.written[:3]]
        assert "why?" in asked[0][0]["content"] and "user 1" not in asked[0][0]["content"]
        assert "user 1" in asked[2][0]["content"]
    assert finished(Draft("repeat", origin, 1)) == [origin]


def test_an_extended_prompt_is_named_by_its_messages_and_its_kind() -> None:
    messages = [*row("other")["messages"], {"role": "assistant", "content": "x"}, *row()["messages"]]
    found = extended_row("paraphrase", row(), messages)
    assert found["prompt_id"] == prompt_row({"messages": messages})["prompt_id"] != row()["prompt_id"]
    assert found["source"] == "sums/paraphrase" and found["answer"] == "2"
    assert extended_row("repeat", row(source=None), messages)["source"] == "repeat"
    assert extended_row("self_talk", row(), messages)["answer"] is None
