"""Comparisons: trials are simulated runs at equal FLOPs, kept on disk, and tell the truth about themselves."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, List

import pytest
from typer.testing import CliRunner

from cluster.cli import app
from pipelines.compare.data import TrialData, configured_bytes, order_sources, stream_of_folder
from pipelines.compare.measure import curve, read_looks, read_online
from pipelines.compare.methods import method_of
from pipelines.compare.options import Options
from pipelines.compare.outcome import build_outcome
from pipelines.compare.page import page
from pipelines.compare.runner import Chosen, Comparison, read_chosen
from pipelines.compare.trial import Trial, configure, run_trial, speeds
from pipelines.compare.trials import Trials, digest
from pipelines.config.schema import Config
from pipelines.machine.actions import End
from pipelines.machine.faults import Faults
from pipelines.machine.local import LocalParts
from pipelines.machine.simulated import Simulation
from pipelines.wake.hooks import HookCosts
from pipelines.wake.writes import pool_flops, wake_flops, with_budget

Load = Callable[[Sequence[str]], Config]
ONE = Options(methods=("circadian",), seeds=(1,), orders=("A",), grid=(2e-3,), looks=4)
GATE = 1.5
"""Steps per token that the gate of a stream this short may cost beside the budget."""


@pytest.fixture
def data(load: Load) -> TrialData:
    return TrialData.open(load([]), "A")


def trial(load: Load, data: TrialData, name: str, regime: str = "whole", seed: int = 1, **more: Any) -> Trial:
    method = method_of(name)
    cfg = load(["sleep.epochs=2", *method.overrides()])
    return Trial(method, configure(cfg, method, data, regime, seed, more.pop("lr", None)), data, looks=4, **more)


def plain(result: Dict[str, Any]) -> Dict[str, Any]:
    return {key: value for key, value in result.items() if key not in ("seconds", "key")}


@pytest.mark.parametrize("name", ["circadian", "replay", "reading", "ewc", "lora", "joint"])
def test_every_method_spends_its_budget_and_is_measured_alike(
    name: str, load: Load, data: TrialData, tmp_path: Path
) -> None:
    one = trial(load, data, name)
    result = run_trial(one, Trials(tmp_path).base(one.cfg, data))
    steps = result["steps_per_token"]
    trained = steps["total"] if name == "joint" else steps["wake"]
    if one.cfg.wake.writes == "all":
        assert trained == pytest.approx(2.0, rel=0.06), "the gate alone comes on top"
    else:
        assert 2.0 * 0.94 < steps["total"] < 2.0 + GATE
    assert steps["total"] == pytest.approx(steps["wake"] + steps["sleep"])
    assert 0 < result["final_bpb"] <= result["worst_bpb"] < 12
    if name == "joint":
        assert "area_bpb" not in result
        return
    assert len({look[0] for look in result["looks"]}) == 4 and result["looks"][-1][0] == data.tokens
    assert sum(result["rounds"].values()) == len(result["rows"]) - 1 + result["rounds"]["rejected"]
    assert result["online_bpb"] > 0 and result["recalled_bpb"] > 0 and len(result["curve"]) > 4
    assert json.loads(json.dumps(result)) is not None


def test_a_trial_repeats_itself_to_the_bit_and_seeds_differ(load: Load, data: TrialData, tmp_path: Path) -> None:
    shop, found = Trials(tmp_path), []
    for seed in (1, 1, 2):
        one = trial(load, data, "circadian", seed=seed)
        found.append(plain(run_trial(one, shop.base(one.cfg, data))))
    assert found[0] == found[1] and found[0] != found[2]
    assert len(list((tmp_path / "bases").glob("*.safetensors"))) == 2, "a base per seed"


def test_bases_are_shared_by_methods_and_step_sizes(load: Load, data: TrialData, tmp_path: Path) -> None:
    shop = Trials(tmp_path)
    bases = [
        shop.base(trial(load, data, name, lr=lr).cfg, data) for name, lr in (("circadian", 1e-3), ("replay", 2e-3))
    ]
    assert len(list((tmp_path / "bases").iterdir())) == 1 and bases[0].keys() == bases[1].keys()


def test_simulated_time_may_have_releases_come_when_they_do(load: Load, data: TrialData, tmp_path: Path) -> None:
    one = trial(load, data, "circadian", clock="speeds")
    result = run_trial(one, Trials(tmp_path).base(one.cfg, data))
    assert result["rounds"]["promoted"] + result["rounds"]["rejected"] >= 2
    assert digest(one) != digest(replace(one, clock="fixed"))
    cfg = with_budget(one.cfg, 257)
    found = speeds(cfg, 257, HookCosts(), "speeds")
    period = cfg.levels["slow"].period
    learner = period * wake_flops(cfg, 257) / found.learner
    assert learner == pytest.approx(period * cfg.sleep.tokens_per_token * pool_flops(cfg, 257) / found.pool)


def test_regimes_bound_bytes_of_whatever_is_stored(load: Load, data: TrialData) -> None:
    assert configured_bytes(load([]), 2) == 3200
    held = {name: trial(load, data, name, "cap5").cfg.sleep.replay_bytes for name in ("circadian", "replay", "der")}
    assert held == {"circadian": 160, "replay": 160, "der": 160 // 33}
    assert trial(load, data, "circadian").cfg.sleep.replay_bytes == 0
    with pytest.raises(ValueError, match=r"stream\.max_source_bytes=0 configures no size"):
        configured_bytes(load(["stream.max_source_bytes=0"]), 2)


def test_what_decides_a_trial_names_its_file(load: Load, data: TrialData) -> None:
    one = trial(load, data, "circadian")
    same = [trial(load, data, "circadian"), replace(one, cfg=replace(one.cfg, strategy="x"))]
    other = [trial(load, data, name) for name in ("replay", "ewc", "ewc:hook.strength=2", "circadian:recent=0.3")]
    other += [trial(load, data, "circadian", "cap5"), trial(load, data, "circadian", seed=2)]
    other += [replace(one, data=TrialData.open(load([]), "reverse")), replace(one, looks=5)]
    assert {digest(found) for found in same} == {digest(one)}
    assert len({digest(found) for found in [one, *other]}) == 1 + len(other)


def comparison(load: Load, path: Path, **values: Any) -> tuple[Comparison, List[str]]:
    told: List[str] = []
    options = replace(ONE, **values)
    return Comparison(load, options, path, lambda what, done, planned, _: told.append(f"{done}/{planned} {what}")), told


def test_a_comparison_goes_on_where_it_was_cut_off(load: Load, tmp_path: Path) -> None:
    whole, told = comparison(load, tmp_path, methods=("naive", "replay:lr=3e-3"), orders=("reverse",))
    chosen, results = whole.run()
    assert len(results) == 2 and told[-1].startswith("2/2 ") and len(list((tmp_path / "trials").iterdir())) == 2
    assert chosen["naive"] == Chosen(2e-3) and chosen["replay:lr=3e-3"].lr == 3e-3
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "trials").iterdir()}
    again, told = comparison(load, tmp_path, methods=("naive", "replay:lr=3e-3"), orders=("reverse",))
    assert again.run()[1] == results and len(told) == 2
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "trials").iterdir()} == times
    options = replace(ONE, methods=("naive", "replay:lr=3e-3"), orders=("reverse",))
    outcome = json.loads(json.dumps(build_outcome(options, chosen, results, "circadian compare")))
    text = page(outcome)
    assert "| naive |" in text.replace("**", "") and "step sizes are those given, not tuned" in text
    assert outcome["regimes"]["whole"]["against"]["final_bpb"].keys() == {"replay:lr=3e-3"}


def test_tuning_has_a_seed_and_a_share_of_its_own_and_every_method_the_same_grid(load: Load, tmp_path: Path) -> None:
    tuned, told = comparison(load, tmp_path, methods=("naive", "naive:replay=0.2"), grid=(1e-3, 4e-3), widenings=1)
    chosen, _ = tuned.run()
    tuning = [line for line in told if "tuning" in line]
    assert len(tuning) in (2, 3) and all("seed 1000" in line for line in tuning), "the changed one takes the other's"
    assert chosen["naive"].lr == chosen["naive:replay=0.2"].lr == min(chosen["naive"].tried, key=lambda t: t[1])[0]
    assert chosen["naive"].edge in ("lowest", "highest"), "two step sizes, and one beyond"
    options = replace(tuned.options)
    outcome = build_outcome(options, chosen, {**tuned.run()[1]}, "x")
    assert read_chosen(json.loads(json.dumps(outcome))) == {"naive": chosen["naive"]}
    frozen, told = comparison(load, tmp_path, methods=("naive",), grid=(1e-3, 4e-3))
    frozen.frozen = {"naive": chosen["naive"]}
    assert frozen.run()[0] == {"naive": replace(chosen["naive"])} and not any("tuning" in line for line in told)


def test_a_trial_that_another_process_has_is_left_to_it(load: Load, data: TrialData, tmp_path: Path) -> None:
    shop, one = Trials(tmp_path), trial(load, data, "naive")
    claim = tmp_path / "trials" / f"{digest(one)}.claim"
    claim.write_text(str(os.getppid()))
    assert not shop.claim(one)
    claim.write_text("999999999")
    assert shop.claim(one) and claim.read_text() == str(os.getpid()), "its holder is dead"


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (("circadian:stream.schedule=mixed",), r"'circadian:stream\.schedule=mixed' changes the section stream"),
        (("circadian:wake.batchh=3",), r"unknown key 'wake\.batchh'; did you mean 'wake\.batch'\?"),
        (("ewc:wake.writes=none:wake.batch=2",), r"adds something to the learner's training .* use wake\.writes=all"),
    ],
)
def test_what_cannot_be_compared_is_named(methods: tuple[str, ...], message: str, load: Load, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        comparison(load, tmp_path, methods=("naive", *methods))[0].run()


def test_figures_are_read_off_looks_and_steps() -> None:
    looks = [
        {"tokens": 10, "served": {"a": 4.0}, "rested": {"a": 4.5}},
        {"tokens": 20, "served": {"a": 3.0, "b": 5.0}, "rested": {"a": 3.0, "b": 4.8}},
        {"tokens": 20, "served": {"a": 2.0, "b": 3.0}, "rested": {"a": 2.0, "b": 3.0}},
    ]
    found = read_looks(looks)
    assert found["area_bpb"] == 4.0, "what is adopted behind the end comes too late for it"
    assert (found["final_bpb"], found["worst_bpb"]) == (2.5, 3.0) and found["gap_bpb"] == pytest.approx(0.1)
    steps = [{"tokens": 8 * k, "bpb": {"a": float(k)}, "recalled": {}, "bytes": {"a": k}} for k in (1, 2, 3)]
    assert read_online(steps, "bpb") == pytest.approx(14 / 6) and read_online(steps, "recalled") is None
    assert curve(steps) == [(8, 1.0), (16, 2.0), (24, 3.0)]


def test_orders_are_permutations_and_unknown_ones_are_named() -> None:
    assert order_sources("abc", "A") == ["a", "b", "c"] and order_sources("abc", "reverse") == ["c", "b", "a"]
    assert sorted(order_sources("abcdef", "random-3")) == list("abcdef") == sorted(order_sources("abcdef", "random-4"))
    with pytest.raises(ValueError, match="--orders: 'B' is unknown; use A, reverse, or random-N"):
        order_sources("abc", "B")


def test_only_train_and_valid_of_a_folder_are_read(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "train.txt").write_text("text")
    assert stream_of_folder([f"stream.path={tmp_path}", "a=b"]) == [f"stream.path={tmp_path}/*/[tv][ra]*.txt", "a=b"]
    assert stream_of_folder(["stream.path=/nowhere"]) == ["stream.path=/nowhere"]


@pytest.mark.parametrize("name", ["circadian", "replay:average=9", "mer", "lora"])
def test_a_learner_that_dies_on_the_way_changes_nothing(name: str, load: Load, data: TrialData, tmp_path: Path) -> None:
    one = trial(load, data, name)
    base, found = Trials(tmp_path).base(one.cfg, data), []
    for faults in (Faults(), Faults(seed=2, learner=0.2, most=3)):
        cfg = with_budget(one.cfg, 257, one.method.build_hook().costs(one.cfg, 257))
        setting = data.of(cfg)
        parts = LocalParts(setting.cfg, setting, base, one.method.build_hook())
        run = Simulation(parts.rules, parts, faults=faults)
        assert isinstance(run.attempt(), End)
        found.append([record.fingerprint for record in run.machine.state.rounds])
    assert run.dice.struck["learner"] > 0
    assert found[0] == found[1] and len(found[0]) >= 2


def test_the_command_writes_json_page_and_pictures(small: List[str], tmp_path: Path) -> None:
    arguments = ["compare", "smoke", *small, "--preset", "none", "--methods", "naive,joint", "--seeds", "1"]
    paths = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "o.json")]
    arguments += ["wake.batch=4", "--orders", "A", "--grid", "2e-3", *paths]
    said = CliRunner().invoke(app, arguments)
    assert said.exit_code == 0, said.output
    outcome = json.loads((tmp_path / "o.json").read_text())
    assert outcome["regimes"]["whole"]["final_bpb"].keys() == {"naive", "joint"}
    assert outcome["regimes"]["whole"]["area_bpb"].keys() == {"naive"}, "joint training has no stream"
    assert "| **naive** |" in (tmp_path / "o.md").read_text() and len(list(tmp_path.glob("o-whole-*.png"))) == 4
    again = CliRunner().invoke(app, [*arguments, "--settings", str(tmp_path / "nothing.json")])
    assert "no outcome of `circadian compare`" in str(again.exception)
