"""The memory forecast against what torch really keeps, and its refusals."""

from __future__ import annotations

import io
from typing import Dict, List

import pytest
import torch
from rich.console import Console

from cluster.driver.forecast import activation_bytes, check, estimate, forecast, level_sizes, peak_bytes, processes
from nl_model.model import NestedLM
from nl_model.recall import Recall
from pipelines.config.load import load_config
from pipelines.config.schema import Config

VOCAB = 256
SMALL = ["model.dim=64", "model.heads=2", "model.context=32", "wake.batch=8", "ray.object_store_mb=100"]


def config(*overrides: str) -> Config:
    return load_config("default", [*SMALL, *overrides])


def kept_bytes(cfg: Config, vocab_size: int, sequences: int, awake: bool) -> int:
    """Bytes that autograd keeps for the backward pass, every storage counted once."""
    model = NestedLM(cfg.model, cfg.levels, vocab_size).reset_parameters(0)
    if awake:
        model.train_only("learner")
    constant = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: Dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    tokens = torch.randint(vocab_size, (sequences, cfg.model.context + 1), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.nll(tokens).sum().backward()
    return sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in constant)


@pytest.mark.parametrize("awake", [True, False])
@pytest.mark.parametrize(
    "overrides", [["model.blocks=4"], ["model.blocks=8"], ["model.dim=128", "levels.slow.width=768"]], ids=str
)
@pytest.mark.parametrize("vocab_size", [256, 2048])
def test_activations_are_what_autograd_keeps(overrides: List[str], vocab_size: int, awake: bool) -> None:
    cfg = config(*overrides)
    found = kept_bytes(cfg, vocab_size, 4, awake)
    assert activation_bytes(cfg, vocab_size, 4, awake) == pytest.approx(found, rel=0.05)


def test_parameters_are_counted_without_taking_memory() -> None:
    cfg = config("model.dim=8192", "levels.slow.width=65536")
    assert sum(level_sizes(cfg, VOCAB).values()) > 4_000_000_000
    small = config()
    model = NestedLM(small.model, small.levels, VOCAB)
    assert level_sizes(small, VOCAB) == model.level_sizes()
    assert estimate(small, VOCAB)["control"]["weights"] == sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_more_ranks_shard_what_the_stage_shards(stage: int) -> None:
    overrides = [f"pool.zero_stage={stage}", "sleep.batch=32", "base.batch=8", "sleep.optimizer.name=adamw"]
    two, eight = (estimate(config(*overrides, f"pool.ranks={n}"), VOCAB)["pool rank"] for n in (2, 8))
    smaller = {part for part in two if eight[part] < two[part]}
    expected = {
        0: {"activations"},
        1: {"activations", "moments", "master copy", "gradients"},
        2: {"activations", "moments", "master copy", "gradients"},
        3: {"activations", "moments", "master copy", "weights"},
    }
    assert smaller == expected[stage]
    if stage:
        assert two["moments"] == 4 * eight["moments"]


def test_sgd_keeps_half_of_what_adamw_keeps() -> None:
    adamw = estimate(config(), VOCAB)
    sgd = estimate(config("levels.fast.optimizer.name=sgd", "levels.medium.optimizer.name=sgd"), VOCAB)
    assert 2 * sgd["learner"]["moments"] == adamw["learner"]["moments"] > 0
    assert sgd["control"] == adamw["control"]


@pytest.mark.parametrize("slots", [0, 1, 4096])
def test_recall_is_counted(slots: int) -> None:
    found = estimate(config(f"wake.recall={slots}"), VOCAB)["learner"]["recall"]
    assert found == (Recall(slots).bytes if slots else 0)


def test_the_peak_is_the_fuller_of_the_two_phases() -> None:
    cfg = config("control.learning_rates=[1e-3,2e-3,3e-3]", "pool.ranks=4")
    found, counts = estimate(cfg, VOCAB), processes(cfg)
    each = {name: sum(parts.values()) for name, parts in found.items()}
    always = each["driver"] + each["experience service"] + each["tracker"] + each["ray"]
    assert peak_bytes(found, counts) == always + max(each["learner"] + 4 * each["pool rank"], 4 * each["control"])
    assert processes(config("control.enabled=false"))["control"] == 0
    assert (
        processes(config("control.strategies=[replay]", "control.learning_rates=[1e-3]", "control.most=1"))["control"]
        == 1
    )


@pytest.mark.parametrize(
    ("overrides", "process", "part", "remedy"),
    [
        (["levels.slow.width=4000000"], "pool rank", "activations", "pool.micro_batch"),
        (
            ["wake.batch=2048", "levels.fast.period=65536", "levels.medium.period=65536"],
            "learner",
            "activations",
            "wake.batch",
        ),
        (["sleep.batch=65536", "control.enabled=false"], "pool rank", "activations", "pool.micro_batch"),
        (["wake.recall=1073741824"], "learner", "recall", "wake.recall"),
        (["ray.object_store_mb=9000"], "ray", "object store", "ray.object_store_mb"),
    ],
)
def test_too_large_a_process_is_refused(overrides: List[str], process: str, part: str, remedy: str) -> None:
    cfg = config("levels.slow.period=327680", *overrides)
    found = estimate(cfg, VOCAB)
    need = sum(found[process].values())
    others = max(sum(parts.values()) for name, parts in found.items() if name != process)
    if others < need:
        check(cfg, found, need)
    with pytest.raises(ValueError, match=rf"one {process} process needs .*largest part is {part} .*{remedy}"):
        check(cfg, {process: found[process]}, need - 1)


def test_the_table_names_every_process_and_this_machine() -> None:
    cfg = config("pool.ranks=4")
    console = Console(width=160, file=io.StringIO())
    console.print(forecast(cfg, VOCAB))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for name in estimate(cfg, VOCAB):
        assert name in text
    assert "at once; this machine has" in text


def test_a_model_beyond_every_machine_is_refused_unless_it_runs_elsewhere() -> None:
    overrides = ["compute.device=cpu", "model.dim=65536", "model.heads=64", "levels.slow.width=1048576"]
    with pytest.raises(ValueError, match="this machine has"):
        forecast(config(*overrides), VOCAB)
    forecast(config(*overrides, "ray.address=auto"), VOCAB)


def test_passes_and_checkpoints_spare_activations() -> None:
    def kept(*overrides: str) -> int:
        return estimate(config("model.blocks=8", *overrides), VOCAB)["pool rank"]["activations"]

    whole = kept()
    assert kept("pool.micro_batch=1") == whole // 4, "a rank's share is 4 sequences"
    assert kept("pool.activation_checkpointing=true") < 0.7 * whole


def test_bf16_weights_take_half() -> None:
    half = ("pool.bf16_weights=true", "compute.precision=bf16")
    full, small = (estimate(config(*more), VOCAB)["pool rank"] for more in ((), half))
    for part, factor in {"weights": 2, "gradients": 2, "master copy": 1, "moments": 1}.items():
        assert full[part] == pytest.approx(factor * small[part], abs=2)
