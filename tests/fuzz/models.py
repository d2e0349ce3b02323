"""Folders of models and adapters: configurations, tokenizers, templates, weights and their headers, changed."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

from deltaray.data.tokens.load import COMPARED
from deltaray.errors import StageError, UserError
from deltaray.merge.adapter import Adapter
from deltaray.recipe.models import Student, Teacher
from deltaray.recipe.scorers import RewardModel
from deltaray.study.check_models import check_model
from tests.fuzz.mutate import change, spoil
from tests.fuzz.recipes import Check, _silent
from tests.tiny_model import make_model, save_tiny


def prepare(folder: Path) -> Check:
    """A tiny student with an adapter; of each input one file of one of them is another."""
    whole = folder / "whole"
    save_tiny(whole)
    (whole / "generation_config.json").write_text('{"eos_token_id": 1, "temperature": 1.0, "do_sample": true}')
    _save_adapter(folder / "adapter")
    terminal = _silent()

    def check(chance: random.Random) -> str:
        spoilt = folder / "spoilt"
        shutil.rmtree(spoilt, ignore_errors=True)
        adapter = chance.random() < 0.25
        shutil.copytree(folder / "adapter" if adapter else whole, spoilt, symlinks=True)
        _spoil_one(chance, spoilt)
        COMPARED.clear()
        with terminal.checking():
            return _looked_at(chance, spoilt, str(whole), adapter, terminal)

    return check


def _looked_at(chance: random.Random, spoilt: Path, whole: str, adapter: bool, terminal: Any) -> str:
    try:
        if adapter:
            Adapter(spoilt)
            check_model(Teacher(model=whole, adapter=str(spoilt)), "teachers.a")
        else:
            kind = chance.choice(("student", "student", "teacher", "reward"))
            if kind == "student":
                check_model(Student(model=str(spoilt), max_length=64), "student", chance.choice((None, "model")))
            elif kind == "teacher":
                check_model(Teacher(model=str(spoilt), system="Be kind."), "teachers.a")
            else:
                check_model(RewardModel(kind="reward_model", model=str(spoilt), max_length=64), "scorers.r")
    except (UserError, StageError) as error:
        terminal.say(f"error: {error}")
        return "refused"
    return "taken"


def _save_adapter(folder: Path) -> None:
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    get_peft_model(make_model(), settings).save_pretrained(folder)


def _spoil_one(chance: random.Random, folder: Path) -> None:
    path = chance.choice(sorted(path for path in folder.iterdir() if path.suffix != ".md"))
    act = chance.random()
    if act < 0.04:
        path.unlink()
        chance.choice((lambda: path.symlink_to("/dev/zero"), path.mkdir, lambda: path.symlink_to(path), lambda: None))()
    elif path.suffix == ".json" and act < 0.65:
        tree = json.loads(path.read_text())
        for _ in range(chance.choice((1, 1, 3))):
            tree = change(chance, tree)
        path.write_text(json.dumps(tree))
    elif path.suffix == ".safetensors" and act < 0.65:
        path.write_bytes(_with_header(chance, path.read_bytes()))
    else:
        path.write_bytes(spoil(chance, path.read_bytes()))


def _with_header(chance: random.Random, content: bytes) -> bytes:
    """Weights whose header says something else."""
    length = int.from_bytes(content[:8], "little")
    header = change(chance, json.loads(content[8 : 8 + length]))
    text = json.dumps(header).encode()
    size = len(text) if chance.random() < 0.9 else chance.choice((0, 2**63, 2**64 - 1, 10**8, 5))
    return size.to_bytes(8, "little") + text + content[8 + length :]
