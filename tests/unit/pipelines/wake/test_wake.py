"""The awake phase: score, log, then learn; and a state that can be put down and taken up anywhere."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Callable, Dict, Iterator, List

import numpy as np
import pytest
import torch
from torch import Tensor

from nl_model.config import LevelConfig, OptimizerConfig
from nl_model.model import NestedLM
from nl_model.recall import Recall
from nl_model.weights import load_into, load_tensors, parameters_of, save_tensors
from pipelines.config.schema import Config
from pipelines.data.module import DataModule, open_data
from pipelines.data.stream import Sequence
from pipelines.experience import ExperienceStore, Record, Snapshot
from pipelines.wake.awake import Awake, Log
from pipelines.wake.report import StepReport

MakeAwake = Callable[..., Awake]
SGD = OptimizerConfig(name="sgd", lr=0.1, beta1=0.0, clip=0.0)


@pytest.fixture(scope="module")
def setting(make_config: Callable[..., Config]) -> DataModule:
    return open_data(make_config())


@pytest.fixture(scope="module")
def batches(setting: DataModule) -> List[List[Sequence]]:
    """The first 24 wake steps of 2 x 16 tokens: six periods of medium, twelve of fast."""
    stream = setting.stream()
    return [stream.next_batch(2) for _ in range(24)]


@pytest.fixture
def make_awake(
    make_model: Callable[..., NestedLM],
    make_levels: Callable[..., Dict[str, LevelConfig]],
    make_config: Callable[..., Config],
) -> Callable[..., Awake]:
    def make(seed: int = 0, optimizer: OptimizerConfig | None = None) -> Awake:
        levels = make_levels(optimizer=optimizer)
        cfg = make_config(levels=levels)
        return Awake(make_model(levels, 257, seed), replace(cfg, wake=replace(cfg.wake, decay=0.0)))

    return make


@pytest.fixture
def store(tmp_path: Path, setting: DataModule) -> Iterator[ExperienceStore]:
    with ExperienceStore.open(tmp_path / "store", 16, setting.tokenizer.dtype) as opened:
        yield opened


def durable(store: ExperienceStore) -> Log:
    """Append at once, commit when waited for."""

    def log(records: List[Record]) -> Callable[[], None]:
        store.append(records, {"next": records[-1].key + 1})

        def wait() -> None:
            store.commit()

        return wait

    return log


def forget(records: List[Record]) -> Callable[[], None]:
    """A log for tests that do not look at it."""
    return lambda: None


def weights(model: NestedLM) -> Dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a: Dict[str, Tensor], b: Dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def rows(batch: List[Sequence]) -> Tensor:
    return torch.from_numpy(np.stack([s.tokens for s in batch]).astype(np.int64))


def test_experience_is_durable_before_it_is_learned_from(
    make_awake: MakeAwake, batches: List[List[Sequence]], store: ExperienceStore, tmp_path: Path
) -> None:
    awake, inner = make_awake(), durable(store)
    seen: List[bool] = []
    for batch in batches[:8]:
        before = weights(awake.model)

        def log(records: List[Record], before: Dict[str, Tensor] = before) -> Callable[[], None]:
            wait = inner(records)

            def wait_and_look() -> None:
                wait()
                assert Snapshot.open(tmp_path / "store").last_key == records[-1].key
                seen.append(same(weights(awake.model), before))

            return wait_and_look

        report = awake.step(batch, log)
        assert report.written == (
            ("fast", "medium") if awake.tokens % 128 == 0 else ("fast",) if awake.tokens % 64 == 0 else ()
        )
        assert same(weights(awake.model), before) == (not report.written)
    assert seen == [True] * 8, "no level was written before the experience was durable"


@pytest.mark.parametrize("failing", ["log", "wait"])
def test_no_weight_changes_where_the_log_fails(
    make_awake: MakeAwake, batches: List[List[Sequence]], failing: str
) -> None:
    awake = make_awake()
    for batch in batches[:3]:
        awake.step(batch, forget)
    before = weights(awake.model)

    def log(records: List[Record]) -> Callable[[], None]:
        def wait() -> None:
            raise OSError("disk full")

        if failing == "log":
            raise OSError("disk full")
        return wait

    with pytest.raises(OSError, match="disk full"):
        awake.step(batches[3], log)  # both levels of the learner would be due
    assert same(weights(awake.model), before)


def test_surprise_is_the_loss_before_the_update(
    make_awake: MakeAwake, batches: List[List[Sequence]], store: ExperienceStore, tmp_path: Path
) -> None:
    awake = make_awake()
    expected: List[float] = []
    for batch in batches[:6]:
        with torch.no_grad():
            nll = awake.model.nll(rows(batch))
        expected += nll.mean(1).tolist()
        report = awake.step(batch, durable(store))
        with torch.no_grad():
            after = awake.model.nll(rows(batch))
        assert torch.equal(after, nll) == (not report.written)
        nats = {s.source: 0.0 for s in batch}
        for s, loss in zip(batch, nll.double().sum(1).tolist(), strict=True):
            nats[s.source] += loss
        for source, total in nats.items():
            members = [s for s in batch if s.source == source]
            size = sum(s.bytes for s in members)
            assert report.bpb[source] == pytest.approx(total / math.log(2) / size, rel=1e-5)
            assert report.surprise[source] == pytest.approx(total / (16 * len(members)), rel=1e-5)
    snapshot = Snapshot.open(tmp_path / "store")
    assert snapshot.surprise.tolist() == np.array(expected, np.float32).tolist()
    records = snapshot.records(np.arange(12))
    assert [record.key for record in records] == list(range(12))
    assert [record.fast_step for record in records] == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
    assert {record.kind for record in records} == {"real"} and {record.release for record in records} == {0}
    assert np.array_equal(snapshot.tokens(np.arange(12)), np.concatenate([rows(b).numpy() for b in batches[:6]]))
    assert snapshot.cursor == {"next": 12}


def test_only_the_learners_levels_are_written(make_awake: MakeAwake, batches: List[List[Sequence]]) -> None:
    awake = make_awake()
    before = weights(awake.model)
    reports = [awake.step(batch, forget) for batch in batches]
    assert awake.tokens == 24 * 32 > 512, "a boundary of the slow level has passed"
    assert awake.levels.optimizers.writes == {"fast": 12, "medium": 6}
    assert sum("slow" in report.written for report in reports) == 0
    for name, after in weights(awake.model).items():
        assert torch.equal(after, before[name]) == (awake.model.level_of(name) == "slow"), name
        if awake.model.level_of(name) == "slow":
            assert dict(awake.model.named_parameters())[name].grad is None
    assert not any("slow" in key or "embedding" in key for key in awake.levels.optimizers.state())


def test_learning_lowers_the_loss(make_awake: MakeAwake, batches: List[List[Sequence]]) -> None:
    awake = make_awake()
    reports = [awake.step(batches[i % 4], forget) for i in range(40)]
    first, last = (sum(r.surprise["b"] for r in part) for part in (reports[:4], reports[-4:]))
    assert last < first - 0.4


def poisoned(awake: Awake, batch: List[Sequence]) -> int:
    """Make the loss of one sequence of a batch infinite; returns the sequence's place."""
    inputs = [set(s.tokens[:-1].tolist()) for s in batch]
    bad = next(i for i in range(len(batch)) if inputs[i] - inputs[1 - i])
    token = min(inputs[bad] - inputs[1 - bad])
    with torch.no_grad():
        awake.model.embedding.weight[token] = math.inf
    return bad


@pytest.fixture(scope="module")
def mixed(setting: DataModule) -> List[Sequence]:
    """A batch with one sequence of each source."""
    sequences = list(setting.stream())
    return [sequences[0], next(s for s in sequences if s.source == "c")]


def learn_from(awake: Awake, sequences: Tensor, period: int) -> Dict[str, Tensor]:
    """Weights of fast after one plain step on `period` tokens' mean loss."""
    parameters = awake.model.parameters_of("fast")
    loss = awake.model.nll(sequences).sum()
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    return {n: p.detach() - 0.1 * g / period for (n, p), g in zip(parameters.items(), gradients, strict=True)}


def test_a_loss_that_is_not_finite_is_quarantined_and_the_rest_learned_from(
    make_awake: MakeAwake, mixed: List[Sequence]
) -> None:
    awake = make_awake(optimizer=SGD)
    bad = poisoned(awake, mixed)
    good = 1 - bad
    expected = learn_from(awake, torch.cat([rows([mixed[good]])] * 2), 2 * 16)
    records: List[Record] = []

    def log(given: List[Record]) -> Callable[[], None]:
        records.extend(given)
        return lambda: None

    reports = [awake.step(mixed, log) for _ in range(2)]
    for report in reports:
        assert report.quarantined == ((mixed[bad].key, mixed[bad].source, "loss is not finite"),)
        assert list(report.surprise) == list(report.bpb) == [mixed[good].source]
        assert math.isfinite(report.surprise[mixed[good].source])
    assert [record.kind for record in records[:2]] == ["quarantined" if i == bad else "real" for i in range(2)]
    assert awake.tokens == 64, "the stream has moved on by all tokens"
    assert reports[1].written == ("fast",), "what was sound of the period is learned from"
    for name, parameter in awake.model.parameters_of("fast").items():
        assert torch.allclose(parameter.detach(), expected[name], rtol=0, atol=1e-6), name


def test_a_quarantined_sequence_does_not_cost_the_rest_of_the_period(
    make_awake: MakeAwake, batches: List[List[Sequence]], mixed: List[Sequence]
) -> None:
    awake = make_awake(optimizer=SGD)
    reports: List[StepReport] = []
    for batch in [*batches[:3], mixed]:
        if batch is mixed:
            bad = poisoned(awake, mixed)
        reports.append(awake.step(batch, forget))
    assert [q[0] for q in reports[3].quarantined] == [mixed[bad].key]
    assert reports[3].written == ("fast", "medium")
    assert all(bool(torch.isfinite(w).all()) for w in parameters_of(awake.model, "learner").values())


def test_a_period_without_a_finite_loss_writes_nothing(make_awake: MakeAwake, batches: List[List[Sequence]]) -> None:
    awake = make_awake()
    with torch.no_grad():
        awake.model.head.weight.fill_(math.inf)
    before = parameters_of(awake.model, "learner")
    reports = [awake.step(batch, forget) for batch in batches[:4]]
    assert [len(report.quarantined) for report in reports] == [2] * 4
    assert [report.written for report in reports] == [()] * 4
    assert same(parameters_of(awake.model, "learner"), before)
    assert awake.tokens == 128 and awake.levels.optimizers.tokens == {"fast": 0, "medium": 0}


def close(a: Dict[str, Tensor], b: Dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[n], b[n], rtol=0, atol=1e-6) for n in a)


def test_adoption_replaces_the_slow_levels_and_shifts_the_fast_ones(
    make_awake: MakeAwake, make_model: Callable[..., NestedLM], batches: List[List[Sequence]]
) -> None:
    awake = make_awake()
    for batch in batches[:2]:
        awake.step(batch, forget)
    before = awake.unshifted()
    assert same(before, parameters_of(awake.model, "learner")), "nothing was adopted yet"
    for release in (4, 7):
        other = make_model(awake.model.level_configs, 257, seed=release)
        slow, offset = parameters_of(other, "pool"), parameters_of(other, "learner")
        shift = torch.cat([(offset[n] - awake.offset[n]).flatten() for n in offset]).double().norm()
        norm = awake.adopt(release, weights(other), offset)
        assert norm == pytest.approx(float(shift), rel=1e-6)
        assert awake.release == release
        assert same(parameters_of(awake.model, "pool"), slow)
        assert close(parameters_of(awake.model, "learner"), {n: before[n] + offset[n] for n in offset})
        assert close(awake.unshifted(), before), "u moves by the learner's own gradients only"
        for tensor in offset.values():
            tensor.zero_()  # the release's tensors stay the caller's
        assert close(awake.unshifted(), before)


def test_what_is_learned_after_an_adoption_is_kept_by_the_next(
    make_awake: MakeAwake, make_model: Callable[..., NestedLM], batches: List[List[Sequence]]
) -> None:
    awake = make_awake(optimizer=SGD)
    pinned = awake.unshifted()
    for batch in batches[:8]:
        awake.step(batch, forget)
    learned = {n: u - pinned[n] for n, u in awake.unshifted().items()}
    assert all(delta.abs().max() > 1e-4 for delta in learned.values())
    rest = parameters_of(make_model(awake.model.level_configs, 257, seed=5), "learner")
    awake.adopt(1, {**weights(awake.model), **rest}, {n: rest[n] - pinned[n] for n in rest})
    assert same(awake.rest, rest)
    assert close(parameters_of(awake.model, "learner"), {n: rest[n] + learned[n] for n in rest})


def test_the_next_records_name_the_release_that_scored_them(
    make_awake: MakeAwake, batches: List[List[Sequence]], store: ExperienceStore, tmp_path: Path
) -> None:
    awake = make_awake()
    awake.step(batches[0], durable(store))
    awake.adopt(3, weights(awake.model), awake.offset)
    awake.step(batches[1], durable(store))
    records = Snapshot.open(tmp_path / "store").records(np.arange(4))
    assert [record.release for record in records] == [0, 0, 3, 3]


@pytest.mark.parametrize("cut", [5, 7, 8])
def test_a_state_is_taken_up_exact_to_the_bit(
    make_awake: MakeAwake,
    make_model: Callable[..., NestedLM],
    batches: List[List[Sequence]],
    tmp_path: Path,
    cut: int,
) -> None:
    def started() -> Awake:
        awake = make_awake()
        awake.step(batches[0], forget)
        offset = parameters_of(make_model(awake.model.level_configs, 257, seed=9), "learner")
        awake.adopt(2, weights(awake.model), offset)
        for batch in batches[1:cut]:
            awake.step(batch, forget)
        return awake

    uninterrupted, first = started(), started()
    tensors, counters = first.state()
    assert counters == {"tokens": cut * 32, "release": 2}
    assert any(key.startswith("grad/") for key in tensors) == (cut % 4 != 0), "4 steps are a period of both levels"
    save_tensors(tmp_path / "learner", tensors, counters)
    del first, tensors

    second = make_awake(seed=1)
    load_into(second.model, parameters_of(uninterrupted.model, "pool"))
    second.load_state(*load_tensors(tmp_path / "learner"))
    for batch in batches[cut:16]:
        a, b = uninterrupted.step(batch, forget), second.step(batch, forget)
        assert (a.bpb, a.written, a.tokens) == (b.bpb, b.written, b.tokens)
    assert same(weights(uninterrupted.model), weights(second.model))
    assert same(uninterrupted.unshifted(), second.unshifted())
    assert same(uninterrupted.state()[0], second.state()[0])
    assert uninterrupted.levels.optimizers.writes == second.levels.optimizers.writes


def test_the_same_stream_gives_the_same_learner(make_awake: MakeAwake, batches: List[List[Sequence]]) -> None:
    one, two = make_awake(), make_awake()
    for batch in batches:
        a = one.step(batch, forget)
        torch.rand(3)  # what else happens in the process does not matter
        b = two.step(batch, forget)
        assert (a.bpb, a.surprise, a.written) == (b.bpb, b.surprise, b.written)
    assert same(one.state()[0], two.state()[0])
    assert same(weights(one.model), weights(two.model))


def test_recall_is_read_beside_the_model_and_changes_nothing_else(
    make_awake: MakeAwake, batches: List[List[Sequence]]
) -> None:
    plain, reading = make_awake(), make_awake()
    reading.recall = Recall(1 << 12)
    for batch in batches:
        alone, both = plain.step(batch, forget), reading.step(batch, forget)
        assert not alone.recalled and both.recalled.keys() == both.bpb.keys() == alone.bpb.keys()
        assert both.bpb == alone.bpb and both.surprise == alone.surprise
    assert same(weights(plain.model), weights(reading.model))
    again = {source: value for batch in batches for source, value in reading.step(batch, forget).recalled.items()}
    assert all(value < both.bpb[source] / 2 for source, value in again.items() if source in both.bpb)


def test_recall_goes_on_from_a_state(make_awake: MakeAwake, batches: List[List[Sequence]]) -> None:
    first, second = make_awake(), make_awake()
    first.recall, second.recall = Recall(1 << 8), Recall(1 << 8)
    for batch in batches[:10]:
        first.step(batch, forget)
    second.load_state(*first.state())
    for batch in batches[10:14]:
        assert first.step(batch, forget).recalled == second.step(batch, forget).recalled


def test_what_a_write_does_not_confirm_fades(make_awake: MakeAwake, batches: List[List[Sequence]]) -> None:
    plain, fading = make_awake(optimizer=SGD), make_awake(optimizer=SGD)
    fading.cfg = replace(fading.cfg, wake=replace(fading.cfg.wake, decay=0.25))
    written = next(report.written for batch in batches if (report := plain.step(batch, forget)).written)
    assert any(fading.step(batch, forget).written for batch in batches)
    for name, parameter in fading.model.parameters_of(written[0]).items():
        wanted = torch.lerp(whole := weights(plain.model)[name], fading.rest[name], 0.25)
        assert torch.allclose(parameter.detach(), wanted, rtol=0, atol=1e-7) and not torch.equal(whole, wanted)
