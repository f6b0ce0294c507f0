"""Growth: the larger model computes what the trained one did, and what is new learns."""

from __future__ import annotations

from dataclasses import replace
from typing import Callable, Dict, Tuple

import pytest
import torch
from torch import Tensor

from nl_model.config import LevelConfig, ModelConfig
from nl_model.growth import grow, grow_model, place_blocks
from nl_model.memory.config import MemoryConfig
from nl_model.model import NestedLM
from nl_model.slots import SlotConfig, add_slots

VOCAB = 17
SHAPE = ModelConfig(dim=8, blocks=2, heads=2, context=16)
Levels = Dict[str, LevelConfig]
Target = Tuple[ModelConfig, Levels]


def levels(fast: int = 6, medium: int = 5, slow: int = 7, where: str = "last_half", **more: LevelConfig) -> Levels:
    return {
        "fast": LevelConfig(period=4, width=fast, blocks=where),
        "medium": LevelConfig(period=8, width=medium, blocks=where),
        "slow": LevelConfig(period=16, width=slow, blocks="all", owner="pool"),
        **more,
    }


TARGETS: Dict[str, Target] = {
    "the same": (SHAPE, levels()),
    "wider MLPs": (SHAPE, levels(9, 5, 30)),
    "more blocks": (replace(SHAPE, blocks=5), levels()),
    "a new level": (SHAPE, levels(glacial=LevelConfig(period=32, width=4, blocks="all", owner="pool"))),
    "more context": (replace(SHAPE, context=32), levels()),
    "wider residual": (replace(SHAPE, dim=20, heads=5), levels()),
    "everything": (replace(SHAPE, dim=16, heads=4, blocks=4), levels(8, 8, 20, "last_half")),
}


def tokens(batch: int = 3, length: int = 16) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


def parameters(model: NestedLM) -> Dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("wiring", ["sequential", "independent"])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=str)
@pytest.mark.parametrize("target", TARGETS.values(), ids=list(TARGETS))
def test_logits_stay(
    make_model: Callable[..., NestedLM], target: Target, dtype: torch.dtype, close: float, wiring: str
) -> None:
    shape = replace(SHAPE, wiring=wiring)
    model = make_model(levels(), VOCAB, dtype=dtype, shape=shape)
    larger = grow_model(model, replace(target[0], wiring=wiring), target[1], seed=3)
    before, after = model(tokens()).detach(), larger(tokens()).detach()
    assert after.dtype == dtype and float(before.std()) > 0.1
    assert float((after - before).abs().max() / before.abs().max()) < close


@pytest.mark.parametrize("target", TARGETS.values(), ids=list(TARGETS))
def test_everything_new_learns(make_model: Callable[..., NestedLM], target: Target) -> None:
    """At the first step what is written, from the second on all of it: no unit is dead or a copy of another."""
    model = make_model(levels(), VOCAB, dtype=torch.float64, shape=SHAPE)
    larger = grow_model(model, *target, seed=3)
    fresh = parameters(larger)
    optimizer = torch.optim.SGD(larger.parameters(), lr=0.3)
    sequences = torch.randint(VOCAB, (8, 17), generator=torch.Generator().manual_seed(2))
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = larger.nll(sequences).mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    for name, parameter in larger.named_parameters():
        still = parameter.detach() == fresh[name]
        if name == "embedding.weight":
            still = still[sequences[:, :-1].unique()]
        assert not bool(still.any()), f"{int(still.sum())} of {still.numel()} weights of {name} did not move"
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("layers", [1, 2])
def test_a_model_with_memories_grows_in_width_and_depth(layers: int) -> None:
    shape = replace(SHAPE, mixer="titans", memory=MemoryConfig(layers=layers, eta_max=0.1, chunk=8, mem_chunk=8))
    model = NestedLM(shape, levels(), VOCAB).double().reset_parameters(0)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("out.weight", "down.weight", "head.weight")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    larger = grow_model(model, replace(shape, blocks=4), levels(8, 8, 12))
    before = model(tokens()).detach()
    assert float((larger(tokens()) - before).detach().abs().max() / before.abs().max()) < 1e-12
    with pytest.raises(ValueError, match=r"model\.dim=16 must stay 8 with model.mixer=titans"):
        grow_model(model, replace(shape, dim=16, heads=4), levels())


def test_growth_is_a_function_of_its_seed_and_touches_no_input(make_model: Callable[..., NestedLM]) -> None:
    model = make_model(levels(), VOCAB, shape=SHAPE)
    state = parameters(model)
    one, same, other = (grow(SHAPE, levels(), state, *TARGETS["everything"], seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(one[n], same[n]) for n in one) and not all(torch.equal(one[n], other[n]) for n in one)
    assert all(torch.equal(p, state[n]) for n, p in model.named_parameters())
    assert list(one) == [n for n, _ in NestedLM(*TARGETS["everything"], VOCAB).named_parameters()]


def test_blocks_spread_evenly_or_as_high_as_their_levels_let_them() -> None:
    four, eight = replace(SHAPE, blocks=4), replace(SHAPE, blocks=8)
    everywhere = levels(where="all")
    assert place_blocks(four, everywhere, eight, everywhere) == [1, 3, 5, 7]
    assert place_blocks(four, levels(where="last_half"), eight, levels(where="last_half")) == [1, 3, 5, 7]
    assert place_blocks(four, levels(where="1"), eight, levels(where="1")) == [0, 1, 6, 7]
    with pytest.raises(ValueError, match=r"block 3 with levels fast, medium, slow has no place .* model\.blocks=8"):
        place_blocks(four, levels(where="3"), eight, levels(where="1"))


def test_places_can_be_given(make_model: Callable[..., NestedLM]) -> None:
    model = make_model(levels(where="all"), VOCAB, dtype=torch.float64, shape=SHAPE)
    target = replace(SHAPE, blocks=4), levels(where="all")
    before = model(tokens()).detach()
    for places in ((0, 1), (0, 3), (2, 3)):
        larger = grow_model(model, *target, places=places)
        assert torch.equal(
            larger.blocks[places[0]].levels["slow"].up.weight,  # type: ignore[index,union-attr]
            model.blocks[0].levels["slow"].up.weight,  # type: ignore[index,union-attr]
        )
        assert float((larger(tokens()) - before).detach().abs().max()) < 1e-12 * float(before.abs().max())
    for wrong in ((1, 0), (0,), (2, 4), (-1, 2)):
        with pytest.raises(ValueError, match="must be 2 ascending block numbers below 4"):
            grow_model(model, *target, places=wrong)
    with pytest.raises(ValueError, match="level fast of block 0 does not sit in block 1"):
        grow_model(model, replace(SHAPE, blocks=4), levels(where="0,3"), places=(1, 3))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ((replace(SHAPE, dim=4), levels()), "model.dim=4 must be at least 8"),
        ((replace(SHAPE, blocks=1), levels()), "model.blocks=1 must be at least 2"),
        ((replace(SHAPE, context=8), levels()), "model.context=8 must be at least 16"),
        ((SHAPE, levels(slow=6)), "levels.slow.width=6 must be at least 7"),
        ((SHAPE, {k: v for k, v in levels().items() if k != "medium"}), "levels.medium is missing"),
        ((replace(SHAPE, dim=16), levels()), "model.heads=2 changes the width of a head; .* use heads=4"),
        ((replace(SHAPE, window=4), levels()), "model.window=4 cannot be grown into from 0"),
        (
            (SHAPE, {**levels(), "fast": replace(levels()["medium"], width=6), "medium": levels()["fast"]}),
            "levels.medium.width=6|the periods order them as medium, fast, slow",
        ),
    ],
)
def test_what_is_no_growth_is_refused(make_model: Callable[..., NestedLM], target: Target, message: str) -> None:
    model = make_model(levels(), VOCAB, shape=SHAPE)
    with pytest.raises(ValueError, match=message):
        grow_model(model, *target)


def test_slots_are_folded_before_growing(make_model: Callable[..., NestedLM]) -> None:
    model = add_slots(make_model(levels(), VOCAB, shape=SHAPE), ["slow"], SlotConfig())
    with pytest.raises(ValueError, match="belongs to an expert slot; fold the slots"):
        grow_model(model, SHAPE, levels())
