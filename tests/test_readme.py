"""What the README tells a user to type works: its recipe is parsed, its commands are run.

The stages themselves run for real in test_study.py, so commands that start them are planned here.
"""

import re
import shlex
import sys
from pathlib import Path

import pytest
from conftest import ROOT, StudyRun

from deltaray import cli
from deltaray.recipe import load_recipe

README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.partition("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]
RECIPE = re.search(r"```yaml\n(# study.yaml\n.*?)```", README, re.DOTALL)
STAGES = ("run", "generate", "score", "pair", "train", "evaluate", "tune")


def test_every_make_command_is_what_ci_runs() -> None:
    targets = [command for command in COMMANDS if command.startswith("make")]
    assert targets and all(command in (ROOT / ".ci/run").read_text().splitlines() for command in targets)


@pytest.mark.parametrize(
    "command",
    # tests/test_merge_command.py runs `merge`, which needs adapters; test_theory.py `theory`; test_submit.py and
    # test_cluster.py what needs a cluster or its file
    [
        command
        for command in COMMANDS
        if not command.startswith(("make", "deltaray merge", "deltaray submit", "deltaray theory"))
        and "--cluster" not in command
    ],
)
def test_every_deltaray_command_is_understood(
    command: str, study: StudyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert RECIPE is not None
    (tmp_path / "study.yaml").write_text(RECIPE[1])
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1+1="}\n')
    monkeypatch.chdir(tmp_path)
    program, verb, *arguments = shlex.split(command.partition(" --calibrate")[0])  # tests/test_calibrate.py runs it
    arguments = [argument for argument in arguments if argument != "--retry-failed"]  # `plan` has none
    if "runs/my-study" in arguments:
        arguments = [str(study.out)]
    monkeypatch.setattr(sys, "argv", [program, "plan" if verb in STAGES else verb, *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0, capfd.readouterr().err
    assert verb in (*STAGES, "plan", "status", "report")


def test_the_readme_recipe_is_a_recipe(tmp_path: Path) -> None:
    assert RECIPE is not None
    (tmp_path / "study.yaml").write_text(RECIPE[1])
    assert load_recipe(tmp_path / "study.yaml").training is not None


def test_paths_in_the_readme_exist() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert links and all((ROOT / link).exists() for link in links)


def test_the_sections_on_scores_and_pairs_are_recipes(tmp_path: Path) -> None:
    blocks = {name: block for block, name in re.findall(r"```yaml\n((\w+):.*?)```", README, re.DOTALL)}
    names = ("larger", "smaller", "sft", "base")
    head = f"name: x\nout: {tmp_path}/out\nstudent: {{model: m}}\n"
    teachers = f"prompts: {{path: p}}\nteachers: {{{', '.join(f'{name}: {{model: m}}' for name in names)}}}\n"
    own = head + teachers + blocks["extensions"] + blocks["scorers"] + blocks["pairings"]
    for text in (own, head + blocks["preferences"]):
        (tmp_path / "recipe.yaml").write_text(text)
        recipe = load_recipe(tmp_path / "recipe.yaml")
        assert recipe.scorers and recipe.pairings
