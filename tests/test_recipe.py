"""The recipe: every refusal names file, line, key and the fix; overrides; seeds and grids written out."""

from pathlib import Path

import pytest

from deltaray.errors import UserError
from deltaray.recipe import Recipe, dump_recipe, expand, load_recipe, recipe_folder
from deltaray.recipe.filters import Correctness, LengthGap
from deltaray.recipe.renamed import RENAMED
from deltaray.study.pipeline import Pipeline
from deltaray.train.reference.stage import references_needed

GOOD = """\
name: study
out: runs/study
prompts: {path: prompts.jsonl}
teachers:
  weak: {model: models/weak}
  weaker:
    model: models/weaker
    sampling:
      temperature: 0.7
scorers:
  exact: {kind: exact_match}
pairings:
  delta: {chosen: weak, rejected: weaker}
student: {model: models/student}
training:
  runs:
    delta: {pairing: delta, learning_rate: 1e-5}
evaluation:
  tasks:
    held_out: {path: held_out.jsonl}
  selection:
    validation: {path: validation.jsonl}
  claims: ["delta > student"]
"""


def load(tmp_path: Path, text: str = GOOD, overrides: list[str] | None = None) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return load_recipe(path, overrides)


def refusal(tmp_path: Path, text: str = GOOD, overrides: list[str] | None = None) -> str:
    with pytest.raises(UserError) as error:
        load(tmp_path, text, overrides)
    return str(error.value).replace(f"{tmp_path}/", "")


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("temperature", "temprature", "recipe.yaml:9: teachers.weaker.sampling.temprature: unknown key; did you mean"),
        ("0.7", "warm", "recipe.yaml:9: teachers.weaker.sampling.temperature: 'warm': write a number"),
        ("0.7", "-1", "recipe.yaml:9: teachers.weaker.sampling.temperature: -1: write greater than or equal to 0"),
        ("rejected: weaker", "rejected: weak", "recipe.yaml:13: pairings.delta.rejected: chosen and rejected are both"),
        (
            "chosen: weak,",
            "chosen: weka,",
            "recipe.yaml:13: pairings.delta.chosen: there is no teacher 'weka'; did you",
        ),
        ("learning_rate: 1e-5", "loss: ppo", "recipe.yaml:17: training.runs.delta.loss: 'ppo' is not allowed; write"),
        (
            "learning_rate: 1e-5",
            "loss: sft, beta: 5",
            "recipe.yaml:17: training.runs.delta.beta: the loss 'sft' does not read it; leave it out, or write a loss",
        ),
        (
            "learning_rate: 1e-5",
            "simpo_gamma: 1",
            "training.runs.delta.simpo_gamma: the loss 'dpo_norm' does not read it; leave it out, or write a loss that "
            "does: simpo",
        ),
        ("learning_rate: 1e-5", "loss: robust, label_smoothing: 0.5", "label_smoothing: 0.5: write less than 0.5"),
        ("pairing: delta,", "pairing: delte,", "recipe.yaml:17: training.runs.delta.pairing: there is no pairing"),
        ("delta > student", "delta >> x", "recipe.yaml:23: evaluation.claims.0:"),
        ("delta > student", "delta > studnet", "recipe.yaml:23: evaluation.claims.0: there is no model 'studnet'; did"),
        ("out: runs/study\n", "", "recipe.yaml:1: out: is missing"),
        ("name: study", "name: a/b", "recipe.yaml:1: name: 'a/b': use letters"),
        ("  weaker:", "  weaker", "not YAML"),
    ],
)
def test_refusals_name_file_line_key_and_mend(tmp_path: Path, before: str, after: str, message: str) -> None:
    assert before in GOOD
    assert message in refusal(tmp_path, GOOD.replace(before, after, 1))


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    text = GOOD.replace("0.7", "hot").replace("1e-5", "fast")
    assert len(refusal(tmp_path, text).splitlines()) == 2


def test_missing_file_and_wrong_encoding(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such recipe"):
        load_recipe(tmp_path / "nothing.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    with pytest.raises(UserError, match="not UTF-8"):
        load_recipe(tmp_path / "latin.yaml")


def test_overrides(tmp_path: Path) -> None:
    recipe = load(
        tmp_path, overrides=["training.runs.delta.beta=0.5", "seeds=[3, 4]", "evaluation.claims.0=delta > weak"]
    )
    assert recipe.training is not None and recipe.training.runs["delta"].beta == 0.5
    assert recipe.seeds == [3, 4]
    assert recipe.evaluation is not None and recipe.evaluation.claims == ["delta > weak"]


def test_a_run_holds_the_defaults_of_its_loss_and_no_other_settings(tmp_path: Path) -> None:
    recipe = load(tmp_path, overrides=["training.runs.delta.loss=simpo", "training.runs.delta.beta=null"])
    run = recipe.training.runs["delta"] if recipe.training else None
    assert run is not None and (run.beta, run.simpo_gamma, run.label_smoothing) == (2.0, 0.5, 0.0)
    assert run.desirable_weight is None and run.undesirable_weight is None
    assert load(tmp_path, dump_recipe(recipe)) == recipe


def test_a_bad_override_is_named_as_such(tmp_path: Path) -> None:
    assert refusal(tmp_path, overrides=["training.worker=2"]).startswith("--set training.worker: unknown key; did you")
    assert refusal(tmp_path, overrides=["training"]).startswith("--set training: write key.path=value")
    assert "is not a section" in refusal(tmp_path, overrides=["name.first=x"])


def test_the_resolved_recipe_says_the_same(tmp_path: Path) -> None:
    recipe = load(tmp_path)
    assert load(tmp_path, dump_recipe(recipe)) == recipe
    assert "max_grad_norm: 1.0" in dump_recipe(recipe)  # every default is written out


def test_one_seed_keeps_names(tmp_path: Path) -> None:
    study = expand(load(tmp_path))
    assert list(study.runs) == ["delta"] and list(study.students) == ["student"]
    assert list(study.evaluated) == ["student", "delta", "weak", "weaker"]


def test_several_seeds_copy_only_what_depends_on_them(tmp_path: Path) -> None:
    text = GOOD.replace("models/student", "'models/{seed}/student'").replace("models/weaker", "'models/{seed}/weaker'")
    study = expand(load(tmp_path, text, ["seeds=[1,2]"]))
    assert list(study.teachers) == ["weak", "weaker-seed1", "weaker-seed2"]
    assert study.pairings["delta-seed2"].rejected == "weaker-seed2"
    assert study.pairings["delta-seed2"].chosen == "weak"
    assert study.runs["delta-seed2"].student == "student-seed2"
    assert study.students["student-seed1"].model == str(Path("models/1/student").absolute())
    assert [study.teachers[f"weaker-seed{k}"].sampling.seed for k in (1, 2)] == [1, 2]


def test_a_grid_becomes_candidates(tmp_path: Path) -> None:
    study = expand(load(tmp_path, overrides=["training.runs.delta.learning_rate=[1e-5,1e-4]"]))
    assert study.grid("delta") == ["delta-lr1e-05", "delta-lr0.0001"]
    assert [study.runs[name].settings.learning_rate for name in study.grid("delta")] == [1e-5, 1e-4]
    assert "delta" in study.evaluated and "delta-lr1e-05" not in study.evaluated


def test_a_grid_needs_tasks_to_choose_on(tmp_path: Path) -> None:
    overrides = ["training.runs.delta.learning_rate=[1e-5,1e-4]", "evaluation.selection={}"]
    assert "a grid needs `evaluation.selection`" in refusal(tmp_path, overrides=overrides)


@pytest.mark.parametrize("path", sorted(recipe_folder().rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_is_parsed_and_planned(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "unused")
    recipe = load_recipe(path, [f"out={tmp_path / 'out'}", "cluster.cpus=256", "cluster.gpus=64"])
    items, capacity = Pipeline(recipe).plan()
    study = expand(recipe)
    planned = {stage: {item.name for item in items if item.stage == stage} for stage in ("generate", "pair", "train")}
    assert planned == {"generate": set(study.paired_teachers()), "pair": set(study.pairings), "train": set(study.runs)}
    assert capacity.gpus == 64 and not (tmp_path / "out").exists()


def test_the_ladder_pairs_seven_teachers_21_times() -> None:
    study = expand(load_recipe(recipe_folder() / "qwen2.5-ladder.yaml"))
    sizes = list(study.teachers)
    assert len(sizes) == 7 and len(study.pairings) == len(study.runs) == 21
    assert all(sizes.index(pairing.chosen) > sizes.index(pairing.rejected) for pairing in study.pairings.values())
    rates = {name: (run.settings.learning_rate, run.settings.beta) for name, run in study.runs.items()}
    assert rates["1.5b-over-0.5b"] == (1e-7, 5) and rates["72b-over-7b"] == (1e-7, 10)
    references = references_needed(study, study.runs.values())
    assert {student: sorted(teachers) for student, teachers in references.items()} == {"student": sorted(sizes)}


@pytest.mark.parametrize(
    ("name", "pairs", "rate", "length", "workers"),
    [
        ("dolci-think-7b", 150_000, 8e-8, 16384, 32),
        ("dolci-think-32b", 200_000, 7e-8, 8192, 64),
        ("dolci-think-seed", 150_000, 8e-8, 16384, 32),
        ("dolci-instruct-7b", 255_000, 1e-6, 16384, 16),
        ("dolci-instruct-32b", 255_000, 1e-6, 8192, 64),
    ],
)
def test_dolci_has_the_numbers_of_table_48(name: str, pairs: int, rate: float, length: int, workers: int) -> None:
    """OLMo 3 (arXiv 2512.13961); of Instruct's 260 thousand pairs 5 thousand are GPT-4o's and not made here."""
    study = expand(load_recipe(recipe_folder() / f"{name}.yaml"))
    [run] = study.runs.values()
    settings = run.settings
    assert (settings.loss, settings.beta, settings.batch_size, settings.epochs) == ("dpo_norm", 5, 128, 1)
    assert (settings.schedule, settings.warmup_ratio, settings.weight_decay) == ("linear", 0.1, 0)
    assert study.recipe.training is not None and run.pairings == tuple(study.pairings)
    layout = study.students["student"].max_length, study.recipe.training.workers
    drawn = sum(pairing.limit or 0 for pairing in study.pairings.values())
    assert (drawn, settings.learning_rate, *layout) == (pairs, rate, length, workers)


@pytest.mark.parametrize("size", ["7b", "32b"])
def test_dolci_instruct_draws_two_weak_of_four_and_controls_lengths_on_chat(size: str) -> None:
    """OLMo 3, sections on the delta-aware pipeline, on length control and on several turns."""
    study = expand(load_recipe(recipe_folder() / f"dolci-instruct-{size}.yaml"))
    judged, heuristic = study.pairings["judged"], study.pairings["heuristic"]
    assert (heuristic.chosen, heuristic.rejected) == ("qwen3-32b", "qwen3-0.6b")
    assert judged.draw is not None and (judged.draw.of, judged.draw.weak) == (4, 2)
    assert len(judged.draw.weak_teachers) == 7 and judged.policy == "best_over_worst"
    for pairing in (judged, heuristic):
        [gap] = [item for item in pairing.filters if isinstance(item, LengthGap)]
        assert gap.max_tokens == 100 and gap.sources and pairing.max_length_gap is None
    assert study.extensions is not None and study.extensions.max_tokens == 2048
    shares = {name: kind.share / 0.005 * 2500 for name, kind in study.extensions.kinds.items()}
    assert shares == pytest.approx({"self_talk": 2500, "related_query": 1250, "paraphrase": 938, "repeat": 312})
    assert study.pairings["turns"].sources == [f"*/{kind}" for kind in shares]
    qwen3 = [it for name, it in study.teachers.items() if name.startswith("qwen3")]
    assert all(it.chat_template_arguments == {"enable_thinking": False} for it in qwen3) and len(qwen3) == 4


def test_the_seeds_form_of_dolci_think_keeps_right_over_wrong_or_incomplete() -> None:
    pairing = expand(load_recipe(recipe_folder() / "dolci-think-seed.yaml")).pairings["think"]
    assert (pairing.chosen, pairing.rejected) == ("sft", "base") and not pairing.drop_truncated
    [item] = [item for item in pairing.filters if isinstance(item, Correctness)]
    assert (item.chosen, item.rejected) == ("right", "wrong_or_truncated")
    published = expand(load_recipe(recipe_folder() / "dolci-think-7b.yaml")).pairings["think"]
    assert (published.chosen, published.rejected) == ("qwen3-32b", "qwen3-0.6b")
    assert [(item.kind, item.side) for item in published.filters] == [("identity", "chosen")]


@pytest.mark.parametrize(("name", "rate"), [("ultrafeedback-weak", 5e-7), ("ultrafeedback-weak-8b", 7e-8)])
def test_ultrafeedback_weak_has_the_published_settings_of_its_student(name: str, rate: float) -> None:
    """The authors' configurations exp_ultrafeedback_weak (arXiv 2507.06187, section 2)."""
    study = expand(load_recipe(recipe_folder() / f"{name}.yaml"))
    delta, sft = (study.runs[run].settings for run in ("delta", "sft"))
    assert (delta.loss, delta.beta, delta.learning_rate, delta.batch_size, delta.epochs) == ("dpo_norm", 5, rate, 32, 1)
    assert (sft.loss, sft.learning_rate, sft.batch_size, sft.epochs) == ("sft", 1e-7, 256, 1)
    assert study.recipe.preferences is not None and study.students["student"].max_length == 2048


def test_safety_deltas_refuse_what_is_harmful_and_help_with_the_rest() -> None:
    study = expand(load_recipe(recipe_folder() / "safety-deltas.yaml"))
    pairing = study.pairings["safety"]
    assert study.scorers["behaves"].kind == "refusal" and pairing.scorer == "behaves" and pairing.max_per_source
    [item] = pairing.filters
    assert isinstance(item, Correctness) and (item.chosen, item.rejected) == ("right", "wrong")


@pytest.mark.parametrize(
    ("name", "loss", "path", "pairs"),
    [
        ("pda-reasoning", "dpo", "openai/gsm8k", ["llama-3b > llama-1b", "qwen3-4b > qwen3-1.7b", "r1-7b > r1-1.5b"]),
        (
            "pda-agentic",
            "orpo",
            "dgslibisey/MuSiQue",
            ["llama-3b > llama-1b", "ace-8b > ace-1.5b", "qwen3-4b > qwen3-1.7b", "search-r1-7b > search-r1-3b"],
        ),
    ],
)
def test_pda_has_the_settings_of_the_paper(name: str, loss: str, path: str, pairs: list[str]) -> None:
    """arXiv 2606.00357, section 4: LoRA, loss, teacher pairs, merges of 2 to all deltas."""
    study = expand(load_recipe(recipe_folder() / f"{name}.yaml"))
    recipe = study.recipe
    assert recipe.prompts is not None and recipe.prompts.path == path and recipe.training is not None
    assert [f"{pairing.chosen} > {pairing.rejected}" for pairing in study.pairings.values()] == pairs
    deltas = [study.runs[delta] for delta in study.deltas()]
    assert [run.pairings for run in deltas] == [(pairing,) for pairing in study.pairings]
    for run in deltas:
        settings, lora = run.settings, run.settings.lora
        assert (settings.loss, settings.beta, settings.learning_rate, settings.batch_size) == (loss, 0.1, 1e-5, 128)
        assert (settings.schedule, settings.warmup_ratio, settings.epochs) == ("cosine", 0.1, 1)
        assert lora is not None and (lora.rank, lora.alpha, lora.dropout, len(lora.targets)) == (64, 128, 0.05, 7)
    student = study.students["student"]
    assert (student.model, student.max_length, recipe.training.workers) == ("Qwen/Qwen3-8B", 8192, 4)
    assert study.runs["joint"].pairings == tuple(study.pairings)
    counts = {merge.count for merge in study.merges.values() if merge.method == "gam"}
    assert counts == set(range(2, len(pairs) + 1))
    assert {merge.method for merge in study.merges.values()} == {"mean", "ties", "knots", "gam"}


@pytest.mark.parametrize(("key", "name"), RENAMED.items())
def test_keys_of_version_0_1_are_refused_with_their_new_name(key: str, name: str) -> None:
    with pytest.raises(UserError, match=f"{key}: unknown key; it is called '{name}' now"):
        load_recipe(recipe_folder() / "miniature.yaml", [f"training.{key}=1"])
