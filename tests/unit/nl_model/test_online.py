"""Levels shared by a batch: written when due, with exactly their tokens, however the stream is cut."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Dict, List

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

from nl_model.clock import LevelClock, written_share
from nl_model.config import LevelConfig, ModelConfig, OptimizerConfig
from nl_model.model import NestedLM
from nl_model.online import OnlineLevels

VOCAB = 13
SGD = OptimizerConfig(name="sgd", lr=0.05, beta1=0.0, clip=0.0, reduction="sum")
ADAM = OptimizerConfig(lr=1e-2, clip=1.0)


def shape(context: int = 4, wiring: str = "sequential") -> ModelConfig:
    return ModelConfig(dim=8, blocks=2, heads=2, context=context, wiring=wiring)


def build(periods: Dict[str, int], optimizer: OptimizerConfig, cfg: ModelConfig, unit: str = "tokens") -> NestedLM:
    """A model in float64 with weights everywhere; the last level named is the pool's."""
    names = list(periods)
    levels = {
        name: LevelConfig(
            period=period,
            width=6,
            blocks="all",
            unit=unit,
            optimizer=optimizer,
            owner="pool" if name == names[-1] else "learner",
        )
        for name, period in periods.items()
    }
    torch.manual_seed(0)
    model = NestedLM(cfg, levels, VOCAB).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def stream(sequences: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (sequences, length + 1), generator=torch.Generator().manual_seed(seed))


def weights(model: NestedLM, level: str) -> List[Tensor]:
    return [p.detach().clone() for p in model.parameters_of(level).values()]


def changed(before: List[Tensor], after: List[Tensor]) -> bool:
    return any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("unit", ["tokens", "steps"])
def test_check_1_a_level_changes_at_its_multiples_and_nowhere_else(unit: str) -> None:
    model = build({"fast": 1, "medium": 4, "slow": 12}, ADAM, shape(context=1), unit)
    step_tokens = 1 if unit == "tokens" else 2
    online = OnlineLevels(model, step_tokens=step_tokens)
    moments: Dict[str, List[int]] = {name: [] for name in online.names}
    sequences = stream(24 * step_tokens, 1)
    for step in range(1, 25):
        before = {name: weights(model, name) for name in online.names}
        online.learn(sequences[(step - 1) * step_tokens : step * step_tokens])
        for name in online.names:
            if changed(before[name], weights(model, name)):
                moments[name].append(step)
    assert moments["fast"] == list(range(1, 25))
    assert moments["medium"] == list(range(4, 25, 4)) and moments["slow"] == [12, 24]


def plain_steps(model: NestedLM, optimizer: torch.optim.Optimizer, batches: List[Tensor]) -> None:
    for batch in batches:
        optimizer.zero_grad()
        model.nll(batch).sum().backward()
        optimizer.step()


def test_check_2_all_periods_1_is_ordinary_training() -> None:
    sequences = stream(12, 1)
    for ours, kind, tolerance in (
        (SGD, lambda p: torch.optim.SGD(p, lr=0.05), 0.0),
        (replace(ADAM, clip=0.0), lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0), 1e-12),
    ):
        a, b = (build({"fast": 1, "slow": 1}, ours, shape(1)) for _ in range(2))
        OnlineLevels(a).learn(sequences)
        plain_steps(b, kind(b.parameters()), list(sequences.split(1)))
        difference = max(
            (x - y).detach().abs().max().item() for x, y in zip(a.parameters(), b.parameters(), strict=True)
        )
        assert difference <= tolerance


def test_checks_3_and_4_a_write_is_the_sum_of_exactly_its_tokens_gradients_at_the_chunks_start() -> None:
    sequences = stream(4, 4)
    model, plain = (build({"fast": 16, "slow": 16}, SGD, shape()) for _ in range(2))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    OnlineLevels(model).learn(sequences)
    plain_steps(plain, torch.optim.SGD(plain.parameters(), lr=0.05), [sequences])
    per_token: Dict[str, Tensor] = {n: torch.zeros_like(p) for n, p in before.items()}
    reference = build({"fast": 16, "slow": 16}, SGD, shape())
    for loss in reference.nll(sequences).flatten():
        for (name, _), g in zip(
            reference.named_parameters(),
            torch.autograd.grad(loss, list(reference.parameters()), retain_graph=True),
            strict=True,
        ):
            per_token[name] += g
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.detach(), dict(plain.named_parameters())[name].detach(), rtol=0, atol=1e-12
        )
        torch.testing.assert_close(parameter.detach(), before[name] - 0.05 * per_token[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("wiring", ["sequential", "nested", "independent"])
def test_check_5_how_the_stream_is_cut_into_calls_changes_nothing(wiring: str) -> None:
    sequences = stream(24, 4)
    states = []
    for cuts in ([24], [1] * 24, [5, 1, 7, 3, 8], [3, 13, 8]):
        model = build({"fast": 8, "medium": 16, "slow": 48}, ADAM, shape(wiring=wiring))
        online = OnlineLevels(model)
        losses = torch.cat([online.learn(part) for part in sequences.split(cuts)])
        states.append({**online.state_dict(), "losses": losses})
    for other in states[1:]:
        assert other.keys() == states[0].keys()
        for key, value in states[0].items():
            torch.testing.assert_close(other[key], value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("wiring", ["sequential", "nested"])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_check_9_resuming_twice_inside_a_period_is_bit_equal(wiring: str, name: str) -> None:
    optimizer = replace(ADAM, name=name)
    periods, sequences = {"fast": 8, "medium": 16, "slow": 64}, stream(40, 4)
    whole = OnlineLevels(build(periods, optimizer, shape(wiring=wiring)))
    whole.learn(sequences[:21])
    whole.learn(sequences[21:35])
    whole.learn(sequences[35:])
    resumed = OnlineLevels(build(periods, optimizer, shape(wiring=wiring)))
    for part in (sequences[:21], sequences[21:35], sequences[35:]):
        resumed.learn(part)
        state = resumed.state_dict()
        resumed = OnlineLevels(build(periods, optimizer, shape(wiring=wiring)))
        resumed.load_state_dict(state)
    left, right = whole.state_dict(), resumed.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


def test_a_snapshot_is_no_view_of_what_is_written_later() -> None:
    online = OnlineLevels(build({"fast": 4, "slow": 8}, ADAM, shape()))
    online.learn(stream(3, 4))
    snapshot = online.state_dict()
    kept = {k: v.clone() for k, v in snapshot.items()}
    online.learn(stream(5, 4, seed=1))
    assert all(torch.equal(snapshot[k], kept[k]) for k in kept)
    online.load_state_dict(snapshot)
    assert all(torch.equal(online.state_dict()[k], kept[k]) for k in kept)


def test_check_10_nested_levels_return_to_their_learned_start() -> None:
    model = build({"fast": 4, "medium": 12, "slow": 24}, ADAM, shape(wiring="nested"))
    online = OnlineLevels(model)
    assert online.starts is not None
    first = {k: p.detach().clone() for k, p in online.starts.starts["fast"].items()}
    for step, sequence in enumerate(stream(12, 4).split(1), start=1):
        online.learn(sequence)
        start = online.starts.starts["fast"]
        returned = all(torch.equal(p, start[k]) for k, p in model.parameters_of("fast").items())
        assert returned == (step % 3 == 0), step
    assert all(not torch.equal(p, first[k]) for k, p in online.starts.starts["fast"].items()), "the start is learned"


def test_check_10_independent_levels_with_one_hot_weights_are_that_single_mlp() -> None:
    model = build({"fast": 4, "medium": 8, "slow": 16}, ADAM, shape(wiring="independent"))
    single = build({"fast": 4, "medium": 8, "slow": 16}, ADAM, shape(wiring="sequential"))
    tokens = stream(2, 3)
    names = list(model.blocks[0].levels)  # type: ignore[union-attr,arg-type]
    for chosen, name in enumerate(names):
        with torch.no_grad():
            for block in model.blocks:
                block.mix.zero_()[chosen] = 1.0  # type: ignore[union-attr,operator]
            source = dict(model.named_parameters())
            for key, parameter in single.named_parameters():
                parameter.copy_(source[key])
                if ".levels." in key and f".{name}." not in key:
                    parameter.zero_()
        assert torch.equal(model(tokens), single(tokens))


def test_check_7_a_step_size_of_zero_leaves_the_logits_bit_identical() -> None:
    model = build({"fast": 4, "slow": 8}, replace(ADAM, lr=0.0), shape())
    tokens = stream(3, 3)
    before = model(tokens).detach()
    OnlineLevels(model).learn(stream(9, 4))
    assert torch.equal(model(tokens).detach(), before)


def test_check_12_the_share_written_per_token_is_the_papers() -> None:
    sizes = {"a": 100, "b": 100, "c": 100}
    share = written_share(sizes, {"a": 512, "b": 2048, "c": 8192})
    assert share == pytest.approx((100 / 512 + 100 / 2048 + 100 / 8192) / 300) and round(share, 5) == 0.00085
    model = build({"fast": 4, "medium": 8, "slow": 16}, SGD, shape())
    online, written = OnlineLevels(model), 0
    for sequence in stream(4, 4).split(1):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        online.learn(sequence)
        written += sum(p.numel() for n, p in model.named_parameters() if not torch.equal(before[n], p))
    sizes = model.level_sizes()
    assert written / 16 / sum(sizes.values()) == pytest.approx(
        written_share(sizes, LevelClock.of(model.level_configs).periods)
    )


def test_a_period_inside_a_sequence_is_refused() -> None:
    online = OnlineLevels(build({"fast": 2, "slow": 8}, ADAM, shape()))
    with pytest.raises(ValueError, match=r"the fastest period=2 tokens is no multiple of the 4 tokens"):
        online.learn(stream(1, 4))


def test_the_loss_in_training_mode_is_the_loss_in_evaluation_mode() -> None:
    model = build({"fast": 4, "slow": 8}, ADAM, shape())
    assert torch.equal(model.train().nll(stream(2, 4)), model.eval().nll(stream(2, 4)))


def _rank(rank: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    model = build({"fast": 1, "medium": 4, "slow": 16}, ADAM, shape(context=4), unit="steps").float()
    online = OnlineLevels(model, step_tokens=8, group=torch.distributed.group.WORLD)
    for sequence in stream(50, 4, seed=100 + rank).split(1):
        online.learn(sequence)
    torch.save({n: p.detach() for n, p in model.named_parameters()}, f"{folder}/rank-{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_with_different_data_stay_bit_identical(tmp_path: Path) -> None:
    mp.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    left, right = (torch.load(tmp_path / f"rank-{rank}.pt") for rank in range(2))
    start = dict(
        build({"fast": 1, "medium": 4, "slow": 16}, ADAM, shape(context=4), unit="steps").float().named_parameters()
    )
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert all(not torch.equal(left[name], start[name]) for name in left), "every level was written"
