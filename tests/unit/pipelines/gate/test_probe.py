"""Bits per byte, and the figures that are read off the matrix."""

from __future__ import annotations

import math
from typing import Callable, Dict, List

import numpy as np
import pytest

from nl_model.config import LevelConfig
from nl_model.model import NestedLM
from pipelines.config.schema import Config
from pipelines.data.module import open_data
from pipelines.data.stream import Probe
from pipelines.gate.probe import Row, own_rows, probe_bpb, read_matrix, score

SOURCES = ["base", "x", "y"]
ENDS = {"x": 100, "y": 200}
# By hand: the base is learned in row 0, x in row 1, y in row 3.
ROWS = [
    Row(0, 0, {"base": 1.0, "x": 5.0, "y": 6.0}),
    Row(1, 100, {"base": 1.5, "x": 2.0, "y": 5.0}),
    Row(2, 150, {"base": 1.25, "x": 3.0, "y": 4.0}),
    Row(3, 200, {"base": 2.0, "x": 2.5, "y": 3.0}),
]


def test_own_rows_are_the_first_after_a_source_was_learned() -> None:
    assert own_rows(ROWS, ENDS, SOURCES, 0) == {"base": 0, "x": 1, "y": 3}
    assert own_rows(ROWS, {"x": 101, "y": 200}, SOURCES, 0)["x"] == 2
    assert own_rows(ROWS, {"x": 101, "y": 200}, SOURCES, 1)["x"] == 1, "slack bridges a token that is short"
    assert own_rows(ROWS, {"x": 100, "y": 999}, SOURCES, 0)["y"] == 3, "the last row, where none reaches that far"


def test_the_figures_of_a_matrix() -> None:
    figures = read_matrix(ROWS, ENDS, SOURCES, 0)
    assert figures["matrix"] == [[1.0, 5.0, 6.0], [1.5, 2.0, 5.0], [1.25, 3.0, 4.0], [2.0, 2.5, 3.0]]
    assert figures["mean_final_bpb"] == pytest.approx((2.0 + 2.5 + 3.0) / 3)
    assert figures["forgetting"] == pytest.approx(((2.0 - 1.0) + (2.5 - 2.0)) / 2), "y is learned in the last row"
    assert figures["backward_transfer"] == pytest.approx(-0.75)
    assert figures["learning"] == pytest.approx((2.0 + 3.0) / 2), "the base was not learned on the stream"
    assert figures["rows"] == [
        {"release": 0, "tokens": 0, "label": "base"},
        {"release": 1, "tokens": 100, "label": "0k"},
        {"release": 2, "tokens": 150, "label": "0k"},
        {"release": 3, "tokens": 200, "label": "0k"},
    ]


def test_sources_in_another_order_give_the_same_figures() -> None:
    one, other = read_matrix(ROWS, ENDS, SOURCES, 0), read_matrix(ROWS, ENDS, SOURCES[::-1], 0)
    for key in ("mean_final_bpb", "forgetting", "backward_transfer", "learning"):
        assert one[key] == pytest.approx(other[key])
    assert other["matrix"] == [row[::-1] for row in one["matrix"]]  # type: ignore[attr-defined]


def test_a_mixed_stream_ends_all_its_sources_in_the_last_row() -> None:
    figures = read_matrix(ROWS, {"x": 200, "y": 199}, SOURCES, 0)
    assert figures["forgetting"] == pytest.approx(2.0 - 1.0), "only the base was learned before"
    assert figures["learning"] == pytest.approx((2.5 + 3.0) / 2)


def test_a_source_learned_just_before_the_last_row_can_be_forgotten() -> None:
    figures = read_matrix(ROWS, {"x": 150, "y": 200}, ["x", "y"], 0)
    assert figures["forgetting"] == pytest.approx(2.5 - 3.0)
    assert figures["backward_transfer"] == pytest.approx(0.5)


def test_a_base_alone_has_forgotten_nothing() -> None:
    figures = read_matrix(ROWS[:1], ENDS, SOURCES, 0)
    assert figures["forgetting"] == 0.0 and figures["mean_final_bpb"] == 4.0
    nothing_streamed = read_matrix(ROWS, {}, SOURCES, 0)
    assert nothing_streamed["learning"] == 0.0
    assert nothing_streamed["forgetting"] == pytest.approx((1.0 - 2.5 - 3.0) / 3)


@pytest.mark.parametrize("batch", [1, 4, 100])
def test_a_uniform_model_needs_log2_vocab_bits_per_token(
    make_levels: Callable[..., Dict[str, LevelConfig]], make_model: Callable[..., NestedLM], batch: int
) -> None:
    model = NestedLM(make_model(make_levels()).cfg, make_levels(), 300).reset_parameters(0)
    tokens = np.random.default_rng(0).integers(0, 300, (9, 17)).astype(np.uint16)
    assert probe_bpb(model, Probe("x", tokens, 333), batch=batch) == pytest.approx(
        math.log2(300) * 9 * 16 / 333, rel=1e-6
    )


def test_bits_per_byte_are_the_summed_loss_over_the_bytes(
    make_config: Callable[..., Config], make_model: Callable[..., NestedLM]
) -> None:
    setting = open_data(make_config())
    model, probes = make_model(setting.cfg.levels), setting.probes()
    found = score(model, probes, ["c", "a"])
    assert list(found) == ["c", "a"]
    for source, bpb in found.items():
        nats: List[float] = []
        for row in probes[source].tokens.astype(np.int64):
            logits = model(model.embedding.weight.new_tensor(row[None, :-1]).long())[0].detach().double()
            nats += (-logits.log_softmax(-1)[np.arange(16), row[1:]]).tolist()
        assert bpb == pytest.approx(sum(nats) / math.log(2) / probes[source].bytes, rel=1e-5)
    assert probe_bpb(model, probes["c"], batch=1) == pytest.approx(found["c"], rel=1e-6)
    assert all(p.grad is None for p in model.parameters())
