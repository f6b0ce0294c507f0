"""Sleep that goes on from the awake pass: its step is a plain step, and nothing is trained on twice or not paid for.

And the same guide in plain training (LwF).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, List

import numpy as np
import pytest
import torch

from nl_model.losses import token_nll
from pipelines.compare.config import Method, Night
from pipelines.compare.handover import HandoverTrainer
from pipelines.compare.material import Material, load_material, stream_of_folder
from pipelines.compare.plain import PlainTrainer
from pipelines.compare.trial import Workshop
from pipelines.config.load import load_config
from pipelines.config.schema import Config

SMALL = [
    *("model.dim=16", "model.blocks=2", "model.heads=2", "model.context=32"),
    *("levels.fast.width=16", "levels.medium.width=16", "levels.slow.width=32"),
    *("levels.fast.period=256", "levels.medium.period=512", "levels.slow.period=2048"),
    *("wake.batch=4", "sleep.batch=4", "base.tokens=1024", "base.batch=4"),
    *("stream.max_source_bytes=2048", "stream.probe_bytes=512", "base.sources=[old]", "stream.sources=[new,newer]"),
]


@pytest.fixture(scope="module")
def cfg(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Three sources of random bytes."""
    root, draw = tmp_path_factory.mktemp("texts"), np.random.default_rng(0)
    for number, name in enumerate(("old", "new", "newer")):
        (root / name).mkdir()
        for part, size in (("train", 2048), ("valid", 600)):
            text = draw.integers(97 + 5 * number, 110 + 5 * number, size).astype("u1").tobytes()
            (root / name / f"{part}.txt").write_bytes(text)
    return load_config("default", [*stream_of_folder([f"stream.path={root}"]), *SMALL], "micro")


@pytest.fixture(scope="module")
def material(cfg: Config) -> Material:
    return load_material(cfg, "A")


def trainer(
    material: Material, tmp_path: Path, capacity: float = float("inf"), epochs: float = 2.0, **changes: Any
) -> HandoverTrainer:
    weights, night = Workshop(tmp_path, material.cfg).base(material, 0, scratch=False), Night(gate=False, **changes)
    live = HandoverTrainer(material, night, 2e-3, epochs, capacity, 0, weights, torch.device("cpu"))
    live.memory.add(material.base.tokens_NS, material.base.sources_N)
    return live


def test_a_step_that_goes_on_from_the_awake_pass_is_a_plain_step(material: Material, tmp_path: Path) -> None:
    """Everything handed over and nothing written awake: the weights afterwards are those of one step on both texts."""
    live, twin = (trainer(material, tmp_path, handover=1.0, wake="none", bank=0.0) for _ in range(2))
    segment, size = material.segments[0], live.cfg.wake.batch
    assert list(live._live(segment, 0, size, (0, 1))) == list(range(size))
    old = twin.memory.draw(size, twin.night.balance)  # two epochs: as much replay as new text
    both = torch.from_numpy(np.concatenate([segment.tokens_NS[:size], twin.memory.tokens_NS[old]]))
    trained = twin.asleep._prepare(twin.model, 0)
    twin.asleep._update(twin.model.nll(both).mean(), trained, 0, 1)
    for mine, plain in zip(live.model.parameters(), twin.model.parameters(), strict=True):
        torch.testing.assert_close(mine, plain, atol=1e-6, rtol=1e-5)
    full, tokens = live.meter.full, size * live.cfg.model.context
    assert live.meter.total == live.trace.inline_flops == 2 * full * tokens
    assert live.trace.learner_flops == live.meter.forward * tokens


def test_the_learner_need_not_wait_for_the_step_on_its_batch(material: Material, tmp_path: Path) -> None:
    live, segment = trainer(material, tmp_path, handover=1.0, wake="none", late=True), material.segments[0]
    start = [p.detach().clone() for p in live.model.parameters()]
    live._live(segment, 0, 2, (0, 3))
    assert all(map(torch.equal, start, live.model.parameters())) and live.rounds == 0
    live._live(segment, 2, 4, (1, 3))
    assert not all(map(torch.equal, start, live.model.parameters())) and live.rounds == 1
    live._live(segment, 4, 6, (2, 3))
    assert live.rounds == 3 and live.handed is None, "at a boundary nothing is left behind"
    assert live.trace.inline_flops == live.trace.learner_flops < live.meter.total


def test_text_that_waits_for_its_step_counts_as_stored(material: Material, tmp_path: Path) -> None:
    live = trainer(material, tmp_path, 1000.0, late=True)
    assert live._recent_share() == 2 * live.cfg.wake.batch * 32 / 1000.0
    held, size, segment = [], live.cfg.wake.batch, material.segments[0]
    for day in range(3):
        waiting = len(live.handed.new_BS) if live.handed else 0
        live._live(segment, day * size, (day + 1) * size, (day, 99))
        held.append(live.memory.bytes + (size + waiting) * 32)
    assert held[1] > held[0] and live.trace.stored_bytes == max(held)
    with pytest.raises(ValueError, match="late=true needs sleep that goes on from awake passes"):
        Night(late=True, handover=0.0)


def test_awake_levels_learn_what_sleep_does_not_take_and_keep_their_periods(material: Material, tmp_path: Path) -> None:
    live, twin = (trainer(material, tmp_path, wake_batch=4) for _ in range(2))
    live._live(material.segments[0], 0, 4, (0, 8))
    live._step()
    assert live.levels is not None
    assert live.levels.tokens == 4 * 32 and set(live.levels.optimizers.tokens.values()) == {2 * 32}
    twin._train_levels()
    twin.model.nll(torch.from_numpy(material.segments[0].tokens_NS[2:4])).sum().backward()
    for (name, mine), other in zip(live.model.named_parameters(), twin.model.parameters(), strict=True):
        assert (mine.grad is None) == (other.grad is None) == (".fast." not in name and ".medium." not in name)
        assert mine.grad is None or other.grad is None or torch.equal(mine.grad, other.grad), name


def test_more_is_handed_over_where_less_is_stored(material: Material, tmp_path: Path) -> None:
    whole, small = (trainer(material, tmp_path, capacity, wake_batch=4, lwf=0.0) for capacity in (float("inf"), 300.0))
    assert 0.8 < small.asleep.scarcity < 1
    wanted = [20, int(20 + 20 * small.asleep.scarcity)]
    assert [sum(live._taken(4) for _ in range(10)) for live in (whole, small)] == wanted
    whole.epochs = whole.meter.wake / whole.meter.full
    assert whole._taken(4) == 0, "there are no FLOPs for it"


def test_what_would_leave_nothing_for_replay_is_not_taken(material: Material, tmp_path: Path) -> None:
    live = trainer(material, tmp_path, handover=1.0)
    live.due, live.credit = 4.0, (2.0 * 32 - 4 * 32 * 2.0) * live.meter.full + 4 * 32 * live.wake_flops
    assert live._taken(4) == 1


@pytest.mark.parametrize(("epochs", "writes"), [(2.0, True), (1.1, True), (0.98, False), (0.5, False)])
def test_with_few_flops_less_is_handed_over_and_awake_levels_only_read(
    material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epochs: float, writes: bool
) -> None:
    """A new sequence has one replayed sequence at least beside it, and the budget holds."""
    live, handed = trainer(material, tmp_path, epochs=epochs, bank=0.0), []
    learn = live._learn
    monkeypatch.setattr(live, "_learn", lambda tokens_BS: (handed.append(len(tokens_BS)), learn(tokens_BS))[1])
    before = [p.detach().clone() for p in live.model.parameters()]
    meter = live.run().meter
    assert meter.total <= epochs * meter.full * material.stream_tokens * (1 + 1e-9)
    assert (live.levels is not None) == writes
    replay = meter.spent["sleep"] / live.cfg.model.context - sum(handed) * live._handed_flops
    assert sum(handed) > 0 and replay >= sum(handed) * meter.full
    assert any(not torch.equal(old, new) for old, new in zip(before, live.model.parameters(), strict=True))


def test_the_last_boundarys_model_has_a_say_in_new_text_where_the_past_is_not_held(
    material: Material, tmp_path: Path
) -> None:
    changes = {"lwf": 0.5, "handover": 1.0, "wake": "none"}
    whole, small = (trainer(material, tmp_path, capacity, **changes) for capacity in (float("inf"), 300.0))
    weight = 0.5 * small.asleep.scarcity
    assert weight > 0.4 and whole.asleep.joined_flops == whole.meter.full
    new_BS = torch.from_numpy(material.segments[0].tokens_NS[:2])
    with torch.no_grad():
        small.asleep.anchor.head.weight.mul_(2.0)
        guide_BTV = small.asleep.anchor(new_BS[:, :-1]).softmax(-1)
    _, nll_BT = small._learn(new_BS)
    found = [p.grad.clone() for p in small.model.parameters() if p.grad is not None]
    small.model.zero_grad(set_to_none=True)
    truth_BTV = torch.nn.functional.one_hot(new_BS[:, 1:], guide_BTV.size(-1))
    mixed_BTV = (1 - weight) * truth_BTV + weight * guide_BTV  # cross-entropy has the divergence's gradient
    log_p_BTV = small.model(new_BS[:, :-1]).log_softmax(-1)
    (-(mixed_BTV * log_p_BTV).sum()).backward()
    torch.testing.assert_close(found, [p.grad for p in small.model.parameters() if p.grad is not None])
    torch.testing.assert_close(nll_BT, -log_p_BTV.gather(-1, new_BS[:, 1:, None]).squeeze(-1).detach())
    small.model.zero_grad(set_to_none=True)
    before = small.meter.total
    small._live(material.segments[0], 0, 2, (0, 2))
    spent, meter, tokens = small.meter.total - before, small.meter, 2 * 32
    guided = meter.full + meter.forward  # the anchor's pass included
    replayed = (2 * meter.full - guided) * tokens // (guided * 32)
    assert replayed > 0 and spent == guided * (tokens + replayed * 32)


def test_stored_text_is_replayed_so_often_at_most_where_the_past_is_not_held(
    material: Material, tmp_path: Path
) -> None:
    small, whole = (trainer(material, tmp_path, capacity, repeats=2.5) for capacity in (300.0, float("inf")))
    held = len(small.memory)
    found = [small.asleep._replayable(8, (step, 8)) for step in range(8)]
    assert sum(found) == int(2.5 * held) == small.asleep.replayed and max(found) <= 4, "spread over the source"
    assert small.asleep._replayable(2, (0, 8)) == 2 == small.asleep.replayed, "counted anew for every source"
    assert all(whole.asleep._replayable(9, (step, 8)) == 9 for step in range(8)), "all is held: no bound"


def test_new_text_is_read_again_where_stored_text_has_been_replayed_often_enough(
    material: Material, tmp_path: Path
) -> None:
    """Again is after the step, which the text is read otherwise after; its gradient joins the next step."""
    live = trainer(material, tmp_path, 300.0, repeats=0.0, lwf=0.0, handover=1.0, wake="none")
    rows_BS, T = torch.from_numpy(material.segments[0].tokens_NS[:4]), live.cfg.model.context
    asleep, model = live.asleep, live.model
    live._learn(rows_BS[:2])
    assert asleep.join(model, rows_BS[:2], 3, (0, 8)) == 3 * T * live.meter.full
    assert asleep.reread == 3 and all(p.grad is None for p in model.parameters())
    after = [p.detach().clone() for p in model.parameters()]
    model.nll(rows_BS[[0, 1, 0]]).sum().backward()
    for (_, again), parameter in zip(asleep.again, model.parameters(), strict=True):
        torch.testing.assert_close(again, parameter.grad)
    model.zero_grad(set_to_none=True)
    model.nll(rows_BS[[0, 1, 0, 2, 3]]).mean().backward()  # what the next step is taken on
    wanted = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    seen: List[torch.Tensor] = []
    take = asleep._apply

    def look(trained: List[torch.nn.Parameter], step: int, steps: int) -> None:
        seen.extend(p.grad.clone() for p in trained if p.grad is not None)
        take(trained, step, steps)

    asleep._apply = look  # type: ignore[method-assign]
    live._learn(rows_BS[2:])
    asleep.join(model, rows_BS[2:], 1, (1, 8))
    torch.testing.assert_close(seen, wanted)
    assert not all(map(torch.equal, after, model.parameters()))
    assert asleep.reread == 1
    model.nll(rows_BS[3:]).sum().backward()  # the third was read first, so it is the fourth's turn
    for (_, again), parameter in zip(asleep.again, model.parameters(), strict=True):
        torch.testing.assert_close(again, parameter.grad)
    model.zero_grad(set_to_none=True)
    assert asleep.join(model, rows_BS[:0], 2, (2, 8)) == 2 * T * live.meter.full
    assert asleep.reread == 0, "nothing is there to be read again"


def test_without_a_base_nothing_is_held_to_weights_that_have_learned_nothing(cfg: Config, tmp_path: Path) -> None:
    material = load_material(cfg, "A", scratch=True)
    weights = Workshop(tmp_path, cfg).base(material, 0, scratch=True)
    live = HandoverTrainer(material, Night(gate=False), 2e-3, 2.0, 300.0, 0, weights, torch.device("cpu"))
    whole = HandoverTrainer(material, Night(gate=False), 2e-3, 2.0, float("inf"), 0, weights, torch.device("cpu"))
    assert whole.asleep.scarcity == 0.0, "nothing was seen, so nothing is lost"
    pulls: List[float] = []
    step = live._live
    live._live = lambda *args: (pulls.append(live.asleep.pull), step(*args))[1]  # type: ignore[method-assign]
    live.run()
    first = -(-len(material.segments[0].tokens_NS) // live.cfg.wake.batch)
    assert max(pulls[:first]) == 0.0 and min(pulls[first:]) > 0.5


def test_a_store_without_room_for_a_sequence_is_refused(material: Material, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="a store of 80 bytes does not hold one sequence of 32 beside the present batch"
    ):
        trainer(material, tmp_path, 80.0)


def test_without_a_base_everything_starts_from_nothing(cfg: Config, tmp_path: Path) -> None:
    material = load_material(cfg, "A", scratch=True)
    assert material.base_sources == [] and not len(material.base.tokens_NS)
    weights = Workshop(tmp_path, cfg).base(material, 0, scratch=True)
    live = HandoverTrainer(material, Night(), 2e-3, 2.0, float("inf"), 0, weights, torch.device("cpu"))
    found = live.run().result()
    assert found["mean_final_bpb"] < 8.0 and found["base_bpb"] is None
    assert 0.9 < live.meter.total / (2 * live.meter.full * material.stream_tokens) <= 1.0


def test_only_what_has_cooled_down_is_turned_down(material: Material, tmp_path: Path) -> None:
    live = trainer(material, tmp_path)
    live.seen += ["new"]
    live.anchor_row = live._gate_scores(live.model)
    good = [p.detach().clone() for p in live.model.parameters()]
    live._begin_candidate()
    with torch.no_grad():
        live.model.head.weight.normal_(0, 30.0)
    live.asleep.floor = live.night.night_floor  # a deep sleep follows
    live._judge(live.model)
    assert live.rejected == 0 and live.unjudged and not all(map(torch.equal, good, live.model.parameters()))
    live.asleep.floor = live.night.floor
    live._judge(live.model)
    assert live.rejected == 1 and not live.unjudged and all(map(torch.equal, good, live.model.parameters()))


def test_lwf_beside_replay_guides_all_of_the_batch_that_it_pays_for(
    cfg: Config, material: Material, tmp_path: Path
) -> None:
    weights = Workshop(tmp_path, cfg).base(material, 0, scratch=False)
    method = Method(replay=0.5, lwf=0.25)
    plain = PlainTrainer(material, method, 2e-3, 2.0, float("inf"), 0, weights, torch.device("cpu"))
    plain.memory.add(material.base.tokens_NS, material.base.sources_N)
    assert plain.teacher is not None
    with torch.no_grad():
        plain.teacher.head.weight.mul_(2.0)
    batch = plain._batch(material.segments[0], [0, 1])
    assert len(batch.old) == 2 == batch.new
    logits_BTV = plain.model(batch.tokens_BS[:, :-1])
    nll_BT = token_nll(logits_BTV, batch.tokens_BS[:, 1:])
    log_p_BTV, guide_BTV = logits_BTV.log_softmax(-1), plain.teacher(batch.tokens_BS[:, :-1]).log_softmax(-1)
    pull_BT = (guide_BTV.exp() * (guide_BTV - log_p_BTV)).sum(-1)
    found = plain._loss(batch, nll_BT, logits_BTV)
    torch.testing.assert_close(found, (0.75 * nll_BT + 0.25 * pull_BT).mean())
    assert plain.step_flops == 4 * 32 * (plain.meter.full + plain.meter.forward)


def test_lwf_has_no_guide_before_anything_was_learned(cfg: Config, tmp_path: Path) -> None:
    material = load_material(cfg, "A", scratch=True)
    weights = Workshop(tmp_path, cfg).base(material, 0, scratch=True)
    plain = PlainTrainer(material, Method(lwf=0.5), 2e-3, 2.0, float("inf"), 0, weights, torch.device("cpu"))
    assert plain.teacher is None and plain.step_flops == 4 * 32 * plain.meter.full
    plain.run()
    assert plain.teacher is not None and plain.meter.total <= 2 * plain.meter.full * material.stream_tokens


@pytest.mark.parametrize(("wake", "written"), [("learner", ["fast", "medium"]), ("fastest", ["fast"]), ("none", [])])
def test_levels_written_awake_and_what_that_costs(
    wake: str, written: List[str], material: Material, tmp_path: Path
) -> None:
    live = trainer(material, tmp_path, wake=wake)
    assert (live.levels.names if live.levels else []) == written
    full, forward = live.meter.full, live.meter.forward
    # fast sits above medium in the last block: its own backward pass is shorter than both together
    dearer = trainer(material, tmp_path, wake="learner").wake_flops
    assert forward <= live.wake_flops <= dearer < full and (live.wake_flops == forward) == (not written)
    assert (live.wake_flops == dearer) == (wake == "learner")
