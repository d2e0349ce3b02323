"""What a recipe names as a key is a secret, and no message quotes a credential."""

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest
from test_security import WEAK, load, recipe

from deltaray.errors import UserError
from deltaray.recipe import load_recipe
from deltaray.text import Cleaner

SERVED = {"url": "https://host/v1", "key_variable": "HOUSE"}
OF_THE_HOUSE = "maple-in-the-garden"


@pytest.fixture
def house(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key in a variable whose name tells nothing."""
    monkeypatch.setenv("HOUSE", OF_THE_HOUSE)


@pytest.mark.usefixtures("house")
@pytest.mark.parametrize(
    "sections",
    [
        {"prompts": {"path": f"{OF_THE_HOUSE}.jsonl"}},
        {"prompts": {"path": "p.jsonl", "limit": OF_THE_HOUSE.upper()}},
        {"prompts": {"path": f"https://h/{base64.b64encode(OF_THE_HOUSE.encode()).decode()}"}},
        {"pairings": {"p": {"chosen": "maple%2Din%2Dthe%2Dgarden", "rejected": "weak"}}},
        {OF_THE_HOUSE: 1},
    ],
)
def test_what_the_named_variable_holds_is_refused_and_not_quoted(sections: dict[str, Any], tmp_path: Path) -> None:
    tree = recipe(**sections) | {"teachers": {"weak": WEAK | {"endpoint": SERVED}}}
    with pytest.raises(UserError, match=r"holds (what looks like a key|a secret)") as caught:
        load(tree, tmp_path)
    assert not Cleaner([OF_THE_HOUSE]).holds(str(caught.value))


@pytest.mark.usefixtures("house")
@pytest.mark.parametrize(
    "line",
    [
        f"a: {OF_THE_HOUSE}\na: 1",
        f"a: [{OF_THE_HOUSE}",
        f"a: *{OF_THE_HOUSE}",
        f"# it was {OF_THE_HOUSE}",
        "api_key: tulip\napi_key: rose",
        "a: https://ann:tulip@host/x\na: https://ann:rose@host/x",
        "prompts: {path: p, limit: {password: tulip}}",
        "prompts: {path: 'https://[ann:tulip@host'}",
        "prompts: {path: 'https://ann:tu/lip@host/x'}",
        "prompts: {path: 'see https://h/x?a=1&access_token=tulip'}",
        "teachers: {weak: {model: m, engine: {arguments: {password: 8132647}}}}",
        "teachers: {weak: {model: m, engine: {arguments: {password: [tulip]}}}}",
        "teachers: {weak: {model: m, engine: {arguments: {api_key: {value: tulip}}}}}",
        "teachers: {weak: {model: m, engine: {arguments: {password: !!binary dHVsaXA=}}}}",
        "'https://ann:tulip@host': 1",
    ],
)
def test_no_message_about_a_line_quotes_its_credential(line: str, tmp_path: Path) -> None:
    text = f"name: x\nout: runs/x\n{line}\nscorers: {{j: {{by: {{model: m, endpoint: {json.dumps(SERVED)}}}}}}}\n"
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_recipe(tmp_path / "recipe.yaml")
    assert not re.search(f"tulip|rose|tu/lip|8132647|dHVsaXA|{OF_THE_HOUSE}", str(caught.value)), caught.value


@pytest.mark.parametrize(
    "override",
    [
        "teachers.weak.engine.arguments.api_key=tulip",
        "teachers.weak.engine.arguments.api_key=[tulip",
        "teachers.weak.engine.arguments.api_key.x.y={tulip: [",
        "name.api_key=tulip",
        "prompts.path=https://ann:tulip@host/x",
        "https://ann:tulip@host/x=1",
        "https://ann:tulip@host/x",
        "prompts.limit={password: tulip}",
    ],
)
def test_no_message_about_an_override_quotes_its_value(override: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load(recipe(), tmp_path, override)
    assert "tulip" not in str(caught.value)
