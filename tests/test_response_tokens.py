"""A response's ids are what the student itself would write: on real tokenizers, under real chat templates."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import trl
from real_tokenizers import real_tokenizer
from transformers import PreTrainedTokenizerFast

from deltaray.data.tokens import turn_end_ids
from deltaray.data.tokens.answer_frame import frame_of
from deltaray.data.tokens.chat import RefusedError, render_prompt
from deltaray.data.tokens.response_tokens import THOUGHTS, Written, response_ids

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INSIDE = (  # leaves the block open that it writes before the last answer, as Nemotron Nano 2 does
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{{ '<think>\n\n' if m.role == 'assistant' and loop.last }}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n\n' }}{% endif %}"
)
OWN = {"llama2": LLAMA2, "chatml": CHATML, "inside": INSIDE}
QUESTION = [{"role": "user", "content": "Name two rivers."}]
TEXTS = [
    "The Po.", "\nThe Po.", "\n\n- Po\n- Elbe\n", "    return 1", "Po \u00fcber \u6cb3 \U0001f30a", "x" * 40, "\tPo ",
    "a</s>b<|im_end|>",
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizers")

    @lru_cache
    def load(name: str) -> Any:
        found = PreTrainedTokenizerFast.from_pretrained(real_tokenizer(name, folder / name))
        own = found.chat_template
        return found, own["default"] if isinstance(own, dict) else own

    def with_template(name: str, template: str | None = None, **arguments: Any) -> Any:
        """One object per tokenizer, since loading takes seconds."""
        tokenizer, own = load(name)
        tokenizer.chat_template = OWN.get(template or "") or own
        if template is not None and template not in OWN:
            tokenizer.chat_template = (TEMPLATES / f"{template}.jinja").read_text()
        tokenizer.template_arguments = arguments
        return tokenizer

    return with_template


def ids_of(tokenizer: Any, text: str, reasoning: str | None = None, **own: Any) -> list[int]:
    return response_ids(tokenizer, render_prompt(tokenizer, QUESTION), Written(text, reasoning, **own))


def pieces(tokenizer: Any, text: str, reasoning: str | None = None) -> str:
    return str(tokenizer.decode(ids_of(tokenizer, text, reasoning)))


REAL = [
    ("qwen3", "chatml", "<|im_end|>"),
    ("qwen3", "qwen3_instruct_2507", "<|im_end|>"),
    ("qwen3", "qwen2_5", "<|im_end|>"),
    ("gemma3", None, "<end_of_turn>"),
    ("llama3", None, "<|eot_id|>"),  # begins the next answer behind every turn
    ("llama3_1", None, "<|eot_id|>"),
    ("llama3_1", "llama3_2", "<|eot_id|>"),
    ("llama2", "llama2", "</s>"),
    ("deepseek_v3", None, "<｜end▁of▁sentence｜>"),
    ("command_r_plus", None, "<|END_OF_TURN_TOKEN|>"),
]


@pytest.mark.parametrize(("name", "template", "end"), REAL)
def test_an_answer_is_tokenised_by_itself_and_ends_with_the_templates_turn(
    tokenizer_of: Any, name: str, template: str | None, end: str
) -> None:
    tokenizer = tokenizer_of(name, template)
    for text in TEXTS:
        *ids, last = ids_of(tokenizer, text)
        assert tokenizer.convert_ids_to_tokens(last) == end
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
        assert not {*tokenizer.all_special_ids} & {*ids}  # control tokens in a text are text
        if text != TEXTS[-1]:
            assert ids == tokenizer.encode(text, add_special_tokens=False)


def test_a_template_of_gpt_oss_opens_its_channel_first(tokenizer_of: Any) -> None:
    tokenizer = tokenizer_of("gptoss", "gptoss")
    assert pieces(tokenizer, "\nPo") == "<|channel|>final<|message|>\nPo<|return|>"
    thoughts = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
    assert pieces(tokenizer, "Po", "Hm.") == f"{thoughts}<|channel|>final<|message|>Po<|return|>"
    injected = ids_of(tokenizer, "Po", "Hm.<|end|>")
    assert injected.count(tokenizer.convert_tokens_to_ids("<|end|>")) == 1


@pytest.mark.parametrize(
    ("template", "arguments", "plain", "apart"),
    [
        ("qwen3", {}, "<think>\n\n</think>\n\nPo", "<think>\nHm.\n</think>\n\nPo"),
        ("qwen3", {"enable_thinking": False}, "Po", "Po"),
        ("qwen3_5_think", {}, "\n</think>\n\nPo", "Hm.\n</think>\n\nPo"),
        ("qwen3_5_nothink", {}, "Po", "Po"),
        ("deepseek_r1_distill", {}, "\n</think>\n\nPo", "Hm.\n</think>\n\nPo"),
        ("nemotron_3_nano", {}, "\n</think>\nPo", "Hm.\n</think>\nPo"),
        ("inside", {}, "\n</think>\n\nPo", "Hm.\n</think>\n\nPo"),
        ("lfm2_2_5", {}, "Po", "<think>Hm.</think>Po"),
        ("glm4moe", {}, "\n<think></think>\nPo", "\n<think>Hm.</think>\nPo"),
        ("qwen3_instruct_2507", {}, "Po", "Po"),
    ],
)
def test_thoughts_stand_in_the_templates_block(
    tokenizer_of: Any, template: str, arguments: dict[str, Any], plain: str, apart: str
) -> None:
    tokenizer = tokenizer_of("qwen3", template, **arguments)
    end = tokenizer.decode(list(turn_end_ids(tokenizer)))
    assert pieces(tokenizer, "Po") == plain + end
    assert pieces(tokenizer, "Po", "Hm.") == apart + end


@pytest.mark.parametrize(
    ("template", "text", "trained"),
    [
        ("qwen3", "<think>\nHm\n</think>\n\nPo", "<think>\nHm\n</think>\n\nPo"),
        ("qwen3", "Hm\n</think>\n\nPo", "<think>\nHm\n</think>\n\nPo"),  # of a teacher whose prompt opens the block
        ("qwen3", "<think>\nHm", "<think>\nHm"),  # cut while it thought
        ("qwen3_5_think", "Hm\n</think>\n\nPo", "Hm\n</think>\n\nPo"),
        ("qwen3_5_think", "<think>\nHm\n</think>\n\nPo", "Hm\n</think>\n\nPo"),
        ("deepseek_r1_distill", "<think>\nHm\n</think>\n\nPo", "Hm\n</think>\n\nPo"),
        ("chatml", "<think>Hm</think>Po", "<think>Hm</think>Po"),
        ("deepseekv3", "Hm</think>Po", "Hm</think>Po"),
    ],
)
def test_thoughts_in_the_text_are_trained_and_opened_once(
    tokenizer_of: Any, template: str, text: str, trained: str
) -> None:
    assert pieces(tokenizer_of("qwen3", template), text) == f"{trained}<|im_end|>"


@pytest.mark.parametrize("text", ["<think>Hm</think>Po", "Hm</think>Po", " <think>"])
def test_a_student_that_must_not_think_gets_no_thoughts(tokenizer_of: Any, text: str) -> None:
    with pytest.raises(RefusedError, match=THOUGHTS):
        ids_of(tokenizer_of("qwen3", "qwen3", enable_thinking=False), text)


def test_a_turn_may_end_with_several_tokens_but_not_with_what_follows_it(tokenizer_of: Any) -> None:
    tokenizer = tokenizer_of("command_r_plus", "cohere2")
    tokenizer.add_tokens(["<|END_RESPONSE|>"])
    assert tokenizer.convert_ids_to_tokens(list(turn_end_ids(tokenizer))) == [
        "<|END_RESPONSE|>",
        "<|END_OF_TURN_TOKEN|>",
    ]
    phi = tokenizer_of("qwen3", "phi3")
    phi.add_tokens(["<|end|>"])
    assert phi.convert_ids_to_tokens(list(turn_end_ids(phi))) == [
        "<|end|>"
    ]  # the template writes an eos_token behind it


def test_a_template_that_shows_no_answer_is_refused(tokenizer_of: Any) -> None:
    with pytest.raises(ValueError, match=r"does not (show|write)"):
        frame_of(tokenizer_of("qwen3", "smolvlm"))


# --- the ids that the teacher wrote -------------------------------------------------------------------------------
def test_ids_of_a_teacher_with_the_same_tokenizer_are_kept(tokenizer_of: Any) -> None:
    """Also where the tokenizer would cut the text in another way than the model wrote it."""
    tokenizer = tokenizer_of("qwen3", "chatml")
    odd = [tokenizer.convert_tokens_to_ids(piece) for piece in ("R", "iver", "s", "\u010a", "\u010a")]
    prompt, text = render_prompt(tokenizer, QUESTION), tokenizer.decode(odd)
    assert tokenizer.encode(text) != odd
    end = [tokenizer.eos_token_id]
    assert ids_of(tokenizer, text, token_ids=[*odd, *end], prompt_token_ids=prompt) == [*odd, *end]
    assert ids_of(tokenizer, text, token_ids=odd, prompt_token_ids=[9]) == [*odd, *end]  # cut, and asked otherwise
    shorter = text.rstrip()  # what a stop string leaves
    assert ids_of(tokenizer, shorter, token_ids=odd, prompt_token_ids=prompt) == [*tokenizer.encode(shorter), *end]


def test_control_tokens_that_a_teacher_wrote_are_not_trained(tokenizer_of: Any) -> None:
    """They are not in the text, which is what is scored and shown."""
    tokenizer = tokenizer_of("qwen3", "chatml")
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    wrote = [*tokenizer.encode("Po"), start, *tokenizer.encode(" and Elbe")]
    prompt = render_prompt(tokenizer, QUESTION)
    assert ids_of(tokenizer, "Po and Elbe", token_ids=wrote, prompt_token_ids=prompt) == [
        *tokenizer.encode("Po and Elbe"), tokenizer.eos_token_id
    ]  # fmt: skip


@pytest.mark.parametrize("thought", ["Hm.\n\nOk", ""])
def test_written_thoughts_are_kept_as_written(tokenizer_of: Any, thought: str) -> None:
    """The parser of thoughts strips white space; the ids bring it back."""
    tokenizer = tokenizer_of("qwen3", "qwen3")
    written = tokenizer.encode(f"<think>\n{thought}\n\n</think>\n\n\nPo")
    prompt = render_prompt(tokenizer, QUESTION)
    own = {"token_ids": [*written, tokenizer.eos_token_id], "prompt_token_ids": prompt}
    assert ids_of(tokenizer, "Po", thought or None, **own) == own["token_ids"]
    other = ids_of(tokenizer, "Po", "Something else", **own)  # ids that spell another response are not taken
    assert tokenizer.decode(other) == "<think>\nSomething else\n</think>\n\nPo<|im_end|>"


def test_a_tokenizer_that_begins_texts_with_a_space_adds_it_once(tokenizer_of: Any) -> None:
    tokenizer = tokenizer_of("llama2", "llama2")
    first, second = ids_of(tokenizer, "It is"), ids_of(tokenizer, " It is")
    assert first == second == tokenizer.convert_tokens_to_ids(["\u2581It", "\u2581is", "</s>"])
    own = tokenizer.convert_tokens_to_ids(["\u2581I", "t", "\u2581is"])
    assert ids_of(tokenizer, " It is", token_ids=own, prompt_token_ids=[5])[:3] == own
