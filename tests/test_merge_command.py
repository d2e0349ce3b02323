"""`deltaray merge` as a command, and matrices merged side by side in threads."""

import json
import shlex
import subprocess
import sys
import time

import pytest
import torch
from adapters import configure, make_adapter, merge
from conftest import ROOT
from safetensors.torch import load_file
from tiny_model import save_tiny

from deltaray import cli
from deltaray.errors import UserError
from deltaray.merge.parallel import map_in_order


@pytest.fixture
def pair(tmp_path):
    return [make_adapter(tmp_path / name, seed) for seed, name in enumerate("ab")]


# --- the command --------------------------------------------------------------------------------------------------
def run(monkeypatch, capfd, *arguments):
    monkeypatch.setattr(sys, "argv", ["deltaray", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code, *capfd.readouterr()


def test_the_command_shows_a_table_or_json(tmp_path, pair, monkeypatch, capfd):
    out = ("--out", str(tmp_path / "out"))
    code, stdout, stderr = run(monkeypatch, capfd, "merge", *out, *map(str, pair), "--reference", str(pair[1]))
    assert code == 0 and "q_proj" in stdout and "all" in stdout and f"adapter: {tmp_path / 'out'}" in stdout
    assert "warning: the adapters' subspaces differ" in stderr
    assert f"diagnosis: {tmp_path / 'out/merge.html'}" in stdout and (tmp_path / "out/merge.html").is_file()
    code, stdout, _ = run(monkeypatch, capfd, "merge", "--method", "task_arithmetic", *out, "--json", *map(str, pair))
    assert code == 0 and json.loads(stdout)["method"] == "task-arithmetic" and len(json.loads(stdout)["modules"]) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere", "--out", "out"), "nowhere: holds no adapter_config.json"),
        (("a", "--out", "out", "--weights", "one"), "--weights one: are numbers"),
        (("a", "--out", "out", "--weights", "inf"), "must be finite"),
        (("a", "--out", "out", "--method", "knots", "--inner", "median"), "--inner median: must be one of"),
        (("study.yaml", "--out", "out"), "--out: how and where to merge says the recipe's `merging:`"),
        (("study.yaml", "--restore-norm"), "--restore-norm: how and where"),
        (("study.yaml", "--json"), "--json: how and where"),
        (("study.yaml", "a"), "study.yaml: a recipe stands alone"),
        (("study.yaml",), "study.yaml: there is no such recipe"),
        (("a", "--out", "out", "--set", "seeds=[1]"), "--set: belongs to a recipe"),
        (("a",), "--out: is missing"),
        (("--out", "out"), "Missing argument"),
        (("a", "--out", "/dev/null/out"), "cannot be written"),
    ],
)
def test_mistakes_are_one_message_and_code_2(tmp_path, pair, monkeypatch, capfd, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, stdout, stderr = run(monkeypatch, capfd, "merge", *arguments)
    assert code == 2 and message in stderr and not stdout and "Traceback" not in stderr


def test_the_readmes_commands_are_understood(tmp_path, pair, monkeypatch, capfd):
    readme = (ROOT / "README.md").read_text()
    commands = [line.partition("#")[0] for line in readme.splitlines() if line.startswith("deltaray merge ")]
    assert len(commands) >= 3
    save_tiny(tmp_path / "base")
    for name in "ABC":
        configure(make_adapter(tmp_path / name, ord(name)), base_model_name_or_path="base")
    monkeypatch.chdir(tmp_path)
    for command in commands:
        code, _, stderr = run(monkeypatch, capfd, *shlex.split(command)[1:])
        assert code == 0, (command, stderr)


def test_merging_needs_neither_ray_nor_peft(tmp_path, pair):
    """It starts in a second, and where only torch is installed."""
    code = (
        "import sys; from pathlib import Path; from deltaray.merge.arguments import Merge; "
        "from deltaray.merge.run import merge_adapters; "
        f"merge_adapters(Merge([Path({str(pair[0])!r})]), Path({str(tmp_path / 'out')!r})); "
        "print([name for name in ('ray', 'peft', 'transformers', 'vllm', 'deepspeed') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


# --- several matrices at a time -----------------------------------------------------------------------------------
def test_matrices_side_by_side_come_in_order_and_are_drawn_as_they_are_needed():
    drawn = []

    def tasks():
        for number in range(20):
            drawn.append(number)
            yield number

    def job(number):
        time.sleep(0.002 * (number % 3))
        return number, torch.get_num_threads()

    found = map_in_order(job, tasks(), 3)
    assert next(found) == (0, 1) and len(drawn) <= 5
    assert list(found) == [(number, 1) for number in range(1, 20)]
    assert [number for number, _ in map_in_order(job, range(3), 1)] == [0, 1, 2]


def test_a_matrix_that_fails_ends_the_others():
    done = []

    def job(number):
        if number == 2:
            raise UserError("no")
        done.append(number)

    with pytest.raises(UserError, match="no"):
        list(map_in_order(job, range(1000), 2))
    assert len(done) < 20


def test_the_number_of_threads_changes_nothing(tmp_path, pair):
    threads = torch.get_num_threads()
    for count in (1, 4):
        torch.set_num_threads(count)
        merge(pair, tmp_path / str(count))
    torch.set_num_threads(threads)
    one, four = (load_file(tmp_path / str(count) / "adapter_model.safetensors") for count in (1, 4))
    assert one.keys() == four.keys() and all(torch.equal(one[name], four[name]) for name in one)
