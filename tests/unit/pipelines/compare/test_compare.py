"""Comparison end to end, on a toy stream: every method runs, spends and keeps what it may, and repeats itself."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, List

import pytest
import torch
from typer.testing import CliRunner

from cluster.cli import app
from pipelines.compare.asleep import dream_loss
from pipelines.compare.circadian import CircadianTrainer
from pipelines.compare.config import METHODS, REGIMES, Method, Night
from pipelines.compare.material import Material, load_material, stream_of_folder
from pipelines.compare.meter import Meter
from pipelines.compare.options import EXTRA_RATES, Options
from pipelines.compare.plain import PlainTrainer
from pipelines.compare.runner import Chosen, Comparison
from pipelines.compare.trial import Key, Workshop
from pipelines.config.load import load_config
from pipelines.config.schema import Config

SOURCES = ("alpha", "beta", "gamma", "delta")
SMALL = [
    *("model.dim=16", "model.blocks=2", "model.heads=2", "model.context=32"),
    *("levels.fast.width=16", "levels.medium.width=16", "levels.slow.width=32"),
    *("levels.fast.period=256", "levels.medium.period=512", "levels.slow.period=2048"),
    *("wake.batch=4", "sleep.batch=4", "base.tokens=1024", "base.batch=4"),
    *("stream.max_source_bytes=2048", "stream.probe_bytes=512"),
    *("base.sources=[alpha]", "stream.sources=[beta,gamma,delta]"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NAME/train.txt and NAME/valid.txt of four sources with words of their own."""
    root = tmp_path_factory.mktemp("texts")
    for number, name in enumerate(SOURCES):
        draw = random.Random(number)
        words = ["".join(draw.choices("abcdefghijklmnop"[number * 3 : number * 3 + 6], k=4)) for _ in range(20)]
        for part, size in (("train", 1400), ("valid", 400)):
            (root / name).mkdir(exist_ok=True)
            text = "\n".join(" ".join(draw.choices(words, k=8)) for _ in range(size // 8))
            (root / name / f"{part}.txt").write_text(text)
    return root


@pytest.fixture(scope="module")
def cfg(folder: Path) -> Config:
    return load_config("default", [*stream_of_folder([f"stream.path={folder}"]), *SMALL], "micro")


@pytest.fixture(scope="module")
def material(cfg: Config) -> Material:
    return load_material(cfg, "A")


def trial(shop: Workshop, material: Material, method: Method, regime: str = "whole", seed: int = 0) -> Dict[str, Any]:
    return shop.run(Key("x", method, 2e-3, regime, "A", seed, 2.0, False), material)


def test_only_train_and_valid_of_a_folder_are_read(folder: Path, material: Material) -> None:
    (folder / "alpha" / "notes.txt").write_text("these words are nobody's business\n" * 50)
    assert material.sources == list(SOURCES)
    assert [s.name for s in material.segments] == ["beta", "gamma", "delta"]
    assert material.ends["delta"] == material.stream_tokens
    judged, gate = material.probes["beta"].tokens, material.gate_probes["beta"].tokens
    assert not {row.tobytes() for row in judged} & {row.tobytes() for row in gate}


PARTS = ["circadian_dreams", "circadian_on_policy", "circadian_slots", "circadian_teacher", "circadian_anchor"]
PARTS += [
    "circadian_nights",
    "circadian_no_wake",
    "circadian_two_levels",
    "circadian_no_deep_sleep",
    "circadian_all_handed_over",
]


@pytest.mark.parametrize("name", [*sorted(n for n in METHODS if not n.startswith("circadian_")), *PARTS])
def test_every_method_spends_the_same_and_stores_no_more_than_it_may(
    name: str, cfg: Config, material: Material, tmp_path: Path
) -> None:
    shop = Workshop(tmp_path, cfg)
    budget = 2 * Meter.of(cfg, material.vocab_size).full * material.stream_tokens
    for regime in ("whole", "cap5") if METHODS[name].keeps_data else ("whole",):
        found = trial(shop, material, METHODS[name], regime)
        # The small rest is what is too little for one more step.
        assert 0.9 * budget <= found["flops"]["total"] <= 1.005 * budget, (regime, found["flops"])
        assert found["stored_bytes"] <= REGIMES[regime].stored * material.stream_bytes
        assert found["mean_final_bpb"] < 8.0 and len(found["matrix"]) >= 2
        if METHODS[name].family == "circadian":
            assert found["learner_step"] <= (1.0 if name == "one_frequency" else 0.6)


@pytest.mark.parametrize("asleep", [10, 25, 50])
@pytest.mark.parametrize("name", ["circadian", "circadian_nights", "sleep_as_replay", "replay_50", "naive", "joint"])
def test_a_share_of_sleep_sets_the_total_for_every_method(
    name: str, asleep: int, cfg: Config, material: Material, tmp_path: Path
) -> None:
    found = trial(Workshop(tmp_path, cfg), material, METHODS[name], f"sleep{asleep}")
    budget = Meter.of(cfg, material.vocab_size).wake / (1 - asleep / 100) * material.stream_tokens
    assert 0.85 * budget <= found["flops"]["total"] <= 1.005 * budget, found["flops"]
    if name == "sleep_as_replay":
        assert found["flops"]["total"] - found["flops"]["wake"] == pytest.approx(asleep / 100 * budget, rel=0.2)


def test_a_trial_repeats_itself_to_the_bit_and_seeds_differ(cfg: Config, material: Material, tmp_path: Path) -> None:
    first, again = (trial(Workshop(tmp_path / n, cfg), material, METHODS["circadian"]) for n in "ab")
    other = trial(Workshop(tmp_path / "a", cfg), material, METHODS["circadian"], seed=1)
    assert first["matrix"] == again["matrix"] and first["online_bpb"] == again["online_bpb"]
    assert first["matrix"] != other["matrix"]


def test_all_start_from_the_same_base(cfg: Config, material: Material, tmp_path: Path) -> None:
    shop = Workshop(tmp_path, cfg)
    rows = [trial(shop, material, METHODS[name])["matrix"][0] for name in ("naive", "circadian", "lora")]
    assert rows[0] == rows[1] == rows[2]
    assert len(list((tmp_path / "bases").iterdir())) == 1
    fresh = shop.base(material, 0, scratch=True)
    assert float(fresh["head.weight"].abs().max()) == 0.0


def test_a_night_that_is_rejected_leaves_the_awake_model(cfg: Config, material: Material, tmp_path: Path) -> None:
    wild = Method("circadian", night=Night(handover=0.0, gate=True, recent=1.0, rounds=4, night_floor=0.05))
    key = Key("wild", wild, 3e-1, "whole", "A", 0, 2.0, False)
    found = Workshop(tmp_path, cfg).run(key, material)
    assert found["rejected"] > 0
    assert max(found["matrix"][-1]) < 12, "what the gate keeps out does no harm"


def test_a_comparison_goes_on_where_it_was_cut_off(cfg: Config, tmp_path: Path) -> None:
    options = Options(methods=("circadian", "naive"), seeds=(0,), orders=("A", "reverse"), grid=(1e-3, 4e-3))
    seen: List[str] = []
    runs: List[int] = []

    class Counted(Workshop):
        def run(self, key: Key, material: Material) -> Dict[str, Any]:
            runs.append(1)
            return super().run(key, material)

    def go() -> Any:
        comparison = Comparison(cfg, options, tmp_path, lambda what, *_: seen.append(what))
        comparison.shop = Counted(tmp_path, cfg)
        comparison.tuning_shop = Counted(tmp_path, comparison.tuning_shop.cfg)
        least = comparison.planned()
        chosen, results = comparison.run()
        assert least <= comparison.done == comparison.planned() <= least + 2 * EXTRA_RATES
        return chosen, results

    chosen, results = go()
    count = len(runs)
    beyond = [lr for found in chosen.values() for _, lr, _ in found.tried if lr not in options.grid]
    assert count >= 5 + 4, "two step sizes each and a variant of naive, then two methods in two orders"
    assert beyond, "the best of two is at an edge, so one more is tried"
    assert len(results) == 4
    again, same = go()
    assert len(runs) == count and again == chosen
    assert {k: r["matrix"] for k, r in same.items()} == {k: r["matrix"] for k, r in results.items()}


def test_other_text_under_the_same_names_is_another_trial(cfg: Config, material: Material, tmp_path: Path) -> None:
    comparison = Comparison(cfg, Options(seeds=(0,)), tmp_path, lambda *_: None)
    before = comparison._key("naive", METHODS["naive"], 1e-3, "whole", "A", 0)
    assert before.data == material.fingerprint == load_material(cfg, "A").fingerprint
    segment = material.segments[0]
    changed = segment.tokens_NS.copy()
    changed[0, 0] ^= 1
    edited = replace(material, segments=[replace(segment, tokens_NS=changed), *material.segments[1:]])
    comparison.material["A", False] = edited
    after = comparison._key("naive", METHODS["naive"], 1e-3, "whole", "A", 0)
    assert after.digest(cfg) != before.digest(cfg)


@pytest.mark.parametrize(
    ("regime", "epochs", "same"), [("whole", 2.0, True), ("whole", 1.0, False), ("sleep50", 2.0, False)]
)
def test_trials_with_few_flops_have_rules_of_their_own(
    cfg: Config, regime: str, epochs: float, same: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What changes for them alone does not make others start anew."""
    keys = [Key(name, METHODS[name], 1e-3, regime, "A", 0, epochs, False) for name in ("circadian", "replay_50")]
    before = [key.digest(cfg) for key in keys]
    monkeypatch.setattr("pipelines.compare.trial.FEW", 7)
    assert [key.digest(cfg) == old for key, old in zip(keys, before, strict=True)] == [same, True]


def test_the_command_writes_json_page_and_pictures(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    out = tmp_path / "compare-toy.json"
    arguments = ["compare", "default", f"stream.path={folder}", *SMALL, "--methods", "circadian,naive,joint"]
    arguments += ["--seeds", "0", "--orders", "A,reverse", "--regimes", "whole,cap5", "--grid", "2e-3"]
    done = CliRunner().invoke(app, [*arguments, "--work", str(tmp_path / "work"), "--out", str(out)])
    assert done.exit_code == 0, done.output + str(done.exception)
    outcome = json.loads(out.read_text())
    assert (
        set(outcome["regimes"]) == {"whole", "cap5"}
        and outcome["seeds"] == [0]
        and outcome["orders"] == ["A", "reverse"]
    )
    for found in outcome["regimes"].values():
        for key in ("mean_final_bpb", "forgetting", "learning", "interval", "flops", "stored_bytes"):
            assert set(found[key]) == {"circadian", "naive", "joint"}, key
        assert found["against"]["mean_final_bpb"]["naive"]["low"] <= found["against"]["mean_final_bpb"]["naive"]["high"]
    assert outcome["command"].startswith("circadian")
    text = out.with_suffix(".md").read_text()
    assert "| **circadian** |" in text and "5 % of the stream's bytes" in text
    assert len(list(tmp_path.glob("compare-toy-*.png"))) == 6


def test_settings_of_an_earlier_outcome_are_not_tuned_again(folder: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    common = ["compare", "default", f"stream.path={folder}", *SMALL, "--seeds", "0", "--orders", "A"]
    common += ["--work", str(tmp_path / "work")]
    tuned = ["--methods", "naive,joint", "--grid", "1e-3,6e-3", "--out", str(first)]
    assert CliRunner().invoke(app, [*common, *tuned]).exit_code == 0
    again = ["--methods", "naive,joint", "--grid", "5e-4", "--out", str(second), "--settings", str(first)]
    done = CliRunner().invoke(app, [*common, *again])
    assert done.exit_code == 0 and "tuning" not in done.output, done.output
    earlier, later = (json.loads(path.read_text()) for path in (first, second))
    assert later["tuning"]["chosen"] == earlier["tuning"]["chosen"] and later["tuning"]["taken_from"] == "first.json"
    assert later["regimes"]["whole"]["mean_final_bpb"] == earlier["regimes"]["whole"]["mean_final_bpb"]
    assert "lead of naive (95 %)" in second.with_suffix(".md").read_text(), "the first, where Circadian is not there"
    wrong = CliRunner().invoke(app, [*common, "--settings", str(folder / "alpha" / "train.txt")])
    assert wrong.exit_code != 0 and "no outcome of `circadian compare`" in str(wrong.exception)


def test_changed_methods_stand_beside_the_one_that_they_change(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "changed.json"
    common = ["compare", "default", f"stream.path={folder}", *SMALL, "--seeds", "0", "--orders", "A", "--grid", "2e-3"]
    common += ["--work", str(tmp_path / "work"), "--out", str(out), "--methods"]
    done = CliRunner().invoke(app, [*common, "naive:schedule=constant,naive:lr=5e-4,circadian:lr=1e-3:bank=0"])
    assert done.exit_code == 0, done.output + str(done.exception)
    outcome = json.loads(out.read_text())
    chosen = outcome["tuning"]["chosen"]
    assert [entry["lr"] for entry in chosen.values()] == [2e-3, 5e-4, 1e-3, 2e-3], "the last is naive itself"
    assert chosen["naive:schedule=constant"]["method"]["schedule"] == "constant"
    assert chosen["circadian:lr=1e-3:bank=0"]["method"]["night"]["bank"] == 0
    assert "tuning naive " in done.output and "tuning circadian" not in done.output, "who lends a step size is tuned"
    assert "methods with settings in their name that of the method they change" in out.with_suffix(".md").read_text()
    free = [*common, "naive:lr=5e-4,circadian:lr=1e-3:bank=0", "--seeds", "1000"]
    done = CliRunner().invoke(app, free)
    assert done.exit_code == 0, "where nothing is tuned, the tuning seed may be looked at: " + done.output
    assert "step sizes are those in the names, not tuned" in out.with_suffix(".md").read_text()
    wrong = CliRunner().invoke(app, [*common, "naive:replay=2"])
    assert wrong.exit_code != 0 and "replay=2.0 must lie between 0 and 1" in str(wrong.exception)


def test_a_changed_method_begins_where_tuning_ended(cfg: Config, tmp_path: Path) -> None:
    tuned = Chosen(Method(schedule="constant"), 7e-4, [])
    options = Options(methods=("naive:merge=0.5", "circadian_late:bank=0.25"), seeds=(0,), orders=("A",))
    frozen = {"naive": tuned, "circadian": Chosen(METHODS["circadian"], 3e-3, [])}
    chosen, results = Comparison(cfg, options, tmp_path, lambda *_: None, frozen).run()
    assert chosen["naive:merge=0.5"] == Chosen(Method(schedule="constant", merge=0.5), 7e-4, [])
    late = chosen["circadian_late:bank=0.25"]
    assert late.lr == 3e-3 and late.method.night == replace(METHODS["circadian_late"].night, bank=0.25)
    assert len(results) == 2


def test_tuning_may_be_done_with_the_store_that_is_compared(cfg: Config, tmp_path: Path) -> None:
    options = Options(("replay_50:balance=1",), (0,), ("A",), ("cap5",), grid=(1e-3,), tuned_in="cap5")
    seen: List[str] = []
    chosen, _ = Comparison(cfg, options, tmp_path, lambda what, *_: seen.append(what)).run()
    assert seen[0].startswith("tuning replay_50 cap5 A seed 1000")
    assert chosen["replay_50"].tried and set(chosen) == {"replay_50", "replay_50:balance=1"}, "who was tuned is told"


def trainer(cfg: Config, material: Material, tmp_path: Path, capacity: float, **changes: Any) -> CircadianTrainer:
    """With nights of their own passes."""
    weights, night = (
        Workshop(tmp_path, cfg).base(material, 0, scratch=False),
        Night(handover=0.0, gate=False, **changes),
    )
    return CircadianTrainer(material, night, 2e-3, 2.0, capacity, 0, weights, torch.device("cpu"))


def test_a_night_does_not_train_on_the_sums_of_a_period_that_it_cuts(
    cfg: Config, material: Material, tmp_path: Path
) -> None:
    """A period is two or four batches; a night after one batch finds gradient sums, and hands them back."""
    live = trainer(cfg, material, tmp_path, float("inf"))
    segment, size = material.segments[0], cfg.wake.batch
    live._wake(segment, 0, size)
    sums = {n: p.grad.clone() for n, p in live.model.named_parameters() if p.grad is not None}
    assert sums and all(".fast." in name or ".medium." in name for name in sums), "slow levels rest"
    largest: List[float] = []
    clip = torch.nn.utils.clip_grad_norm_

    def watch(parameters: Any, *rest: Any) -> Any:
        norm = clip(parameters, *rest)
        largest.append(float(norm))
        return norm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", watch)
        live._nap(segment, 0, size, (0, 1))
    assert largest and max(largest) < 50 * min(largest), "a sum over tokens beside means"
    for name, parameter in live.model.named_parameters():
        assert (parameter.grad is None) == (name not in sums)
        assert parameter.grad is None or torch.equal(parameter.grad, sums[name])


def test_merging_is_weighted_by_what_the_store_lost(cfg: Config, material: Material, tmp_path: Path) -> None:
    whole, small = (trainer(cfg, material, tmp_path, capacity, merge=0.5) for capacity in (float("inf"), 2000.0))
    for live in (whole, small):
        live.memory.add(material.base.tokens_NS, material.base.sources_N)
        with torch.no_grad():
            for parameter in live.model.parameters():
                parameter.add_(1.0)
        live._merge(1)
    assert whole.asleep.scarcity == 0 < small.asleep.scarcity < 1
    for name, anchor in whole.anchor.named_parameters():
        assert torch.equal(dict(whole.model.named_parameters())[name], anchor + 1.0)
    for name, anchor in small.anchor.named_parameters():
        left = dict(small.model.named_parameters())[name] - anchor
        torch.testing.assert_close(left, torch.full_like(left, 1 - 0.5 * small.asleep.scarcity))


def test_dreams_go_on_from_stored_text_and_bring_what_the_anchor_says_of_them(
    cfg: Config, material: Material, tmp_path: Path
) -> None:
    live = trainer(cfg, material, tmp_path, 2000.0, dream=0.5)
    live.memory.add(material.base.tokens_NS, material.base.sources_N)
    dreams = live.asleep._dream(9)
    tokens_NT, logits_NTV = (torch.stack(part) for part in zip(*dreams, strict=True))
    stored = {bytes(row[i : i + 16].astype("uint8")) for row in live.memory.tokens_NS for i in range(len(row) - 15)}
    assert len(tokens_NT) == 9 and all(bytes(row.byte().numpy()) in stored for row in tokens_NT[:, :16])
    with torch.no_grad():
        torch.testing.assert_close(logits_NTV, live.anchor(tokens_NT), atol=1e-4, rtol=1e-4)
    loss = dream_loss(live.model, dreams[:3])
    assert float(loss.detach()) == pytest.approx(0.0, abs=1e-5), "a student that is the anchor has nothing to learn"


def test_every_dream_that_is_made_is_paid_for(cfg: Config, material: Material, tmp_path: Path) -> None:
    live = trainer(cfg, material, tmp_path, 2000.0, dream=0.5)
    live.memory.add(material.base.tokens_NS, material.base.sources_N)
    meter, made = live.meter, []
    dream = live.asleep._dream
    live.asleep._dream = lambda number: made.append(number) or dream(number)  # type: ignore[method-assign,func-returns-value]
    spent = live.asleep.train(live.model, material.segments[0].tokens_NS, (0.5, 0.5), 8, (0, 1))
    tokens = 8 * 4 * 32
    assert sum(made) == int(8 * 2 * 0.5 * live.asleep.scarcity) > 0
    assert spent == tokens * meter.full + sum(made) * 32 * meter.forward
    assert spent <= 8 * live.asleep.step_flops(0.5) * 1.001


def test_new_text_joins_what_is_replayed_as_often_as_asked(cfg: Config, material: Material, tmp_path: Path) -> None:
    weights = Workshop(tmp_path, cfg).base(material, 0, scratch=False)
    method = Method(replay=0.5, joins=4)
    plain = PlainTrainer(material, method, 2e-3, 2.0, float("inf"), 0, weights, torch.device("cpu"))
    plain.memory.add(material.base.tokens_NS, material.base.sources_N)
    sizes, step = [], plain._step
    plain._step = lambda *a: (sizes.append(len(plain.memory)), step(*a))  # type: ignore[method-assign,assignment,func-returns-value]
    plain._learn(material.segments[0])
    rows = len(material.segments[0].tokens_NS)
    assert len(set(sizes)) == 4 and sizes == sorted(sizes), "it grows within the source"
    assert len(plain.memory) == len(material.base.tokens_NS) + rows


def test_slots_train_alone_and_leave_a_plain_model(cfg: Config, material: Material, tmp_path: Path) -> None:
    live = trainer(cfg, material, tmp_path, float("inf"), slots=4)
    before = {n: p.detach().clone() for n, p in live.model.named_parameters()}
    live.memory.add(material.base.tokens_NS, material.base.sources_N)
    live.asleep.train(live.model, material.segments[0].tokens_NS, (0.5, 0.5), 4, (0, 1))
    after = dict(live.model.named_parameters())
    assert list(after) == list(before), "folded: the model looks as it did"
    changed = {n for n in after if not torch.equal(after[n], before[n])}
    assert changed and all(".levels.slow." in name for name in changed)


def test_awake_batches_shrink_with_their_periods(cfg: Config, material: Material, tmp_path: Path) -> None:
    live = trainer(cfg, material, tmp_path, float("inf"), wake_batch=2)
    assert live.levels is not None and live.levels.clock.periods == {"fast": 128, "medium": 256}
    found = trial(Workshop(tmp_path, cfg), material, Method("circadian", night=Night(wake_batch=2)))
    assert found["learner_step"] <= 0.6


@pytest.mark.parametrize(
    ("option", "said"),
    [(["--methods", "magic"], "'magic' is unknown"), (["--seeds", "a"], "no comma-separated list of numbers")],
)
def test_a_wrong_option_is_named(folder: Path, option: List[str], said: str) -> None:
    done = CliRunner().invoke(app, ["compare", "default", f"stream.path={folder}", *SMALL, *option])
    assert done.exit_code != 0 and said in str(done.exception)
