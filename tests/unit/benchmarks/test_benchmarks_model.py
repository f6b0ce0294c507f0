"""The model benchmark: models of one size, every ratio there, memory counted to the byte; all of it at tiny sizes."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any, Callable, List

import pytest
import torch
from torch import nn

from benchmarks import model, peers, streaming
from benchmarks.interleave import Variant, interleave
from benchmarks.peak_memory import PeakMemory
from benchmarks.peers import Peer, Running, running_peers
from benchmarks.tables import Spread
from benchmarks.variants import NestedVariants, Shape, size_of

TINY = Shape(dim=32, blocks=2, heads=2, vocabulary=64, batch=2, context=128)

NAME = "titans-pytorch MAC"


def nested(shape: Shape) -> NestedVariants:
    return NestedVariants(shape, size_of(model.PlainTransformer(shape)))


def keeping(models: List[nn.Module]) -> Callable[[Any], Any]:
    """What a way does to the function it measures: nothing, but the model behind it is kept."""

    def keep(function: Any) -> Any:
        models.append(function.__self__)
        return function

    return keep


# -- the ways ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [TINY, Shape(), Shape(dim=128, blocks=3, heads=2, context=64)])
def test_the_models_have_as_many_parameters_as_the_plain_transformer(shape: Shape) -> None:
    with torch.device("meta"):
        ways = nested(shape)
        made = ways.build(ways.slow_width("attention"), (1, 1, 1), "steps", "attention")
    assert abs(size_of(made) / ways.parameters - 1) < 0.01
    assert min(made.level_sizes().values()) == 4 * shape.dim**2


def test_the_plain_transformer_is_causal_and_starts_near_uniform() -> None:
    torch.manual_seed(0)
    plain, tokens = model.PlainTransformer(TINY), TINY.draw()
    before = plain.nll(tokens)
    assert before.shape == (2, 128) and before.mean().item() == pytest.approx(4.16, rel=0.1)  # ln 64
    tokens[:, 64] = (tokens[:, 64] + 1) % 64
    after = plain.nll(tokens)
    assert torch.equal(after[:, :63], before[:, :63])
    assert bool((after[:, 63:] != before[:, 63:]).all())


@pytest.mark.parametrize(
    ("periods", "learned", "steps"),
    [((16, 64, 256), None, 4), ((1, 2, 256), ("fast", "medium"), 2), ((1, 1, 1), None, 2)],
)
def test_every_learned_level_is_written_within_a_visit_and_no_other(periods: Any, learned: Any, steps: int) -> None:
    models: List[Any] = []
    way = nested(TINY).levels(periods, learned, steps, change=keeping(models))
    assert (way.tokens, way.steps, way.parameters) == (256, steps, size_of(models[0]))
    for _ in range(2):  # the second visit as well
        before = {name: p.detach().clone() for name, p in models[0].named_parameters()}
        way.begin()
        for _ in range(way.steps):
            way.step()
        changed = {models[0].level_of(n) for n, p in models[0].named_parameters() if not torch.equal(p, before[n])}
        assert changed == set(learned or ("fast", "medium", "slow"))


def test_measure_takes_every_way_and_writes_every_ratio() -> None:
    threads = torch.get_num_threads()
    peer = Running({NAME: lambda: 1.0}, {NAME: 7}, {"gone": "it is not there"})
    figures = model.measure(TINY, repeats=1, compiled=False, peers=peer)
    assert torch.get_num_threads() == threads
    written = json.loads(json.dumps(figures.as_json()))
    wanted = {*model.REQUIRED, "wake_peak_memory", "all_levels_every_step", "forward", NAME, "gone"}
    assert {*written["ratios"], *written["missing"]} == wanted
    assert written["required"] == {**model.REQUIRED, "wake_peak_memory": 0.8}
    assert all(ratio > 0 for ratio in written["ratios"].values())
    assert figures.peak_bytes["wake_fast_only"] < figures.peak_bytes["all_levels_every_step"]
    assert written["parameters"][NAME] == 7
    text = model.render(figures)
    assert all(f"| {name} |" in text for name in figures.rates) and "wake_peak_memory" in text


def test_a_way_that_does_not_compile_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise torch._dynamo.exc.InternalTorchDynamoError("no such thing\nat some place")

    ways = {"good": Variant(lambda: None, 1), "bad": Variant(refuse, 1)}
    assert model._warm_up(ways) == {"bad": "torch.compile: no such thing"}
    monkeypatch.setattr(model.shutil, "which", lambda name: None)
    made, missing = model.builders(TINY, compiled=True)
    assert "no C++ compiler" in missing["wake_compiled"] and "wake_compiled" not in made


def test_ratios_are_taken_between_two_runs_of_the_reference() -> None:
    reference = iter([1.0, 3.0, 5.0, 1.0, 1.0, 1.0])
    way = {"a": iter([1.0, 2.0]), "b": iter([4.0, 0.5])}
    rates = interleave(lambda: next(reference), {n: lambda n=n: next(way[n]) for n in way}, repeats=2)
    assert rates["a"].ratio == Spread.of([2.0, 0.5]) and rates["b"].ratio == Spread.of([1.0, 2.0])
    assert rates["a"].tokens_per_s == Spread.of([1.0, 0.5]) and rates["reference"].ratio == Spread(1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="repeats=0 must be at least 1"):
        interleave(lambda: 1.0, {}, repeats=0)


# -- peers -------------------------------------------------------------------------------------------------------------

GOOD = """
import torch
from benchmarks.drivers.serve import serve, settings, tokens
asked = settings()
print("a banner", asked["variant"])
model = torch.nn.Linear(3, 5)
serve(asked, model, lambda: float(tokens(asked, 4).numel()))
"""


@pytest.fixture
def fake_drivers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree with drivers that need nothing but torch, run by this interpreter."""
    folder = tmp_path / "benchmarks" / "drivers"
    folder.mkdir(parents=True)
    shutil.copy(Path(peers.ROOT) / "benchmarks" / "drivers" / "serve.py", folder)
    (folder / "good.py").write_text(GOOD)
    (folder / "bad.py").write_text("raise SystemExit('cannot be\\n')")
    monkeypatch.setattr(peers, "ROOT", tmp_path)
    monkeypatch.setattr(peers, "install", lambda requirement, folder: Path(sys.executable))
    return tmp_path / "cache"


def test_peers_wait_for_their_turn_and_say_why_they_do_not_run(fake_drivers: Path) -> None:
    asked = {"good": Peer("x==1", "good", "", "v", {"batch": 1}, steps=3), "bad": Peer("x==1", "bad", "")}
    with running_peers(TINY, fake_drivers, asked) as running:
        assert running.parameters == {"good": 20} and running.missing == {"bad": "bad ended: cannot be"}
        assert 0 < running.visits["good"]() < 1
    with pytest.raises((RuntimeError, ValueError)):
        running.visits["good"]()  # over with the context


def test_a_package_that_pip_does_not_find_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripts = iter(["echo a warning >&2; echo no such package >&2; exit 1", "exit 0"])

    def fake_venv(home: Path, **_: Any) -> None:
        (home / "bin").mkdir(parents=True, exist_ok=True)
        (home / "bin" / "python").write_text(f"#!/bin/sh\n{next(scripts)}\n")
        (home / "bin" / "python").chmod(0o755)

    monkeypatch.setattr(peers.venv, "create", fake_venv)
    with pytest.raises(RuntimeError, match=r"pip install torch==\S+ none==1: no such package"):
        peers.install("none==1", tmp_path)
    python = peers.install("none==1", tmp_path)  # what failed is made anew
    assert python.exists() and peers.install("none==1", tmp_path) == python  # what is there is kept


# -- live bytes --------------------------------------------------------------------------------------------------------


def test_live_bytes_are_exact() -> None:
    with PeakMemory() as live:
        a = torch.ones(100, dtype=torch.float64)
        view = a[10:].view(9, 10)
        assert live.now == 800, "a view holds the same storage"
        a.add_(1)
        b = torch.cat([a, a])
        assert (live.now, live.peak) == (2400, 2400)
        del b
        assert (live.now, live.peak) == (800, 2400)
        live.restart()
        del a
        assert (live.now, live.peak) == (800, 800), "the view keeps it"
        del view
        assert live.now == 0


def test_live_bytes_see_what_a_training_step_keeps() -> None:
    """Weights, a saved input, gradients and two moments of one matrix: 100 x 50 float32."""
    with PeakMemory() as live:
        linear = nn.Linear(100, 50, bias=False)
        optimizer = torch.optim.AdamW(linear.parameters(), fused=True)
        weight = 4 * 100 * 50
        assert live.now == weight
        x = torch.ones(10, 100)
        y = linear(x)
        assert live.now == weight + 4 * 10 * 100 + 4 * 10 * 50
        del x  # autograd still needs it
        assert live.now == weight + 4 * 10 * 100 + 4 * 10 * 50
        y.sum().backward()
        del y
        assert live.now == 2 * weight
        optimizer.step()
        assert live.now == 4 * weight + 4, "and a step counter"
        optimizer.zero_grad(set_to_none=True)
        assert live.now == 3 * weight + 4


# -- the long stream ---------------------------------------------------------------------------------------------------


def test_a_stream_is_read_in_fixed_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "BLOCK", 1000)
    monkeypatch.setattr(streaming, "CALL", 100)
    figures = streaming.read("attention", tokens=4000)
    assert figures.early_state == figures.late_state > 0 and len(figures.microseconds) == 3
    assert figures.late_loss < figures.early_loss and all(t > 0 for t in figures.microseconds)
    assert "| attention | 4,000 |" in streaming.render({"attention": figures})
    assert streaming.as_json({"attention": figures})["streams"]["attention"]["growth"] == figures.growth
    with pytest.raises(ValueError, match="tokens=1999 must be at least 2000"):
        streaming.read("attention", tokens=1999)


def test_growth_and_drift() -> None:
    def flat(late: int, times: List[float]) -> bool:
        return streaming.StreamFigures(1, 1000, late, 1, 1, times, 1.0, 1.0).flat

    assert flat(1019, [1.0] * 8 + [1.09, 1.1])
    assert not flat(1021, [1.0] * 10)
    assert not flat(1000, [1.0] * 8 + [1.12, 1.11])
    assert flat(1000, [1.0, 1.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 1.0, 1.0]), "only the ends count"
