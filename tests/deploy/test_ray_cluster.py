"""ray_cluster.yaml against Ray's own schema and its own preparation, without any cloud."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, Callable, Dict

import jsonschema  # type: ignore[import-untyped]
import pytest
import ray.autoscaler
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from pipelines.config.load import load_config

FILE = Path(__file__).resolve().parents[2] / "ray_cluster.yaml"
Tree = Dict[str, Any]


@pytest.fixture
def cluster() -> Tree:
    tree = yaml.safe_load(FILE.read_text())
    assert isinstance(tree, dict)
    return tree


def accept(tree: Tree) -> Tree:
    """What `ray up` does with the file before it talks to the cloud."""
    assert ray.autoscaler.__file__ is not None
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(tree, schema)
    prepared: Tree = prepare_config(copy.deepcopy(tree))
    validate_config(prepared)
    return prepared


def test_ray_accepts_the_file_and_changes_nothing_in_it(cluster: Tree) -> None:
    prepared = accept(cluster)
    assert {key: prepared[key] for key in cluster if key != "available_node_types"} == {
        key: cluster[key] for key in cluster if key != "available_node_types"
    }
    for name, kind in cluster["available_node_types"].items():
        assert prepared["available_node_types"][name] | kind == prepared["available_node_types"][name]


def move(tree: Tree, old: str, new: str) -> None:
    tree[new] = tree.pop(old)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: move(t, "max_workers", "max_wokers"), "max_wokers"),
        (lambda t: move(t["docker"], "run_options", "run_option"), "run_option"),
        (lambda t: move(t["available_node_types"]["pool"], "resources", "resource"), "resource"),
        (lambda t: t["available_node_types"]["pool"]["resources"].update(consolidation=0.5), "0.5"),
        (lambda t: t.update(head_node_type="chief"), "head_node_type"),
        (lambda t: t["available_node_types"]["pool"].update(min_workers=9), "max_workers"),
    ],
    ids=["key", "docker key", "node key", "half a resource", "no such head", "more than the cluster may have"],
)
def test_a_mistake_is_refused(cluster: Tree, spoil: Callable[[Tree], None], message: str) -> None:
    spoil(cluster)
    with pytest.raises((jsonschema.ValidationError, ValueError), match=message):
        accept(cluster)


def test_node_types_offer_what_the_configuration_asks_for(cluster: Tree) -> None:
    kinds = cluster["available_node_types"]
    cfg = load_config("default", ["ray.learner_resource=online", "ray.pool_resource=consolidation"])
    bundle = cfg.ray.pool_bundle(gpu=True)
    assert bundle["consolidation"] == 1.0
    assert kinds["pool"]["resources"]["consolidation"] >= cfg.pool.ranks
    assert kinds[cluster["head_node_type"]]["resources"]["online"] == 1
    assert not set(kinds[cluster["head_node_type"]]["resources"]) & set(kinds["pool"]["resources"])


def test_the_pool_may_shrink_to_nothing(cluster: Tree) -> None:
    kinds = cluster["available_node_types"]
    assert kinds["pool"]["min_workers"] == 0
    assert cluster["max_workers"] >= sum(kind.get("max_workers", 0) for kind in kinds.values())


def test_containers_have_shared_memory_descriptors_storage_and_a_locked_door(cluster: Tree) -> None:
    options = " ".join(cluster["docker"]["run_options"])
    for needed in ("--shm-size=", "--ulimit nofile=", "--volume /mnt/circadian:", "--env RAY_AUTH_MODE=token"):
        assert needed in options
    start = " ".join(cluster["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in start
    assert "--autoscaling-config=" in start
