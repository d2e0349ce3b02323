"""Score: every stored response once by every scorer that a pairing asks for."""

from functools import partial
from typing import Any

import pyarrow as pa

from deltaray.contracts import SCORES
from deltaray.prompts.shards import shard_name
from deltaray.recipe.study import Study
from deltaray.runtime.stream import map_units
from deltaray.score.scorers import SCORERS
from deltaray.store import Store


def missing_scores(study: Study, store: Store) -> list[dict[str, Any]]:
    """One unit per responses file that a needed scorer has not scored yet; its scores file has the same name."""
    wanted = {
        (pairing.scorer, teacher)
        for pairing in study.pairings.values()
        if pairing.scorer
        for teacher in (pairing.chosen, pairing.rejected)
    }
    units = []
    for scorer, teacher in sorted(wanted):
        done = {shard_name(path) for path in store.committed(Store.scores(scorer, teacher))}
        for path in store.committed(Store.responses(teacher)):
            if shard_name(path) not in done:
                destination = f"{Store.scores(scorer, teacher)}/{shard_name(path)}.parquet"
                kind = study.recipe.scorers[scorer].kind
                units.append({"responses": path, "kind": kind, "destination": destination})
    return units


def score(study: Study, store: Store) -> int:
    """Completes the scores; returns how many responses were scored."""
    results = map_units(missing_scores(study, store), partial(score_file, store))
    return sum(result["rows"] for result in results)


def score_file(store: Store, unit: dict[str, Any]) -> dict[str, Any]:
    """Scores one file of responses and commits the scores."""
    rows = store.read_table(unit["responses"], ["prompt_id", "sample", "text"]).to_pylist()
    shard = shard_name(unit["responses"]).rpartition("-")[0]
    prompts = store.read_table(f"{Store.prompts}/{shard}.parquet", ["prompt_id", "answer"])
    answers = dict(zip(prompts["prompt_id"].to_pylist(), prompts["answer"].to_pylist(), strict=True))
    function = SCORERS[unit["kind"]]
    scored = [
        {
            "prompt_id": row["prompt_id"],
            "sample": row["sample"],
            "score": function(row["text"], answers[row["prompt_id"]]),
        }
        for row in rows
    ]
    store.write_table(unit["destination"], pa.Table.from_pylist(scored, schema=SCORES), SCORES)
    return {"rows": len(scored)}
