"""Resume is exact: a run that was killed and continued equals one that was left alone, bit for bit."""

from __future__ import annotations

import random
import threading
from collections import defaultdict
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Dict, Iterator, List, Set, Tuple

import numpy as np
import pytest
import torch

from cluster.storage.releases import Releases, load_release
from nl_model.weights import load_tensors
from pipelines.experience import Snapshot
from tests.harness import Run

pytestmark = pytest.mark.timeout(600)
# Four rounds. Checkpoints fall between boundaries, so that a resume has something to replay.
OVERRIDES = (
    "run.deterministic=true",
    "control.enabled=false",
    "dreams.share=0.0625",
    "pool.ranks=1",
    "wake.checkpoint_every=5",
    "stream.max_source_bytes=16384",
)
SEED = 7


def fingerprints(run: Run) -> List[Tuple[int, str]]:
    releases = Releases(run.directory / "releases")
    return [(number, releases.read(number).fingerprint) for number in releases.numbers()]


def learner(run: Run) -> Tuple[Dict[str, torch.Tensor], Dict[str, Any]]:
    """The final checkpoint; without the store's version, which counts how often it was opened, and marks with it."""
    tensors, meta = load_tensors(sorted((run.directory / "checkpoints").glob("learner-*.safetensors"))[-1])
    return tensors, {key: value for key, value in meta.items() if key not in ("version", "marks")}


def stored(run: Run) -> Tuple[np.ndarray, np.ndarray]:
    """Keys (n,) in order, and their tokens (n, context + 1)."""
    snapshot = Snapshot.open(run.directory / "store")
    order = np.argsort(snapshot.keys)
    return snapshot.keys[order], snapshot.tokens(order)


@contextmanager
def watched(run: Run) -> Iterator[Dict[str, Set[int]]]:
    """Gathers when each file of pinned fast weights was written (ns), by name, while a run goes on."""
    seen: Dict[str, Set[int]] = defaultdict(set)
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            for path in (run.directory / "checkpoints").glob("fast-*.safetensors"):
                with suppress(FileNotFoundError):  # its round was decided meanwhile
                    seen[path.name].add(path.stat().st_mtime_ns)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield seen
    finally:
        done.set()
        watcher.join()


def assert_same(one: Dict[str, torch.Tensor], other: Dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


def test_a_killed_run_ends_like_an_uninterrupted_one(runs: Path) -> None:
    print(f"seed {SEED}")
    draw = random.Random(SEED)
    whole, killed = Run(runs, "exact-whole", OVERRIDES), Run(runs, "exact-killed", OVERRIDES)
    with watched(whole) as written:
        assert whole.finish() == 0, whole.tail()
    positions = (draw.randrange(8_000, 24_000),)
    for position in positions:
        with killed.attempt() as process:
            assert killed.wait_until(process, partial(killed.reached, position)), killed.tail()
            process.kill()
            assert process.wait(30) == -9, "the run ended before it was killed"
    assert killed.finish() == 0, killed.tail()
    assert sum(event["resumed"] for event in killed.events("run_started")) == len(positions)

    # The stream ends at a boundary here, where its end and the boundary both ask for a mark.
    assert len(written) >= 4 and all(len(times) == 1 for times in written.values()), "a round may be reading it"
    assert not [path for run in (whole, killed) for path in (run.directory / "checkpoints").glob("fast-*")]
    one, two = whole.summary(), killed.summary()
    assert one["tokens_streamed"] == 2 * 16384 and len(one["rounds"]) >= 4
    for key in ("matrix", "rows", "tokens_streamed", "stream_cursor", "experiences"):
        assert two[key] == one[key], key
    assert (two["experiences"]["lost"], two["experiences"]["duplicates"]) == (0, 0)

    assert fingerprints(killed) == fingerprints(whole) and len(fingerprints(whole)) >= 4
    newest = f"releases/{fingerprints(whole)[-1][0]:06d}"
    assert_same(load_release(whole.directory / newest), load_release(killed.directory / newest))
    (tensors, meta), (others, other_meta) = learner(whole), learner(killed)
    assert_same(tensors, others)
    assert meta == other_meta
    for left, right in zip(stored(whole), stored(killed), strict=True):
        np.testing.assert_array_equal(left, right)
