"""Cluster files against the official schemas."""

from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from jsonschema import Draft7Validator
from ruamel.yaml import YAML

SCHEMA = ROOT.parent / "shared" / "kuberay-crds" / "ray.io_rayclusters.yaml"
FILES = sorted((ROOT / "cluster" / "kuberay").glob("*.yaml"))


def strict(node: Any) -> Any:
    """Refuses unknown fields, as the API server does."""
    if isinstance(node, dict):
        if "properties" in node and not node.get("x-kubernetes-preserve-unknown-fields"):
            node.setdefault("additionalProperties", False)
        for child in node.values():
            strict(child)
    elif isinstance(node, list):
        for child in node:
            strict(child)
    return node


@pytest.mark.skipif(not SCHEMA.exists(), reason="the KubeRay schemas are not beside the checkout")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_kuberay_files_keep_the_official_schema(path: Path) -> None:
    yaml = YAML(typ="safe")
    versions = yaml.load(SCHEMA)["spec"]["versions"]
    schema = strict(next(item["schema"]["openAPIV3Schema"] for item in versions if item["name"] == "v1"))
    document = yaml.load(path)
    assert not [error.message for error in Draft7Validator(schema).iter_errors(document)]
    document["spec"]["headGroupSpec"]["nonsense"] = 1
    assert list(Draft7Validator(schema).iter_errors(document))  # the check would notice
