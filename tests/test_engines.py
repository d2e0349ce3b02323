"""DeepSpeed's layouts one by one, in one process of their own: what they compute, and that a restart changes no bit."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from s3_server import serve

LORA = {"rank": 4, "alpha": 8, "dropout": 0.1}
CASES = {
    "ZeRO 1": ({"zero_stage": 1}, {}),
    "ZeRO 2, offloaded optimizer": ({"zero_stage": 2, "offload": "optimizer"}, {}),
    "ZeRO 2, bfloat16": ({"zero_stage": 2, "dtype": "bfloat16"}, {}),
    "ZeRO 3, offloaded, checkpointing": ({"offload": "all", "gradient_checkpointing": True}, {}),
    "ZeRO 3, bfloat16": ({"dtype": "bfloat16"}, {}),
    "ZeRO 3, LoRA with dropout": ({}, {"lora": LORA}),
    "ZeRO 2, LoRA with dropout, bfloat16": ({"zero_stage": 2, "dtype": "bfloat16"}, {"lora": LORA}),
    "ZeRO 3, QLoRA": ({"quantize": "nf4", "gradient_checkpointing": True}, {"lora": LORA}),
    "ZeRO 3, kto": ({}, {"loss": "kto"}),
    "ZeRO 1, capped logits": ({"zero_stage": 1, "capped": True}, {}),
    "ZeRO 3, capped logits": ({"capped": True}, {}),
    "ZeRO 1, checkpoints on S3": ({"zero_stage": 1, "store": "s3://"}, {}),
}
if os.environ.get("DELTARAY_TEST_DISK"):  # DeepSpeed's disk access takes minutes to compile, and needs libaio
    CASES["ZeRO 3, offloaded to a disk"] = ({"offload_folder": "disk"}, {})


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    script, folder = Path(__file__).parent / "engine_matrix.py", tmp_path_factory.mktemp("engines")
    keys = {"AWS_ACCESS_KEY_ID": "name", "AWS_SECRET_ACCESS_KEY": "word", "AWS_EC2_METADATA_DISABLED": "true"}
    with serve() as server:
        server.ask("PUT", "bucket")
        cases = json.dumps(list(CASES.values())).replace('"s3://"', json.dumps(server.out("bucket")))
        command = [sys.executable, str(script), str(folder), cases]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | keys)
        assert any("checkpoints" in key for key in server.keys("bucket"))
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return dict(zip(CASES, lines, strict=True))


@pytest.mark.parametrize("case", list(CASES))
def test_a_restart_changes_no_bit(results, case):
    found = results[case]
    assert found["same"] and found["losses_with_restart"] == found["losses"]
    assert found["left_out"] == []
    assert found["moved"] > 1e-3
    assert found["names"] == (28 if "LoRA" in case else 25 if "capped" in case else 21)


@pytest.mark.parametrize("case", [case for case in CASES if "bfloat16" not in case])
def test_answers_in_the_middle_of_training_are_those_of_the_weights(results, case):
    """And asking changes nothing: the run with a restart was not asked (`test_a_restart_changes_no_bit`)."""
    assert results[case]["answers"] == results[case]["plain_answers"]
    assert len({tuple(answer) for answer in results[case]["answers"]}) > 1


@pytest.mark.parametrize("case", list(CASES))
def test_a_checkpoint_that_meets_a_full_disk_does_not_exist(results, case):
    """The one before it is resumed from (`test_a_restart_changes_no_bit`)."""
    assert results[case]["refused"] == "no space left for manifest.json"


@pytest.mark.parametrize("case", [case for case in CASES if "kto" not in case])
def test_every_layout_starts_at_ln_2(results, case):
    close = 2e-3 if "bfloat16" in case else 2e-6
    assert results[case]["losses"][0] == pytest.approx(math.log(2), abs=close)


def test_kto_starts_at_one_half(results):
    assert results["ZeRO 3, kto"]["losses"][0] == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("case", [case for case in CASES if "offloaded" in case])
def test_layouts_compute_the_same(results, case):
    for what in ("losses", "norms"):
        assert results[case][what] == pytest.approx(results["ZeRO 1"][what], rel=1e-4)


def test_a_head_of_the_models_own_computes_the_same_when_it_is_partitioned(results):
    """The whole loss and its gradients go through Gemma 2's soft cap and its tied embeddings."""
    for what in ("losses", "norms"):
        partitioned, whole = (results[f"ZeRO {stage}, capped logits"][what] for stage in (3, 1))
        assert partitioned == pytest.approx(whole, rel=1e-4)


@pytest.mark.skipif("ZeRO 3, offloaded to a disk" not in CASES, reason="DELTARAY_TEST_DISK=1 runs it")
def test_the_optimizers_state_lies_on_the_disk_and_is_gone_in_the_end(results):
    found = results["ZeRO 3, offloaded to a disk"]
    assert found["on_disk"] > 3 << 20 and found["left_on_disk"] == 0
