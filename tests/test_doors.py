"""What comes in from outside is read, or refused in one message: recipes, `--set`, paths, files, and the last net."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from deltaray import cli
from deltaray.data.contracts import SCORES
from deltaray.data.prompts import read_prompts
from deltaray.data.store import Store
from deltaray.errors import UserError, door
from deltaray.limits import RECIPE_BYTES, SEEDS, STUDY_ITEMS
from deltaray.model_files.headers import tensors_of_file
from deltaray.recipe import expand, load_recipe, shipped_recipe
from deltaray.recipe.yaml import YamlError, read_yaml
from deltaray.runtime.terminal import Terminal
from deltaray.study.status import open_study

RECIPE = """\
name: study
out: runs/study
prompts: {path: prompts.jsonl}
teachers:
  one: {model: models/one}
  two: {model: models/two}
pairings:
  delta: {chosen: one, rejected: two}
student: {model: models/student}
training:
  runs:
    first: {pairing: delta, learning_rate: 1e-5}
evaluation:
  tasks:
    sums: {path: sums.jsonl}
  selection:
    chosen: {path: chosen.jsonl}
"""


def refusal(tmp_path: Path, text: str = RECIPE, *overrides: str) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        expand(load_recipe(path, list(overrides)))
    return str(error.value).replace(f"{tmp_path}/", "")


# --- YAML -------------------------------------------------------------------------------------------------------
def test_yaml_becomes_plain_values_and_every_alias_one_of_its_own() -> None:
    text = "a: &x {n: 1}\nb: *x\nc: {<<: *x, n: 2}\nd: [5e-8, 0x1f, 0o17, 1_000, no, yes, 2031-05-04, ~, true, '1']\n"
    found = read_yaml(text)
    assert found.value["a"] == found.value["b"] == {"n": 1} and found.value["c"] == {"n": 2}
    assert found.value["a"] is not found.value["b"]
    assert found.value["d"] == [5e-8, 31, 15, 1000, "no", "yes", "2031-05-04", None, True, "1"]
    assert read_yaml('"\\ud83d\\ude00"').value == "\U0001f600"
    assert found.line(("c", "n")) == 3 and found.line(("b", "n")) == 1 and found.line(("d", 3, "x")) == 4


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        (BOMB, 1, "aliases written out"),
        ("".join(f"k{n}: 1\n" for n in range(200_000)), 1, "bytes"),
        ("x: " + "[" * 5000, 1, "nested deeper"),
        ("x: &x [*x]", 1, "nested deeper"),
        ("x: &x {<<: *x}", 1, "nested deeper"),
        ("x: 1\ny: .nan", 2, "finite"),
        ("x: -.INF", 1, "finite"),
        ("x: 1e999", 1, "finite"),
        ("x: " + "7" * 10_000, 1, "whole number"),
        ("x: 9223372036854775808", 1, "whole number"),
        ("x: !!binary aGk=", 1, "the tag"),
        ("x: !!set {a, b}", 1, "the tag"),
        ("x: !!python/object/apply:os.getcwd []", 1, "the tag"),
        ("x: 1\nx: 2", 2, "stands twice"),
        ("1: a\n'1': b", 2, "stands twice"),
        ("? [a]\n: 1", 1, "a key is a list"),
        ("x: 1\n<<: 3", 2, "takes an alias"),
        ('x: "\\ud83d"', 1, r"U\+D83D"),
        ('x: "a\\0b"', 1, r"U\+0000"),
        ("x: 1\n\ty: 2", 2, "not YAML"),
        ("x: \x07", 1, r"U\+0007"),
        ("x: 1\n---\ny: 2", 2, "not YAML"),
        ("x: *nobody", 1, "not YAML"),
        ("x: 1" + " " * RECIPE_BYTES, 1, "larger than"),
    ],
)
def test_yaml_that_no_recipe_can_hold_is_refused_with_its_line(text: str, line: int, words: str) -> None:
    with pytest.raises(YamlError, match=words) as error:
        read_yaml(text)
    assert error.value.line == line


def test_a_million_keys_are_not_read_to_their_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deltaray.recipe.yaml.RECIPE_VALUES", 50)
    with pytest.raises(YamlError, match="more than 50 keys and values") as error:
        read_yaml("".join(f"k{n}: 1\n" for n in range(10_000)))
    assert error.value.line < 30


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (RECIPE.encode("utf-16"), "UTF-16"),
        (b"", "a mapping"),
        (b"- name\n", "a mapping"),
        (b"x" * (RECIPE_BYTES + 1), "larger than"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "recipe.yaml").write_bytes(content)
    with pytest.raises(UserError, match=words):
        load_recipe(tmp_path / "recipe.yaml")


def test_a_mark_and_other_line_ends_change_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(RECIPE)
    (tmp_path / "b.yaml").write_bytes(b"\xef\xbb\xbf" + RECIPE.replace("\n", "\r\n").encode())
    assert load_recipe(tmp_path / "a.yaml") == load_recipe(tmp_path / "b.yaml")


# --- values -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "training.runs.first.beta=.nan",
            ": .nan: write a finite number",
        ),
        ("training.runs.first.beta='nan'", "--set training.runs.first.beta: 'nan': write a finite number"),
        ("training.runs.first.beta='inf'", "--set training.runs.first.beta: 'inf': write a finite number"),
        ("training.runs.first.beta=true", "--set training.runs.first.beta: true: write a number"),
        ("training.workers=yes", "--set training.workers: 'yes': write a whole number"),
        ("training.workers=true", "--set training.workers: true: write a number"),
        (
            "training.runs.first.learning_rate=[1e-5, true]",
            "--set training.runs.first.learning_rate.1: true: write a number",
        ),
        ("training.zero_stage=true", "--set training.zero_stage: true: write a number"),
        ("training.gradient_checkpointing=1", "--set training.gradient_checkpointing: 1: write true or false"),
        ("pairings.delta.reverse=0", "--set pairings.delta.reverse: 0: write true or false"),
        ("training.workers=1e30", "--set training.workers"),
        ("seeds.²=1", "--set seeds: {'²': 1}: write a list"),
        ("seeds.9=\ud800", "--set seeds.9"),
        ("pairings.delta.filters=&a [*a]", "nested deeper"),
        ("seeds=[-1]", "greater than or equal to 0"),
        ('out="a\\0b"', "U+0000"),
        ('out=""', "it is empty"),
        ("out=" + "x" * 300, "a shorter path"),
        ("miniature.directory=" + "y/" * 3000, "a shorter path"),
        ("out=~nobody-of-this-name/x", "no such user"),
        ("student.name=" + "x" * 200, "100 at most"),
    ],
)
def test_values_that_are_none(tmp_path: Path, override: str, message: str) -> None:
    said = refusal(tmp_path, RECIPE, override)
    assert message in said, said


def test_numbers_in_quotes_and_words_for_true(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    found = load_recipe(path, ["training.runs.first.learning_rate='5e-8'", "pairings.delta.reverse=yes"])
    assert found.training and found.training.runs["first"].learning_rate == 5e-8
    assert found.pairings["delta"].reverse is True


def test_an_override_changes_the_one_place_that_it_names(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    shared = RECIPE.replace("models/one}", "models/one, sampling: &s {temperature: 1}}")
    path.write_text(shared.replace("models/two}", "models/two, sampling: *s}"))
    found = load_recipe(path, ["teachers.one.sampling.temperature=0.5"])
    assert (found.teachers["one"].sampling.temperature, found.teachers["two"].sampling.temperature) == (0.5, 1.0)


def test_an_address_that_is_none_is_no_reason_to_fail(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    assert load_recipe(path, ["teachers.one.model=http://["]).teachers["one"].model == "http://["


# --- names ------------------------------------------------------------------------------------------------------
def test_two_rates_of_a_grid_stay_two(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    found = expand(load_recipe(path, ["training.runs.first.learning_rate=[2e-4, 0.0002000001, 1e-5]"]))
    assert list(found.runs) == ["first-lr0.0002", "first-lr0.0002000001", "first-lr1e-05"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teachers.One.model=x"], "differs from one in case only"),
        (
            ["seeds=[0, 1]", "teachers.one.model=m/{seed}", "teachers.one-seed1.model=x"],
            "would both be called one-seed1",
        ),
        (
            ["training.runs.first.learning_rate=[1e-5, 2e-5]", "training.runs.first-lr1e-05.pairing=delta"],
            "would both be called first-lr1e-05",
        ),
    ],
)
def test_two_things_never_get_one_name(tmp_path: Path, overrides: list[str], message: str) -> None:
    assert message in refusal(tmp_path, RECIPE, *overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([f"seeds={list(range(SEEDS + 1))}"], f"{SEEDS + 1:,} seeds"),
        (
            [f"seeds={list(range(SEEDS))}", f"training.runs.first.learning_rate={[n / 1e9 for n in range(1, 40)]}"],
            "over all seeds",
        ),
        ([f"training.runs.first.intermediate_checkpoints={list(range(1, STUDY_ITEMS // 2 + 2))}"], "over all seeds"),
        (
            ["training.heldout=0.1", "exploration.search=random", "exploration.samples=1000000000"],
            "1,000,000,000 trials",
        ),
        (
            [
                "training.heldout=0.1",
                f"exploration.space.beta={list(range(1, 101))}",
                f"exploration.space.pairs={list(range(1, 101))}",
            ],
            "20,000 trials",
        ),
    ],
)
def test_what_would_never_end_is_refused_at_once(tmp_path: Path, overrides: list[str], message: str) -> None:
    assert message in refusal(tmp_path, RECIPE, *overrides)


# --- where files are ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["dolci-think-seed", "tulu3-qwen2.5-3b-over-1.5b"])
def test_a_shipped_recipe_means_the_same_from_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    here = load_recipe(shipped_recipe(name))
    monkeypatch.chdir(tmp_path)
    there = load_recipe(shipped_recipe(name))
    for teacher in there.teachers.values():
        assert teacher.chat_template is None or Path(teacher.chat_template).is_file()
    assert [it.model for it in there.teachers.values()] == [it.model for it in here.teachers.values()]


def test_a_template_lies_beside_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").mkdir()
    path = tmp_path / "recipes" / "recipe.yaml"
    path.write_text(RECIPE)
    (tmp_path / "recipes" / "mine.jinja").write_text("{{ messages }}")
    monkeypatch.chdir(tmp_path)
    assert load_recipe(path, ["student.chat_template=mine.jinja"]).student.chat_template == "recipes/mine.jinja"  # type: ignore[union-attr]
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert Path(load_recipe(path, ["student.chat_template=mine.jinja"]).student.chat_template).is_absolute()  # type: ignore[union-attr,arg-type]
    assert load_recipe(path, ["student.chat_template=tool_use"]).student.chat_template == "tool_use"  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["pipe.jsonl", "zero.jsonl", "zero.csv", "zero.parquet", "holes.jsonl", "loop.jsonl"])
def test_files_that_never_end(tmp_path: Path, name: str) -> None:
    if name.startswith("pipe"):
        os.mkfifo(tmp_path / name)
    elif name.startswith("holes"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(1 << 36)
    else:
        (tmp_path / name).symlink_to("/dev/zero" if name.startswith("zero") else tmp_path / name)
    with pytest.raises(UserError, match=name):
        list(read_prompts(str(tmp_path / name), "prompts.path"))


@pytest.mark.parametrize("out", ["a\0b", "a\ud800b", "x" * 300])
def test_an_out_that_no_file_system_has(out: str) -> None:
    with pytest.raises(UserError, match="out: "):
        Store(out)


# --- the command line ---------------------------------------------------------------------------------------------
def test_names_are_printed_as_they_are(capfd: pytest.CaptureFixture[str]) -> None:
    from rich.table import Table

    terminal, table = Terminal(), Table(title="[red]t[/]")
    table.add_column("[b]")
    table.add_row("[/x] :smile: \udcff")
    terminal.out.print(table)
    terminal.say("[/] [red]a\ud800b")
    said = capfd.readouterr()
    assert "[red]t[/]" in said.out and "[/x] :smile: \\xff" in said.out and "[/] [red]a\\ud800b" in said.err


def panic() -> None:
    class PanicException(BaseException):
        pass

    raise PanicException("index out of range")


@pytest.mark.parametrize("failure", [lambda: 1 / 0, panic, lambda: json.loads("{"), lambda: {}["[red]"]])
def test_the_last_net_says_one_line_and_where_the_rest_is(
    failure, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("deltaray.study.status.study_status", lambda *_: failure())
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(SystemExit) as stop:
        cli.main(["status", "anywhere"])
    said = capfd.readouterr().err
    assert stop.value.code == 1 and said.startswith("error: ") and "Traceback" not in said
    [log] = tmp_path.glob("deltaray-*.log")
    assert str(log) in said.replace("\n", "") and "Traceback" in log.read_text()


def test_what_ends_a_command_passes_every_door() -> None:
    for passing in (KeyboardInterrupt, SystemExit, GeneratorExit):
        with pytest.raises(passing), door("x"):
            raise passing
    with pytest.raises(UserError, match="x: cannot be read: index out of range"), door("x"):
        panic()


def test_bytes_that_are_no_text_in_arguments(tmp_path: Path) -> None:
    """In a process of its own: what Python makes of such bytes is an argument's matter."""
    command = [sys.executable, "-m", "deltaray"]
    ended = subprocess.run(
        [*map(os.fsencode, command), b"status", b"\xff[/]"],
        capture_output=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        check=False,
    )
    assert ended.returncode == 2 and b"Traceback" not in ended.stderr and b"\\udcff[/]" in ended.stderr


# --- a study's folder -----------------------------------------------------------------------------------------------
def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.write_bytes("recipe.yaml", b"name: x")
    for content in (b"{", b"[" * 100_000, b"7", b'{"inputs": 3}', b"\xff"):
        store.write_bytes(".deltaray/pairs/p.json", content)
        with pytest.raises(UserError, match=r"pairs/p\.json: is damaged or no file of ours"):
            open_study(str(tmp_path)).made_from("p")


def test_a_changed_byte_of_a_table_is_never_another_answer(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    rows = [{"prompt_id": f"p{n}", "sample": 0, "score": n / 7, "note": None, "parts": None} for n in range(200)]
    table = pa.Table.from_pylist(rows, schema=SCORES)
    store.write_table("scores/x.parquet", table, SCORES)
    path = tmp_path / "scores" / "x.parquet"
    whole, refused = path.read_bytes(), 0
    for place in range(0, len(whole), 29):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        try:
            assert store.read_table("scores/x.parquet", schema=SCORES).equals(table)
        except UserError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 10


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: Path(path).symlink_to("/dev/zero"), os.mkdir])
def test_what_is_no_file_is_not_read(tmp_path: Path, make) -> None:
    make(tmp_path / "pairs.json")
    with pytest.raises(UserError, match=r"pairs\.json: is not a file"):
        Store(str(tmp_path)).read_json("pairs.json")


def test_a_header_with_a_gap_is_no_header(tmp_path: Path) -> None:
    for shape, start, kind in (([2], 0, "F32"), ([3], 0, "F32"), ([2], 4, "F32"), ([2], 0, "F31"), ([-2], 0, "F32")):
        text = json.dumps({"w": {"dtype": kind, "shape": shape, "data_offsets": [start, start + 8]}}).encode()
        path = tmp_path / "w.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(start + 8))
        if (shape, start, kind) == ([2], 0, "F32"):
            assert tensors_of_file(path)["w"].shape == (2,)
        else:
            with pytest.raises(UserError, match="is damaged"):
                tensors_of_file(path)
