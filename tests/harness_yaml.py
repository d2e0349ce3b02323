"""Tasks of lm-evaluation-harness over the miniature's additions: one is written, two are chosen and form a group."""

import json
from pathlib import Path

WRITTEN = """\
task: add_written
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}, train: {shots}}}}}
test_split: test
fewshot_split: train
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
fewshot_delimiter: "\\n"
generation_kwargs: {{until: ["\\n"], do_sample: false, max_gen_toks: 12}}
filter_list:
  - name: whole
    filter: [{{function: take_first}}]
  - name: digits
    filter: [{{function: regex, regex_pattern: "^(\\\\d\\\\d\\\\d+)$"}}, {{function: take_first}}]
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
CHOSEN = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{place}}}}"
doc_to_choice: "{{{{{column}}}}}"
target_delimiter: ""
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
GROUP = """\
group: add_chosen
task: [add_near, add_far]
aggregate_metric_list:
  - {{metric: acc_norm, weight_by_size: true}}
metadata: {{version: 1.0}}
"""


def write_tasks(folder: Path, problems: list[dict[str, str]], shots: list[dict[str, str]]) -> str:
    """A folder with the tasks and their data."""
    folder.mkdir(parents=True)
    rows = [_row(number, problem) for number, problem in enumerate(problems)]
    data, examples = folder / "data.jsonl", folder / "shots.jsonl"
    for path, content in ((data, rows), (examples, [_row(0, shot) for shot in shots])):
        path.write_text("".join(f"{json.dumps(row)}\n" for row in content))
    (folder / "written.yaml").write_text(WRITTEN.format(data=data, shots=examples))
    for name in ("near", "far"):
        (folder / f"{name}.yaml").write_text(CHOSEN.format(name=f"add_{name}", data=data, column=name))
    (folder / "group.yaml").write_text(GROUP.format())
    return str(folder)


def _row(number: int, problem: dict[str, str]) -> dict[str, object]:
    """A problem with three choices each, the right one at another place from row to row."""
    answer, place = int(problem["answer"]), number % 3
    near, far = [str(answer - 10), str(answer - 1)], ["7", str(answer) + "00"]
    for choices in (near, far):
        choices.insert(place, str(answer))
    return {"prompt": problem["prompt"], "answer": str(answer), "place": place, "near": near, "far": far}
