"""The model: neutral where it is new, causal, and split into levels without rest."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Callable, Dict, List

import pytest
import torch
from torch import Tensor

from nl_model.config import LevelConfig, ModelConfig, OptimizerConfig, check_levels
from nl_model.model import NestedLM

Levels = Dict[str, LevelConfig]
SHAPE = ModelConfig(dim=12, blocks=4, heads=2, context=10)
VOCAB = 23


@pytest.fixture
def levels() -> Levels:
    """fast in the upper half, medium in the last block, slow everywhere; slow named first on purpose."""
    return {
        "slow": LevelConfig(period=64, width=9, blocks="all", owner="pool"),
        "medium": LevelConfig(period=16, width=5, blocks="3"),
        "fast": LevelConfig(period=4, width=6, blocks="last_half"),
    }


@pytest.fixture
def model(levels: Levels, make_model: Callable[..., NestedLM]) -> NestedLM:
    return make_model(levels, VOCAB, shape=SHAPE)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(VOCAB, (3, SHAPE.context), generator=torch.Generator().manual_seed(1))


def test_the_first_loss_is_ln_vocab(levels: Levels, tokens: Tensor) -> None:
    nll = NestedLM(SHAPE, levels, VOCAB).reset_parameters(0).nll(tokens)
    assert nll.shape == (3, SHAPE.context - 1) and nll.dtype == torch.float32
    assert (nll - math.log(VOCAB)).abs().max() < 1e-6


def test_new_learner_levels_are_neutral(levels: Levels, model: NestedLM, tokens: Tensor) -> None:
    fresh = dict(NestedLM(SHAPE, levels, VOCAB).reset_parameters(5).named_parameters())
    owned = dict(model.named_parameters())
    with torch.no_grad():
        for name in model.owned_by("learner"):
            owned[name].copy_(fresh[name])
        before = model(tokens)
        for name in model.owned_by("learner"):
            if name.endswith("up.weight"):
                owned[name].normal_(0.0, 50.0, generator=torch.Generator().manual_seed(2))
        assert torch.equal(model(tokens), before)
        owned["blocks.3.levels.fast.down.weight"].fill_(0.1)
        assert not torch.equal(model(tokens), before)


def test_train_mode_equals_eval_mode(model: NestedLM, tokens: Tensor) -> None:
    assert torch.equal(model.train()(tokens), model.eval()(tokens))


@pytest.mark.parametrize("t", [0, 4, SHAPE.context - 1])
def test_causality(model: NestedLM, tokens: Tensor, t: int) -> None:
    """Check 6 of nested learning's list of executable checks: changing token t changes no output before t."""
    changed = tokens.clone()
    changed[:, t] = (changed[:, t] + 1) % VOCAB
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :t], after[:, :t])
    assert (before[:, t:] != after[:, t:]).flatten(2).any(-1).all(), "everything from t on sees the change"


def test_sequences_of_a_batch_do_not_meet(model: NestedLM, tokens: Tensor) -> None:
    """Check 8 of nested learning's list of executable checks, for the forward pass."""
    with torch.no_grad():
        whole = model(tokens)
        for i in range(len(tokens)):
            assert torch.allclose(model(tokens[i : i + 1])[0], whole[i], rtol=0, atol=1e-5)


def test_backward_of_the_learner_stops_at_its_lowest_block(model: NestedLM, tokens: Tensor) -> None:
    differentiable: List[bool] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _module, _inputs, output: differentiable.append(output[0].requires_grad))
    model.train_only("learner").nll(tokens).sum().backward()
    assert differentiable == [False, False, True, True]
    for name, parameter in model.named_parameters():
        if model.level_of(name) == "slow":
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_train_only_can_be_turned_round(model: NestedLM, tokens: Tensor) -> None:
    model.train_only("learner").train_only("pool").nll(tokens).sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == set(model.owned_by("pool"))


def test_levels_partition_the_parameters(model: NestedLM) -> None:
    names = [name for name, _ in model.named_parameters()]
    assert sorted(model.owned_by("learner") + model.owned_by("pool")) == sorted(names)
    assert sorted(n for level in model.level_names for n in model.parameters_of(level)) == sorted(names)
    assert model.level_names == ("fast", "medium", "slow")
    for name in ("embedding.weight", "head.weight", "blocks.0.mixer.qkv.weight", "blocks.3.mixer.out.weight"):
        assert model.level_of(name) == "slow"
    assert model.level_of("blocks.3.levels.medium.up.weight") == "medium"
    assert {n.split(".")[1] for n in model.parameters_of("fast")} == {"2", "3"}
    assert model.level_sizes() == {
        level: sum(p.numel() for p in model.parameters_of(level).values()) for level in model.level_names
    }
    assert model.level_sizes()["medium"] == 2 * SHAPE.dim * 5


def test_the_chain_of_a_block_runs_from_fast_to_slow(model: NestedLM) -> None:
    assert [list(block.levels) for block in model.blocks] == [  # type: ignore[arg-type]
        ["slow"],
        ["slow"],
        ["fast", "slow"],
        ["fast", "medium", "slow"],
    ]


def test_reset_parameters_neither_uses_nor_moves_the_global_generator(levels: Levels) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    model = NestedLM(SHAPE, levels, VOCAB)
    torch.set_rng_state(before)
    first = [p.detach().clone() for p in model.reset_parameters(7).parameters()]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(first, model.reset_parameters(7).parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first, model.reset_parameters(8).parameters(), strict=True))


def level(**values: Any) -> LevelConfig:
    return LevelConfig(**{"period": 4, "width": 3, **values})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"fast": level()}, "owner=pool"),
        ({"slow": level(owner="pool")}, "owner=learner"),
        ({"fast": level(), "slow": level(period=6, owner="pool")}, r"levels\.slow\.period=6 .*levels\.fast\.period=4"),
        ({"slow": level(owner="pool"), "late": level(period=8)}, r"levels\.late .*levels\.slow"),
        ({"fast": level(blocks="4"), "slow": level(owner="pool")}, r"levels\.fast: blocks='4'"),
        ({"fast": level(blocks="-1"), "slow": level(owner="pool")}, r"levels\.fast: blocks='-1'"),
        ({"fast": level(), "slow": level(owner="pool", blocks="first")}, r"levels\.slow: blocks='first'"),
        ({"fast": level(), "slow": level(owner="pool", blocks="")}, r"levels\.slow: blocks=''"),
    ],
)
def test_wrong_levels_are_named(wrong: Levels, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NestedLM(SHAPE, wrong, VOCAB)
    with pytest.raises(ValueError, match=message):
        check_levels(wrong, SHAPE.blocks)


@pytest.mark.parametrize(
    ("values", "key"),
    [({"period": 0}, "period=0"), ({"width": -1}, "width=-1"), ({"owner": "nobody"}, "owner='nobody'")],
)
def test_wrong_values_of_a_level_are_named(values: Dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=key):
        level(**values)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"name": "adam"}, r"optimizer\.name='adam'"),
        ({"reduction": "max"}, r"optimizer\.reduction='max'"),
        ({"lr": -1.0}, r"optimizer\.lr=-1\.0"),
        ({"lr": math.nan}, r"optimizer\.lr=nan"),
        ({"beta2": 1.0}, "beta2=1.0"),
        ({"clip": -0.5}, r"optimizer\.clip=-0\.5"),
    ],
)
def test_wrong_values_of_an_optimizer_are_named(values: Dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=key):
        OptimizerConfig(**values)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"dim": 0}, r"model\.dim=0"),
        ({"heads": 5}, r"model\.heads=5"),
        ({"heads": 4}, r"model\.heads=4"),  # an odd head width
        ({"context": -2}, r"model\.context=-2"),
    ],
)
def test_wrong_shapes_are_named(values: Dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=key):
        replace(SHAPE, **values)


@pytest.mark.parametrize(
    ("blocks", "indices"),
    [("all", (0, 1, 2, 3)), ("last_half", (2, 3)), ("last_quarter", (3,)), ("2,0,2", (0, 2)), ("1", (1,))],
)
def test_block_indices(blocks: str, indices: tuple[int, ...]) -> None:
    assert level(blocks=blocks).block_indices(4) == indices
    assert level(blocks="last_quarter").block_indices(1) == (0,)


@pytest.mark.parametrize("mixer", ["attention", "titans"])
def test_checkpointing_runs_blocks_again_for_exactly_the_same_gradients(
    mixer: str, make_model: Callable[..., NestedLM], make_levels: Callable[..., Dict[str, LevelConfig]]
) -> None:
    model = make_model(make_levels(), dtype=torch.float64, shape=replace(SHAPE, mixer=mixer))
    tokens = torch.randint(257, (3, SHAPE.context + 1), generator=torch.Generator().manual_seed(0))
    runs: List[int] = []
    model.blocks[0].register_forward_pre_hook(lambda module, inputs: runs.append(0))
    found = []
    for model.checkpointing in (False, True):
        model.zero_grad()
        loss = model.nll(tokens).mean()
        loss.backward()
        found.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
        runs.append(1)
    assert runs == [0, 1, 0, 0, 1]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    with torch.no_grad():
        model.nll(tokens)
    assert runs == [0, 1, 0, 0, 1, 0], "nothing is run twice where no gradient is taken"
