"""Methods by name: strategies, opponents, and names that change keys."""

from __future__ import annotations

from typing import Any, Callable, Dict

import pytest

from pipelines.compare.methods import ALIASES, METHODS, head_of, is_changed, lends_step, lr_of, method_of, names
from pipelines.compare.options import Options
from pipelines.compare.page import heading, tuned
from pipelines.config.load import flatten, load_config, strategies


def test_every_strategy_and_every_opponent_of_the_field_is_there() -> None:
    opponents = {
        "joint",
        "replay_5",
        "replay_25",
        "replay_50",
        "replay_raw",
        "naive_raw",
        "der",
        "mer",
        "ewc",
        "lwf",
        "lora",
    }
    assert set(strategies()) | opponents <= set(METHODS)
    assert {lends_step(name) for name in METHODS if name.startswith(("no_", "cold_"))} == {"circadian"}


def test_aliases_stand_for_keys_that_there_are() -> None:
    known = set(flatten(vars_of(load_config("smoke"))))
    assert set(ALIASES.values()) <= known


def vars_of(cfg: Any) -> Dict[str, Any]:
    from dataclasses import asdict

    return asdict(cfg)


def test_methods_are_named_singly_in_families_and_all_together() -> None:
    assert list(names("circadian,replay_*")) == ["circadian", *(n for n in METHODS if n.startswith("replay_"))]
    assert list(names("all")) == list(METHODS)


def test_a_name_may_change_keys_of_its_method_and_settings_of_its_hook() -> None:
    found = method_of("replay_50:lr=2e-3:balance=1:sleep.warmup=5")
    assert found.strategy == "replay" and found.overrides() == [
        "strategy=replay", "wake.replay=0.5", "sleep.optimizer.lr=2e-3", "sleep.balance=1", "sleep.warmup=5"
    ]  # fmt: skip
    assert lr_of("replay_50:lr=2e-3") == 2e-3 and lr_of("replay_50") is None
    assert head_of("ewc:hook.strength=2") == "ewc" == lends_step("ewc:hook.strength=2") and is_changed(
        "ewc:hook.strength=2"
    )
    assert method_of("ewc:hook.strength=2").build_hook().strength == 2.0  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("repaly", r"'repaly' is unknown; did you mean 'replay'\? use all, or some of"),
        ("nope_*", r"'nope_\*' is the beginning of no name"),
        ("replay:lr", "'lr' in 'replay:lr' is no change; write KEY=VALUE"),
        ("replay:lr=1:lr=2", "sets 'lr' twice"),
        ("replay:lr=0", "sets lr to '0', which is no positive number"),
        ("replay:lr=fast", "sets lr to 'fast', which is no positive number"),
        ("replay:hook.strength=1", r"hook\.strength is unknown; none has no settings"),
        ("mer:hook.step=2", r"hook\.step=2\.0 must lie between 0 and 1"),
    ],
)
def test_what_cannot_be_is_named(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(names(name))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"regimes": ("cap7",)}, "--regimes='cap7' is unknown; use one of whole, cap5, cap1"),
        ({"clock": "real"}, "--clock='real' is unknown; use one of fixed, speeds"),
        ({"grid": ()}, r"--grid \(\) must hold step sizes above 0"),
        ({"epochs": 0.1}, "--epochs=0.1 must be at least 0.5"),
        ({"seeds": (1000,)}, r"--seeds \(1000,\) contain the tuning seed 1000"),
        ({"tuned_in": "half"}, "--regimes='half' is unknown"),
    ],
)
def test_wrong_options_are_named(values: Dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options(**values)


def test_a_grid_of_one_is_no_question() -> None:
    assert Options(grid=(1e-3,)).most == 1 and Options(grid=(1e-3, 2e-3)).most == 5
    assert Options(methods=("replay:lr=1e-3",), seeds=(1000,)).seeds == (1000,), "nothing is tuned"


def test_the_page_says_who_stands_at_an_edge() -> None:
    entry: Callable[[str], Dict[str, Any]] = lambda edge: {"tried": [[1e-3, 3.0]], "edge": edge, "lr": 1e-3}  # noqa: E731
    told = {"grid": [1e-3], "most": 5, "share": 0.5, "regime": "cap5", "chosen": {"replay": entry("highest")}}
    assert "at an edge all the same: replay (highest)" in tuned(told) and "with this store (cap5)" in tuned(told)
    assert "edge all" not in tuned({**told, "chosen": {"replay": entry("")}})
    assert heading("whole") == "Store: the whole history" and heading("cap5") == "Store: 5 % of the stream's bytes"
