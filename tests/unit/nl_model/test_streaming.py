"""Per-sequence fast state: isolated rows, any call sizes, causal, resettable, fixed memory (checks 5, 6, 7, 8, 9)."""

from __future__ import annotations

from dataclasses import replace
from typing import Dict, List

import pytest
import torch
from torch import Tensor

from nl_model.config import LevelConfig, ModelConfig, OptimizerConfig
from nl_model.memory.config import MemoryConfig
from nl_model.model import NestedLM
from nl_model.online import OnlineLevels
from nl_model.streaming import StreamingModel, read_stream

VOCAB = 17
ADAM = OptimizerConfig(lr=3e-2, clip=1.0)
MIXERS = {
    "attention": ModelConfig(dim=8, blocks=3, heads=2, context=64),
    "window": ModelConfig(dim=8, blocks=3, heads=2, context=64, window=5),
    "titans": ModelConfig(
        dim=8, blocks=3, heads=2, context=64, mixer="titans", memory=MemoryConfig(chunk=3, mem_chunk=6)
    ),
}


def build(cfg: ModelConfig, optimizer: OptimizerConfig = ADAM) -> NestedLM:
    levels = {
        "fast": LevelConfig(period=4, width=6, blocks="1,2", optimizer=optimizer),
        "medium": LevelConfig(period=8, width=5, blocks="2", optimizer=optimizer),
        "slow": LevelConfig(period=64, width=7, blocks="all", owner="pool"),
    }
    model = NestedLM(cfg, levels, VOCAB).reset_parameters(1).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if cfg.mixer == "titans" and ".mixer." in name and not name.endswith("out.weight"):
                continue  # their scales belong together
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model.requires_grad_(False)


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def rows(flat: Dict[str, Tensor], chosen: List[int]) -> Dict[str, Tensor]:
    return {k: v[chosen] if v.dim() > 0 and "step" not in k else v for k, v in flat.items()}


def close(left: Dict[str, Tensor], right: Dict[str, Tensor], tolerance: float) -> None:
    assert left.keys() == right.keys()
    for key, value in left.items():
        torch.testing.assert_close(value, right[key], rtol=0, atol=tolerance, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("mixer", MIXERS)
def test_check_5_how_a_stream_is_cut_into_calls_changes_nothing(mixer: str) -> None:
    model, read = build(MIXERS[mixer]), tokens(2, 27)
    outcomes = []
    for cuts in ([27], [1] * 27, [3, 2, 9, 13], [4, 4, 4, 4, 4, 4, 3], [25, 2]):
        stream = StreamingModel(model, 2)
        logits = torch.cat([stream.feed(part) for part in read.split(cuts, 1)], 1)
        outcomes.append({**stream.state_dict(), "logits": logits})
    for other in outcomes[1:]:
        close(other, outcomes[0], 1e-12)


@pytest.mark.parametrize("mixer", MIXERS)
def test_without_writes_it_reads_like_the_model_itself(mixer: str) -> None:
    model, read = build(MIXERS[mixer]), tokens(2, 27)
    stream = StreamingModel(model, 2, learn=False)
    logits = torch.cat([stream.feed(part) for part in read.split([5, 1, 21], 1)], 1)
    torch.testing.assert_close(logits, model(read), rtol=0, atol=1e-12)


def test_writing_lowers_the_loss_of_what_repeats_and_the_model_stays_as_it_is() -> None:
    model = build(MIXERS["window"])
    before = {n: p.clone() for n, p in model.named_parameters()}
    read = tokens(3, 8).repeat(1, 12)
    learned, count = read_stream(StreamingModel(model, 3), read, call=10)
    frozen, _ = read_stream(StreamingModel(model, 3, learn=False), read, call=10)
    assert count == 95 and bool((learned < frozen - 0.1).all())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("mixer", MIXERS)
def test_check_6_a_token_changes_no_output_before_it(mixer: str) -> None:
    model, read = build(MIXERS[mixer]), tokens(1, 24)
    base = StreamingModel(model, 1).feed(read)
    for at in (0, 3, 4, 7, 8, 15, 23):
        other = read.clone()
        other[:, at] = (other[:, at] + 1) % VOCAB
        logits = StreamingModel(model, 1).feed(other)
        assert torch.equal(logits[:, :at], base[:, :at]), at
        assert not torch.equal(logits[:, at], base[:, at])


def test_check_6_no_weights_are_used_before_the_end_of_their_chunk() -> None:
    """Within a chunk the logits are those of the weights at its start, whatever the targets of the chunk are."""
    model, read = build(MIXERS["attention"]), tokens(1, 12)
    stream = StreamingModel(model, 1)
    stream.feed(read[:, :5])
    weights = {n: p.detach().clone() for n, p in stream.weights().items()}
    frozen = model.run(read[:, 4:8], stream.chunk_states, weights, 4)[0]
    torch.testing.assert_close(stream.feed(read[:, 5:8]), frozen[:, 1:], rtol=0, atol=1e-12)
    assert all(torch.equal(p, weights[n]) for n, p in stream.weights().items())


@pytest.mark.parametrize("optimizer", [ADAM, OptimizerConfig(name="sgd", lr=0.3, clip=0.5, reduction="sum")])
@pytest.mark.parametrize("mixer", MIXERS)
def test_check_8_a_batch_of_sequences_is_as_many_runs_of_one(mixer: str, optimizer: OptimizerConfig) -> None:
    model, read = build(MIXERS[mixer], optimizer), tokens(4, 27)
    together = StreamingModel(model, 4)
    logits = together.feed(read)
    for row in range(4):
        alone = StreamingModel(model, 1)
        torch.testing.assert_close(alone.feed(read[row : row + 1]), logits[row : row + 1], rtol=0, atol=1e-10)
        close(alone.state_dict(), rows(together.state_dict(), [row]), 1e-10)
    order = [2, 0, 3, 1]
    permuted = StreamingModel(model, 4)
    torch.testing.assert_close(permuted.feed(read[order]), logits[order], rtol=0, atol=1e-10)
    close(permuted.state_dict(), rows(together.state_dict(), order), 1e-10)


@pytest.mark.parametrize("name", ["m3", "muon", "delta_momentum", "deep_momentum", "sgd"])
def test_check_9_holds_for_every_optimizer(name: str) -> None:
    """Steps that an optimizer counts by itself are part of the state too (m3 turns its slow momentum by them)."""
    optimizer = OptimizerConfig(name=name, lr=1e-2, slow_period=3)
    model, read = build(MIXERS["attention"], optimizer), tokens(2, 60)
    stream = StreamingModel(model, 2)
    start = stream.feed(read[:, :21])
    snapshot = stream.state_dict()
    first = stream.feed(read[:, 21:])
    other = StreamingModel(model, 2)
    for again in (stream, other):
        again.load_state_dict(snapshot)
        assert torch.equal(again.feed(read[:, 21:]), first)
    stream.reset()
    assert torch.equal(stream.feed(read[:, :21]), start)


@pytest.mark.parametrize(
    ("shape", "said"), [((3, 4), "batch=2"), ((2, 0), "at least 1"), ((4,), r"\(4,\)")], ids=["batch", "none", "flat"]
)
def test_tokens_of_another_shape_are_named(shape: tuple[int, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        StreamingModel(build(MIXERS["attention"]), 2).feed(torch.zeros(shape, dtype=torch.int64))


def test_a_state_of_another_batch_or_of_nothing_is_refused() -> None:
    model = build(MIXERS["attention"])
    one, two = StreamingModel(model, 1), StreamingModel(model, 2)
    for state in (one.state_dict(), {}):
        with pytest.raises(ValueError, match="load a state of the same model, levels and batch"):
            two.load_state_dict(state)


@pytest.mark.parametrize("names", [["fsat"], [], "fast"])
def test_levels_that_are_not_there_are_named(names: list[str]) -> None:
    model = build(MIXERS["attention"])
    for make in (lambda: StreamingModel(model, 2, names), lambda: OnlineLevels(model, names)):
        with pytest.raises(ValueError, match="must list levels of the model; it has"):
            make()


def test_online_levels_name_wrong_sequences_and_states() -> None:
    online = OnlineLevels(build(MIXERS["attention"]))
    for shape in ((5,), (2, 1), (0, 5)):
        with pytest.raises(ValueError, match="learn\\(\\) takes"):
            online.learn(torch.zeros(shape, dtype=torch.int64))
    with pytest.raises(ValueError, match="load a state of the same model and levels"):
        online.load_state_dict({})


@pytest.mark.parametrize("mixer", MIXERS)
def test_check_9_rollback_is_exact_to_the_bit_and_reset_is_the_start(mixer: str) -> None:
    model, read = build(MIXERS[mixer]), tokens(2, 40)
    stream = StreamingModel(model, 2)
    start = stream.state_dict()
    stream.feed(read[:, :14])
    snapshot = stream.state_dict()
    first = stream.feed(read[:, 14:])
    stream.load_state_dict(snapshot)
    assert torch.equal(stream.feed(read[:, 14:]), first)
    other = StreamingModel(model, 2)
    other.load_state_dict(snapshot)
    assert torch.equal(other.feed(read[:, 14:]), first), "in another process just so"
    stream.reset()
    again = stream.state_dict()
    assert again.keys() == start.keys() and all(torch.equal(again[k], start[k]) for k in start)


def test_one_row_is_reset_by_itself() -> None:
    model, read = build(MIXERS["window"]), tokens(3, 16)
    stream = StreamingModel(model, 3)
    stream.feed(read)
    before = {n: p.detach().clone() for n, p in stream.weights().items()}
    stream.reset([1])
    for name, weight in stream.weights().items():
        rest = dict(model.named_parameters())[name]
        assert torch.equal(weight[1], rest) and not torch.equal(weight[0], rest)
        assert torch.equal(weight[[0, 2]], before[name][[0, 2]])


def test_check_7_with_step_size_zero_the_logits_are_the_models_bit_for_bit() -> None:
    model, read = build(MIXERS["attention"], replace(ADAM, lr=0.0)), tokens(2, 20)
    zero = StreamingModel(model, 2).feed(read)
    assert torch.equal(zero, StreamingModel(model, 2).feed(read))
    torch.testing.assert_close(zero, model(read), rtol=0, atol=1e-12)


def test_the_state_of_a_windowed_stream_does_not_grow() -> None:
    model = build(MIXERS["window"])
    stream = StreamingModel(model, 1)

    def size() -> int:
        return sum(t.numel() for t in stream.state_dict().values())

    stream.feed(tokens(1, 40))
    early = size()
    stream.feed(tokens(1, 400, seed=1))
    assert size() == early


def test_clear_errors() -> None:
    model = build(MIXERS["attention"])
    with pytest.raises(ValueError, match=r"tokens have shape \(3, 4\); this stream was made for batch=2"):
        StreamingModel(model, 2).feed(tokens(3, 4))
    with pytest.raises(ValueError, match=r"level slow holds embedding\.weight"):
        StreamingModel(model, 2, names=["fast", "slow"])
