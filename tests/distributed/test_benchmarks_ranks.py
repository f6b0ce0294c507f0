"""The benchmark of sleep on two real ranks: what they say to each other is counted."""

from __future__ import annotations

import pytest

from benchmarks.sleep_ranks import AWAKE, BESIDE, PARALLEL, PLAIN, UNGUIDED, Task, measure
from pipelines.config.load import load_config

pytestmark = pytest.mark.timeout(240)


def test_two_ranks_are_measured_and_their_collectives_counted() -> None:
    cfg = load_config("smoke", ["pool.zero_stage=3"])
    found = measure(Task(cfg, share=2, repeats=1, steps=1, round_steps=2, stages=(0, 3)), 2)
    assert set(found.seconds) == {PLAIN, PARALLEL, BESIDE, "ZeRO 0", "ZeRO 3", "ZeRO 3" + UNGUIDED}
    assert AWAKE not in found.seconds
    assert set(found.calls) == set(found.moved) == {PARALLEL, "ZeRO 0", "ZeRO 3"}
    assert all(calls.rings >= 2 for calls in found.calls.values()), "gradients meet"
    assert found.calls["ZeRO 3"].rings > found.calls["ZeRO 0"].rings, "it gathers weights as they are needed"
    assert found.crowding > 0 and min(found.moved.values()) > 0
