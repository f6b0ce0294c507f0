"""Generation: seeded draws, the same text with and without a cache, writing by switch."""

from __future__ import annotations

import pytest
import torch

from nl_model.generate import SamplingConfig, complete, generate, sample
from nl_model.streaming import StreamingModel
from tests.unit.nl_model.test_streaming import MIXERS, build, tokens

GREEDY = SamplingConfig(temperature=0.0)


@pytest.mark.parametrize("mixer", MIXERS)
def test_with_states_it_says_what_reading_everything_again_would(mixer: str) -> None:
    model, text = build(MIXERS[mixer]), tokens(2, 5)
    fast = complete(model, text, 20, GREEDY)
    for _ in range(20):
        text = torch.cat([text, model(text)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(fast, text)


def test_a_seed_is_a_text() -> None:
    model, text = build(MIXERS["window"]), tokens(3, 5)
    cfg = SamplingConfig(temperature=0.9, top_k=5, top_p=0.9, seed=4)
    assert torch.equal(complete(model, text, 30, cfg), complete(model, text, 30, cfg))
    assert not torch.equal(
        complete(model, text, 30, cfg), complete(model, text, 30, SamplingConfig(0.9, 5, 0.9, seed=5))
    )


def test_draws_follow_the_distribution_and_its_cuts() -> None:
    probability = torch.tensor([0.5, 0.25, 0.15, 0.06, 0.04])
    logits = probability.log().expand(20_000, 5)
    generator = torch.Generator().manual_seed(0)

    def share(cfg: SamplingConfig) -> torch.Tensor:
        return torch.bincount(sample(logits, cfg, generator), minlength=5) / 20_000

    torch.testing.assert_close(share(SamplingConfig()), probability, rtol=0, atol=0.015)
    torch.testing.assert_close(share(SamplingConfig(top_k=2))[:2], torch.tensor([2 / 3, 1 / 3]), rtol=0, atol=0.015)
    assert float(share(SamplingConfig(top_k=2))[2:].sum()) == 0
    nucleus = share(SamplingConfig(top_p=0.8))
    assert bool((nucleus[:3] > 0).all()) and float(nucleus[3:].sum()) == 0
    assert float(share(SamplingConfig(top_p=0.01))[0]) == 1
    squared = probability.square() / probability.square().sum()
    torch.testing.assert_close(share(SamplingConfig(temperature=0.5)), squared, rtol=0, atol=0.015)


def test_writing_while_it_reads_changes_what_it_says() -> None:
    model, text = build(MIXERS["window"]), tokens(2, 30).repeat(1, 4)
    assert not torch.equal(complete(model, text, 25, GREEDY, learn=True), complete(model, text, 25, GREEDY))
    stream = StreamingModel(model, 2)
    stream.feed(text[:, :60])
    spoken = torch.stack(list(generate(model, text[:, 60:], 25, GREEDY, stream=stream)), 1)
    assert torch.equal(spoken, complete(model, text, 25, GREEDY, learn=True)[:, text.size(1) :])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0 must be at least 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": -1}, "top_k=-1 must be at least 0"),
        ({"top_p": 0.0}, r"top_p=0.0 must lie in \(0, 1\]"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**settings)  # type: ignore[arg-type]


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the prompt has shape \(2, 0\)"):
        next(generate(build(MIXERS["window"]), torch.zeros(2, 0, dtype=torch.long), 3))
