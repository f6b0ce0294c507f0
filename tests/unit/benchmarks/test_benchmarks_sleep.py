"""The benchmark of sleep on ranks: counters that count, steps that are sleep steps, a page with every figure."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.interleave import Rate
from benchmarks.scaling import Calls, Link, curve
from benchmarks.sleep import Figures, Handover, Traffic, cadence_of, costs_of, measure, predict, render
from benchmarks.sleep_ranks import AWAKE, BESIDE, PARALLEL, PLAIN, UNGUIDED, Lessons, Ranks, Task, measure_here
from benchmarks.tables import Spread
from benchmarks.traffic import file_bytes, socket_bytes
from nl_model.weights import save_tensors
from pipelines.config.schema import Config
from pipelines.sleep.base import TrueTokens
from pipelines.sleep.guides import GuideCosts
from pipelines.sleep.training import training_step

ONE = Spread(0.5, 0.25, 1.0)
RATE = Rate(ONE, ONE)


@pytest.fixture
def cfg(make_config: Callable[..., Config]) -> Config:
    return make_config()


def test_bytes_of_sockets_are_counted() -> None:
    size = 300_000
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        with socket.create_connection(listener.getsockname()) as one, listener.accept()[0] as other:
            sent, received = socket_bytes()
            left = size
            while left:
                one.sendall(bytes(min(left, 50_000)))
                left -= 50_000
                got = 0
                while got < 50_000:
                    got += len(other.recv(65536))
            after = socket_bytes()
    assert after[1] - received == size
    assert after[0] - sent == pytest.approx(size, abs=65536), "the last of it may not be acknowledged yet"


def test_bytes_of_files_are_counted(tmp_path: Path) -> None:
    written, read = file_bytes()
    (tmp_path / "some").write_bytes(bytes(200_000))
    assert 200_000 <= file_bytes()[0] - written < 210_000
    (tmp_path / "some").read_bytes()
    assert 200_000 <= file_bytes()[1] - read < 210_000


def test_both_engines_take_the_same_sleep_step(group: None, cfg: Config) -> None:
    lessons = Lessons(Task(cfg, share=4, repeats=1))
    lr, model, sharded = cfg.sleep.optimizer.lr, lessons.model(), lessons.model()
    local, engine = lessons.local(model), lessons.engine(2, sharded)
    try:
        expected = training_step(local, lessons.guided(model), 0, lessons.batch, lr)
        assert training_step(engine, lessons.guided(sharded), 0, lessons.batch, lr) == pytest.approx(expected, abs=1e-6)
        after = dict(engine.weights())
    finally:
        engine.close()
    for name, parameter in local.weights():
        torch.testing.assert_close(after[name], parameter, rtol=0, atol=1e-5)


def test_guides_and_true_tokens_go_through_one_engine(group: None, cfg: Config) -> None:
    lessons = Lessons(Task(cfg, share=4, repeats=1))
    model = lessons.model()
    engine = lessons.local(model)
    guided, plain = (lessons.steps(engine, objective)() for objective in (lessons.guided(model), TrueTokens()))
    assert isinstance(guided, dict) and isinstance(plain, dict)
    assert set(plain) == {"total"} < set(guided)


def test_one_rank_is_measured_in_turns(group: None, cfg: Config) -> None:
    found = measure_here(Task(cfg, share=2, repeats=2, steps=1, stages=(0, 2)))
    ways = {PLAIN, PLAIN + UNGUIDED, AWAKE, "ZeRO 0", "ZeRO 2", "ZeRO 2" + UNGUIDED}
    assert set(found.rates) == set(found.seconds) == ways
    assert found.rates[PLAIN].ratio == Spread(1.0, 1.0, 1.0)
    assert all(0 < rate.tokens_per_s.low <= rate.tokens_per_s.high for rate in found.rates.values())
    assert found.world == 1 and not (found.moved or found.reductions or found.calls), "nobody to talk to"


def test_what_is_handed_over_is_counted(cfg: Config, tmp_path: Path) -> None:
    bench = Handover(cfg, tmp_path)
    traffic = bench.traffic(3, {PARALLEL: 1e9, "ZeRO 2": 1e9})
    weights = sum(p.nbytes for p in bench.model.parameters())
    assert weights < traffic.to_learner < 2 * weights + 65536, "weights, offsets, headers and index"
    save_tensors(tmp_path / "again", {name: p for name, p in bench.model.named_parameters() if ".fast." in name})
    assert traffic.to_pool > (tmp_path / "again").stat().st_size
    assert traffic.saving == 1e9 / (traffic.to_pool + traffic.to_learner)
    assert traffic.pool == {"ZeRO 2": 1e9}


def test_the_page_has_every_figure(cfg: Config) -> None:
    plain = Spread(0.375, 0.25, 0.5)
    ways = [PLAIN, *(f"ZeRO {stage}" for stage in range(4))]
    one = Ranks(1, dict.fromkeys([*ways, AWAKE], RATE), {**dict.fromkeys([*ways, AWAKE], ONE), PLAIN + UNGUIDED: plain})
    two = Ranks(2, dict.fromkeys([*ways, PARALLEL], RATE), dict.fromkeys([*ways, PARALLEL], ONE))
    assert one.crowding == two.crowding == 1.0, "nobody was measured beside another"
    two = replace(two, moved={PARALLEL: 4e8, "ZeRO 2": 6e8}, reductions=[(1e3, 1e-4), (1e6, 1e-2)])
    two = replace(two, calls={"ZeRO 2": Calls(3.0, 1.0)}, seconds={**two.seconds, BESIDE: Spread(0.6, 0.5, 0.7)})
    assert two.crowding == 1.2
    traffic = Traffic(10, 1_000_000, 4_000_000, 0.1, 4e8, {"ZeRO 2": 4e8})
    costs, cadence = costs_of(cfg, one, two, traffic, 4), cadence_of(cfg, 4)
    assert costs.wake == ONE.median / (4 * cfg.model.context) and costs.link != Link(0.0, 0.0)
    assert costs.full == plain.median / (4 * cfg.model.context), "data-parallel training has no guides"
    assert (costs.parts, costs.calls) == (3.0, Calls(3.0, 1.0))
    expected = 1.2 * ONE.median + 3.0 * costs.link.alpha + costs.link.beta * 3.0 * costs.weights / 2 + costs.link.alpha
    assert predict(costs, one, two, "ZeRO 2", cadence) == pytest.approx(expected), "crowded, three rings and a tree"
    figures = Figures(
        cfg,
        Task(cfg, 4, 1, 1, 10),
        {1: one, 2: two},
        GuideCosts(2e-6, 3e-6, 1e-6, 130.0, 1024.0),
        traffic,
        costs,
        cadence,
        {"ZeRO 2": 0.75},
        curve(costs, cadence),
    )
    page = render(figures)
    assert "**80.0 times as much**" in page and "| ZeRO 2 | 750 | 500 (250 .. 1000) | +50% |" in page
    assert "1.20 times as long as one even where neither waits" in page
    assert "| 1,000 |" in page and "storing pays from visit 3.0 on" in page
    kept = json.loads(json.dumps(figures.as_json()))
    assert kept["traffic"]["saving"] == 80.0 and len(kept["scaling"]) == 4


@pytest.mark.parametrize("worlds", [(), (2,), (1,)])
def test_one_and_more_ranks_are_asked_for(cfg: Config, worlds: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must be 1 and larger numbers"):
        measure(cfg, worlds=worlds)
