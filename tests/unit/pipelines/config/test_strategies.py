"""Strategies: names for keys that lie over what is shipped and under what a user gives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.config.load import differences, load_config, strategies, to_yaml, with_strategy


@pytest.mark.parametrize("preset", ["", "micro"])
@pytest.mark.parametrize("strategy", strategies())
def test_a_strategy_is_valid_at_every_size_and_is_read_back_equal(strategy: str, preset: str, tmp_path: Path) -> None:
    found = load_config("default", [f"strategy={strategy}"], preset)
    assert found.strategy == strategy
    path = tmp_path / "resolved.yaml"
    path.write_text(to_yaml(found))
    assert load_config(str(path)) == found and load_config(str(path), [f"strategy={strategy}"]) == found


def test_the_default_strategy_is_the_defaults() -> None:
    assert load_config("smoke", ["strategy=circadian"]) == load_config("smoke")
    assert {"circadian", "replay", "naive", "reading"} <= set(strategies())


def test_a_strategy_lies_over_what_is_shipped_and_under_what_a_user_gives(tmp_path: Path) -> None:
    replay = load_config("default", ["strategy=replay", "sleep.batch=4", "sleep.epochs=0", "wake.trained=2"], "micro")
    assert (replay.wake.writes, replay.wake.replay, replay.dreams.share) == ("all", 0.8, 0.0)
    assert replay.wake.batch == 2, "two sequences are read while four are trained on; the preset says eight"
    mine = tmp_path / "mine.yaml"
    mine.write_text("strategy: replay\nwake: {replay: 0.5, batch: 8}\nmodel: {dim: 6, heads: 1}\n")
    for overrides in ([], ["strategy=replay"]):
        found = load_config(str(mine), overrides)
        assert (found.wake.writes, found.wake.replay, found.wake.batch) == ("all", 0.5, 8)
    assert load_config(str(mine), ["wake.replay=0.25"]).wake.replay == 0.25
    assert load_config(str(mine), [], "micro").wake.replay == 0.5


def test_writes_are_as_large_as_the_pools_at_every_budget() -> None:
    for epochs, batch in ((0.5, 4), (1.0, 4), (2.0, 2), (3.0, 1), (4.0, 1), (9.0, 1)):
        found = load_config("default", ["strategy=replay", f"sleep.epochs={epochs}"], "micro")
        assert found.wake.batch == batch


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["strategy=replya"], r"strategy='replya' is unknown; did you mean 'replay'\? use one of circadian"),
        (["strategy=xyz"], "strategy='xyz' is unknown; use one of circadian, cold_rounds"),
        (["wake.batch=0"], r"wake\.batch=0 follows sleep\.batch only where wake\.writes=all; wake\.writes=fast needs"),
        (["strategy.wake=1"], "strategy is a single value"),
    ],
)
def test_what_cannot_be_is_named(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config("smoke", overrides)


def test_a_file_of_another_strategy_is_not_half_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "resolved.yaml"
    path.write_text(to_yaml(load_config("smoke")))
    with pytest.raises(ValueError, match=r"strategy=replay on the command line, but .* says strategy: circadian"):
        load_config(str(path), ["strategy=replay"])


@pytest.mark.parametrize("name", strategies())
def test_another_strategy_over_a_resolved_configuration_is_that_strategy(name: str) -> None:
    """As if it had been asked for at once, whichever strategy lay there before."""
    wanted = load_config("smoke", [f"strategy={name}", "sleep.epochs=2"])
    for before in ("circadian", "replay", "no_balance"):
        found = with_strategy(load_config("smoke", [f"strategy={before}"]), name, {"sleep.epochs": 2.0})
        if before != "replay" or name in ("replay", "naive"):  # which took the place of the file's wake.batch
            assert found == wanted, before
    assert with_strategy(wanted, name, {}) == wanted


def test_changes_lie_over_the_strategy_and_are_checked() -> None:
    cfg = load_config("smoke", ["levels.fast.optimizer.lr=0.5", "sleep.max_steps=7"])
    found = with_strategy(cfg, "replay", {"wake.replay": 0.25, "sleep.optimizer.lr": 0.125, "when.policies": []})
    assert (found.wake.replay, found.sleep.optimizer.lr, found.when.policies) == (0.25, 0.125, [])
    assert (found.levels, found.sleep.max_steps) == (cfg.levels, 7), "what nobody changes stays"
    for name, changes, message in (
        ("replya", {}, "did you mean 'replay'"),
        ("replay", {"wake.repaly": 1}, r"unknown key 'wake\.repaly'; did you mean 'wake\.replay'"),
        ("replay", {"wake.replay": 2.0}, r"wake\.replay=2\.0 must lie between 0 and 1"),
        ("replay", {"wake.replay": "much"}, r"wake\.replay: .*'much'"),
    ):
        with pytest.raises(ValueError, match=message):
            with_strategy(cfg, name, changes)


@pytest.mark.parametrize(
    ("overrides", "trains"),
    [
        ([], True),
        (["stream.path=/texts"], False),
        (["stream.path=/texts", "control.enabled=true"], True),
        (["control.enabled=false"], False),
        (["control.enabled=False"], False),
        (["control.strategies=[]"], False),
    ],
)
def test_controls_are_for_shipped_text_unless_asked_for(overrides: list[str], trains: bool, tmp_path: Path) -> None:
    cfg = load_config("default", overrides)
    assert cfg.trains_controls is trains
    (tmp_path / "resolved.yaml").write_text(to_yaml(cfg))
    assert load_config(str(tmp_path / "resolved.yaml")) == cfg
    mine = tmp_path / "mine.yaml"
    for word in ("true", "false"):
        mine.write_text(f"control: {{enabled: {word}}}\n")
        assert load_config(str(mine)).control.enabled == word


def test_the_grid_of_a_control_spans_the_step_size_of_the_base() -> None:
    spanned = load_config("default", ["base.lr=0.004", "control.learning_rates=[]"])
    assert spanned.control.grid(0.004) == [0.002, 0.004, 0.008]
    assert load_config("default", ["control.learning_rates=[0.2,0.1]"]).control.grid(0.004) == [0.1, 0.2]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["control.enabled=maybe"], r"control\.enabled='maybe' is unknown; use one of auto, true, false"),
        (["control.strategies=[replay,niave]"], r"control\.strategies: .*'niave' is unknown; did you mean 'naive'"),
        (["control.strategies=[naive,naive]"], "names 'naive' twice"),
        (["control.enabled=true", "control.strategies=[]"], r"control\.strategies is empty"),
        (["control.learning_rates=[0.1,0]"], r"control\.learning_rates has 0; give step sizes above 0"),
        (
            ["control.learning_rates=[]", "control.most=2"],
            r"control\.most=2 is less than the 3 step sizes to begin with",
        ),
    ],
)
def test_controls_that_cannot_be_are_named(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config("smoke", overrides)


@pytest.mark.parametrize("name", [name for name in strategies() if name.startswith(("no_", "cold_"))])
def test_an_ablation_changes_its_section_alone(name: str) -> None:
    changed = {
        key.split(".")[0] for key, _, _ in differences(load_config("smoke"), load_config("smoke", [f"strategy={name}"]))
    }
    assert changed <= {"strategy", "sleep", "dreams"}
    assert replace(load_config("smoke", [f"strategy={name}"]), strategy="x").wake == load_config("smoke").wake
