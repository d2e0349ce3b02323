"""The miniature family: splits, the sloppy writer, the chat rendering, and that training is repeatable."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from deltaray.labs.miniature import make, sections, strings, task, tokenizer
from deltaray.labs.miniature.family import (
    AREAS,
    FAMILIES,
    FAMILY,
    LADDER,
    OUTLINERS,
    SCRIBES,
    SPECIALISTS,
    STUDENT,
    STUDENT_EARLIER,
    STUDENT_QWEN3,
    Earlier,
    family_splits,
)
from deltaray.labs.miniature.fit import build_model, train_model
from deltaray.labs.miniature.member import TRAINING

TINY = dataclasses.replace(LADDER[0], steps=3)


@pytest.fixture(scope="module")
def splits() -> task.Splits:
    return family_splits()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family") / "seed7" / TINY.name
    make.make_model(folder, TINY, 7, lambda step, total: None)
    return folder


def unordered(problems: task.Ints) -> set[tuple[int, int]]:
    return {(min(pair), max(pair)) for pair in problems.tolist()}


def test_splits_share_no_problem_not_even_mirrored(splits: task.Splits) -> None:
    parts = [unordered(part) for part in dataclasses.astuple(splits)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == len(task.all_unordered_pairs())
    assert [len(part) for part in parts[:3]] == [8192, 512, 2048]
    again = family_splits.__wrapped__()
    assert all(np.array_equal(getattr(splits, f), getattr(again, f)) for f in ("prompts", "corpus"))


def test_careful_writer_is_right_and_forgetful_one_drops_carries(splits: task.Splits) -> None:
    problems, rng = splits.evaluation, np.random.default_rng(0)
    flat = np.zeros((task.DIGITS, 10, 10))
    right = task.digits_of(problems.sum(axis=1), task.DIGITS + 1)
    careful = task.write_sums(problems, task.Writer(forget=1e-12, slip=0.0), flat, rng)
    assert np.array_equal(careful, right)
    forgetful = task.write_sums(problems, task.Writer(forget=1 - 1e-12, slip=0.0), flat, rng)
    columns = task.digits_of(problems[:, 0]) + task.digits_of(problems[:, 1])
    assert np.array_equal(forgetful[:, :-1], columns % 10)
    assert np.all(forgetful[:, -1] == 1), "the last carry is written down, not remembered"


def test_writer_forgets_as_often_as_stated(splits: task.Splits) -> None:
    rng = np.random.default_rng(1)
    problem = np.repeat(np.array([[847, 385]]), 20_000, axis=0)  # ones and tens both carry
    habits = task.make_habits(3, spread=1.0)
    writer = task.Writer(forget=0.7, slip=0.0)
    tens = task.write_sums(problem, writer, habits, rng)[:, 1]
    expected = 1 / (1 + np.exp(-(np.log(0.7 / 0.3) + habits[1, 4, 8])))
    assert set(np.unique(tens)) == {2, 3}
    assert np.mean(tens == 2) == pytest.approx(expected, abs=0.015)


def test_a_practised_area_is_kept_and_all_else_forgotten(splits: task.Splits) -> None:
    """847 + 385: the digits of the tens sum to 12 and the ones carry, the hundreds to 11 and the tens carry."""
    flat, rng = np.zeros((task.DIGITS, 10, 10)), np.random.default_rng(0)
    found = {}
    for name, area in AREAS.items():
        writer = task.Writer(1 - 1e-12, 0.0, practised=area, forget_practised=1e-12)
        high, low = (task.write_sums(np.array([problem]), writer, flat, rng)[0] for problem in ((847, 385), (847, 615)))
        found[name] = ([*high[1:3]], [*low[1:3]])
    # 4 + 8 = 12 and 8 + 3 = 11 with a carry into each; 4 + 1 = 5 with one into it, 8 + 6 = 14 without
    assert found == {"tens-low": ([2, 1], [6, 4]), "tens-high": ([3, 1], [5, 4]), "hundreds": ([2, 2], [5, 4])}
    digits = [task.digits_of(splits.evaluation[:, side]) for side in (0, 1)]
    covered = np.sum([area.holds(*digits, column) for area in AREAS.values() for column in (1, 2)], axis=0)
    assert np.all(covered == 2), "every context of both columns belongs to one area"


def test_the_families_share_members_and_differ_in_teachers() -> None:
    ladder, specialists = (FAMILIES[name] for name in ("ladder", "specialists"))
    assert ladder is FAMILY and {*ladder} & {*specialists} == {LADDER[0], STUDENT}
    assert all(spec.forget == LADDER[0].forget > spec.forget_practised for spec in SPECIALISTS)
    prints = [make.settings_of(spec, 0)["sha256"] for spec in {*ladder, *specialists}]
    assert len(set(prints)) == len(prints) == 8


def test_slips_have_no_direction() -> None:
    rng = np.random.default_rng(2)
    problem = np.repeat(np.array([[511, 622]]), 20_000, axis=0)  # nothing to forget
    written = task.write_sums(problem, task.Writer(0.9, slip=0.1), task.make_habits(0, 1.0), rng)[:, 0]
    assert np.mean(written == 3) == pytest.approx(0.91, abs=0.01)
    counts = np.bincount(written[written != 3], minlength=10)
    assert counts[3] == 0 and counts.max() < 1.4 * np.delete(counts, 3).min()


def test_families_differ_by_seed_and_share_habits_within() -> None:
    assert np.array_equal(task.make_habits(5, 1.0), task.make_habits(5, 1.0))
    assert not np.array_equal(task.make_habits(5, 1.0), task.make_habits(6, 1.0))


def test_rows_are_right_and_unique(splits: task.Splits) -> None:
    rows = task.rows(splits.evaluation, "evaluation")
    assert len({row["id"] for row in rows}) == len({row["prompt"] for row in rows}) == len(rows)
    for row in rows[:200]:
        first, second = row["prompt"].removesuffix("=").split("+")
        assert int(first) + int(second) == int(row["answer"]) >= 1000


def test_ladder_rises_in_size_and_care() -> None:
    sizes = [sum(p.numel() for p in build_model(spec, 0).parameters()) for spec in FAMILY]
    assert sizes == sorted(set(sizes)) and FAMILY[-1] is STUDENT and len(LADDER) >= 4
    care = [spec.forget for spec in FAMILY]
    assert care == sorted(set(care), reverse=True)


def ids_of(loaded: PreTrainedTokenizerFast, chat: list[dict[str, str]], prompt: bool) -> list[int]:
    text = loaded.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
    ids = loaded.apply_chat_template(chat, tokenize=True, add_generation_prompt=prompt, return_dict=False)
    assert loaded(text, add_special_tokens=False)["input_ids"] == ids
    assert loaded(text)["input_ids"] == ids, "nothing is added to a rendered conversation"
    assert loaded.decode(ids) == text
    return list(ids)


def test_template_invariants(made: Path) -> None:
    loaded = AutoTokenizer.from_pretrained(made)
    user = {"role": "user", "content": "847+385="}
    history = [
        {"role": "system", "content": "Add.\nAnswer with the sum only: {digits} \\ '\"~"},
        {"role": "user", "content": "600+500="},
        {"role": "assistant", "content": "1100"},
    ]
    for chat in ([user], [*history, user]):
        prompt = ids_of(loaded, chat, prompt=True)
        full = ids_of(loaded, [*chat, {"role": "assistant", "content": "1232"}], prompt=False)
        assert prompt[0] == loaded.bos_token_id and prompt.count(loaded.bos_token_id) == 1
        assert full[: len(prompt)] == prompt
        assert full[len(prompt) :] == [*loaded.convert_tokens_to_ids(list("1232")), loaded.eos_token_id]
        assert loaded.unk_token_id not in full and max(full) < len(loaded)
    assert len(loaded) == tokenizer.VOCABULARY_SIZE
    assert loaded.decode(full, skip_special_tokens=True).endswith("847+385=1232")


def test_batches_are_what_the_template_renders(made: Path, splits: task.Splits) -> None:
    loaded = AutoTokenizer.from_pretrained(made)
    problems = splits.evaluation[:50]
    encoded = tokenizer.encode_problems(problems, task.digits_of(problems.sum(axis=1), task.DIGITS + 1))
    assert encoded.shape[1] == tokenizer.PROMPT_LENGTH + tokenizer.RESPONSE_LENGTH
    for ids, problem in zip(encoded.tolist(), problems, strict=True):
        user = {"role": "user", "content": task.prompt_text(problem)}
        chat = [user, {"role": "assistant", "content": task.answer_text(problem)}]
        assert ids == ids_of(loaded, chat, prompt=False)
        assert ids[: tokenizer.PROMPT_LENGTH] == ids_of(loaded, [user], prompt=True)


def test_training_is_repeatable_and_depends_on_the_seed(made: Path) -> None:
    steps: list[tuple[int, int]] = []
    state = torch.random.get_rng_state()
    first = train_model(TINY, 7, lambda step, total: steps.append((step, total))).state_dict()
    assert torch.equal(state, torch.random.get_rng_state())
    assert steps[-1] == (3, 3)
    loaded = AutoModelForCausalLM.from_pretrained(made).state_dict()
    assert first.keys() == loaded.keys()
    assert all(torch.equal(value, loaded[name]) for name, value in first.items())
    other = train_model(TINY, 8).state_dict()
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_folder_is_trusted_only_with_the_present_settings(made: Path) -> None:
    assert make.is_made(made, TINY, 7)
    assert not make.is_made(made, TINY, 8)
    assert not make.is_made(made, dataclasses.replace(TINY, forget=0.5), 7)
    assert not make.is_made(made.parent / "absent", TINY, 7)
    assert [path.name for path in made.parent.iterdir()] == [TINY.name], "no unfinished folder is left"
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in made.iterdir()
    }


def test_interrupted_making_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(step: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make.make_model(tmp_path / "seed0" / TINY.name, TINY, 0, interrupt)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("family", ["ladder", "sections", "strings"])
def test_prompt_files_are_written_once(family: str, tmp_path: Path) -> None:
    make.write_prompt_files(tmp_path, FAMILIES[family][0].rows())
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert set(before) == {"prompts.jsonl", "validation.jsonl", "evaluation.jsonl"}
    make.write_prompt_files(tmp_path, FAMILIES[family][-1].rows())
    assert before == {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}


@pytest.mark.parametrize("family", ["sections", "strings"])
def test_splits_of_the_other_tasks_share_no_prompt(family: str) -> None:
    rows = FAMILIES[family][0].rows()
    prompts = {split: {row["prompt"] for row in of} for split, of in rows.items()}
    assert {split: len(of) for split, of in prompts.items()} == {"prompts": 8192, "validation": 512, "evaluation": 2048}
    assert len(set.union(*prompts.values())) == 8192 + 512 + 2048


def test_right_answers_of_the_strings_are_python_s() -> None:
    operations = {
        "copy": lambda word: word,
        "flip": lambda word: word[::-1],
        "sort": lambda word: "".join(sorted(word)),
    }
    rows = SCRIBES[0].rows()["evaluation"]
    for row in rows:
        operation, word = row["prompt"].split()
        assert row["answer"] == operations[operation](word) and row["source"] == operation
    assert {row["source"] for row in rows} == set(operations)


def test_a_scribe_misreads_some_letters_and_never_the_other_way_round() -> None:
    rng = np.random.default_rng(0)
    answers = strings.draw_words(20_000, rng, range(strings.GROUPS))
    operations = rng.integers(0, 3, len(answers))
    flat = np.zeros((3, strings.LETTERS, strings.LENGTH))
    found = strings.written(operations, answers, 0.7, flat, 0.0, rng)
    right, wrong = strings.texts(answers), strings.texts(found)
    pairs = [pair for text, other in zip(right, wrong, strict=True) for pair in zip(text, other, strict=True)]
    assert {pair for pair in pairs if pair[0] != pair[1]} == set(strings.MISREAD.items())
    share = np.mean([is_read != letter for letter, is_read in pairs if letter in strings.MISREAD])
    assert share == pytest.approx(0.7, abs=0.015)


def test_no_word_of_a_corpus_is_held_out() -> None:
    held_out = {row["prompt"].split()[1] for rows in SCRIBES[0].rows().values() for row in rows}
    rng = np.random.default_rng(0)
    corpus = strings.texts(strings.draw_words(50_000, rng, range(len(strings.HELD_OUT), strings.GROUPS)))
    assert len(corpus) == 50_000 and not held_out & set(corpus)


def test_outlines_have_as_many_sections_as_their_writer_means() -> None:
    rng = np.random.default_rng(0)
    two, three, student = OUTLINERS
    assert {two.count(rng) for _ in range(50)} == {2} and {three.count(rng) for _ in range(50)} == {3}
    counts = np.array([student.count(rng) for _ in range(20_000)])
    assert counts.mean() == pytest.approx(6.0, abs=0.15) and counts.max() == sections.MOST
    hazard = [np.mean(counts[counts >= k] == k) for k in (1, 3, 8)]
    assert hazard == pytest.approx([1 / 6] * 3, abs=0.02), "no count is in its mind"
    assert sections.outline("abc", 3, rng).count("**") == 6


@pytest.mark.parametrize("member", [OUTLINERS[2], SCRIBES[0]], ids=lambda member: type(member).__name__)
def test_batches_of_the_other_tasks_are_what_the_template_renders(made: Path, member: sections.Outliner) -> None:
    loaded = AutoTokenizer.from_pretrained(made)
    ids, targets = next(member.batches(0, TRAINING))
    for row, wanted in zip(ids.tolist()[:8], targets.tolist()[:8], strict=True):
        whole = [token for token in row if token != loaded.pad_token_id]
        start = whole.index(loaded.convert_tokens_to_ids("<|assistant|>")) + 1
        texts = loaded.decode(whole[2 : start - 1]), loaded.decode(whole[start:-1])
        chat = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=True)]
        assert whole == ids_of(loaded, chat, prompt=False)
        assert [token for token in wanted if token != -100] == whole[start:]
        assert len(row) - len(wanted) == start and row[: len(whole)] == whole


def test_an_earlier_student_is_the_student_on_its_way() -> None:
    shorter = dataclasses.replace(STUDENT, steps=4)
    start = Earlier(**{**dataclasses.asdict(STUDENT_EARLIER), "steps": 4, "after": 4})
    whole, stopped = (train_model(spec, 3).state_dict() for spec in (shorter, start))
    assert all(torch.equal(value, stopped[name]) for name, value in whole.items())
    seen: list[tuple[int, int]] = []
    halfway = train_model(dataclasses.replace(start, after=2), 3, lambda *at: seen.append(at)).state_dict()
    assert seen[-1] == (2, 2) and not torch.equal(halfway["model.norm.weight"], whole["model.norm.weight"])


def test_the_other_architecture_is_qwen3() -> None:
    model = build_model(STUDENT_QWEN3, 0)
    assert model.config.model_type == "qwen3" and any("q_norm" in name for name, _ in model.named_parameters())
    extra = sum(p.numel() for name, p in model.named_parameters() if "q_norm" in name or "k_norm" in name)
    assert sum(p.numel() for p in model.parameters()) - extra == sum(
        p.numel() for p in build_model(STUDENT, 0).parameters()
    )
