"""How fast the experience store appends, commits and samples, beside pyarrow alone. `python -m benchmarks.store`."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset

from pipelines.config.schema import StoreConfig
from pipelines.experience import ExperienceStore, Record, Snapshot, build_sampler, make_schema, records_to_batch

ROWS, CONTEXT, GROUP, DRAW = 16384, 256, 512, 64
DTYPE = "uint16"

Figures = dict[str, float]


def measure(repeats: int = 5, directory: str | None = None) -> dict[str, Figures]:
    """Rows per second of every way to write and to sample: median, min and max over interleaved repeats.

    `directory` is where the files go (a temporary folder below the working directory if None); the figures mean nothing
    on a file system in memory. Opening is not timed; turning records into batches is, for the store alone.
    "ratio" entries divide the store's rows/s by the named way's, repeat by repeat.
    """
    records = _records()
    schema = make_schema(CONTEXT, DTYPE)
    batches = [records_to_batch(records[at : at + GROUP], schema) for at in range(0, ROWS, GROUP)]
    rates: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(dir=directory or os.getcwd(), prefix=".store-bench-") as folder:
        for repeat in range(repeats + 1):
            place = Path(folder) / str(repeat)
            place.mkdir()
            _write_file(place / "file.arrow", batches)
            ways: dict[str, Callable[[], float]] = {
                "append: store, commit per 512": partial(_append, place / "store", records),
                "append: pyarrow, fsync per 512": partial(_raw, place / "each.arrow", batches, True),
                "append: pyarrow, commit's 3 fsyncs": partial(_floor, place / "floor", batches),
                "append: pyarrow, one fsync": partial(_raw, place / "once.arrow", batches, False),
                "sample: store": partial(_sample_store, place / "store"),
                "sample: pyarrow, batch reopened": partial(_sample_reopened, place / "file.arrow"),
                "sample: pyarrow dataset take": partial(_sample_dataset, place / "file.arrow"),
            }
            for name, way in ways.items():
                rate = way()
                if repeat:  # the first round warms up imports and the page cache
                    rates.setdefault(name, []).append(rate)
    return _summary(rates)


def _records() -> list[Record]:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 4096, (ROWS, CONTEXT + 1)).astype(DTYPE)
    return [
        Record(key=key, source=f"source-{key * 4 // ROWS}", document=key // 8, offset=key % 8, surprise=2.0, tokens=row)
        for key, row in enumerate(tokens)
    ]


def _append(path: Path, records: list[Record]) -> float:
    with ExperienceStore.open(path, CONTEXT, DTYPE, StoreConfig(commit_bytes=1 << 30)) as store:
        started = time.perf_counter()
        for at in range(0, ROWS, GROUP):
            store.append(records[at : at + GROUP], {"row": at + GROUP})
            store.commit()
        return ROWS / (time.perf_counter() - started)


def _raw(path: Path, batches: list[pa.RecordBatch], each: bool) -> float:
    with path.open("wb") as file, pa.ipc.new_stream(file, batches[0].schema) as stream:
        started = time.perf_counter()
        for batch in batches:
            stream.write_batch(batch)
            if each:
                file.flush()
                os.fsync(file.fileno())
        file.flush()
        os.fsync(file.fileno())
        return ROWS / (time.perf_counter() - started)


def _floor(path: Path, batches: list[pa.RecordBatch]) -> float:
    """What the commit protocol costs at least: each batch, then a small file, linked to its name, all synced."""
    path.mkdir()
    directory = os.open(path, os.O_RDONLY)
    with (path / "floor.arrow").open("wb") as file, pa.ipc.new_stream(file, batches[0].schema) as stream:
        started = time.perf_counter()
        for number, batch in enumerate(batches):
            stream.write_batch(batch)
            file.flush()
            with (path / "temporary").open("wb", buffering=0) as entry:
                entry.write(bytes(600))
                os.fsync(entry.fileno())
            os.fsync(file.fileno())
            os.link(path / "temporary", path / str(number))
            os.unlink(path / "temporary")
            os.fsync(directory)
        elapsed = time.perf_counter() - started
    os.close(directory)
    return ROWS / elapsed


def _write_file(path: Path, batches: list[pa.RecordBatch]) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, batches[0].schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


def _draws(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, ROWS, DRAW) for _ in range(count)]


def _sample_store(path: Path, count: int = 400) -> float:
    snapshot = Snapshot.open(path)
    sampler = build_sampler("surprise", snapshot, snapshot.rows_between(0, snapshot.last_key))
    started = time.perf_counter()
    for step in range(count):
        rows, _ = sampler.draw(DRAW, 0, step)
        snapshot.tokens(rows)
    return count * DRAW / (time.perf_counter() - started)


def _sample_reopened(path: Path, count: int = 20) -> float:
    with pa.memory_map(str(path)) as mapped:
        reader = pa.ipc.open_file(mapped)
        started = time.perf_counter()
        for rows in _draws(count):
            out = np.empty((DRAW, CONTEXT + 1), DTYPE)
            for target, row in zip(out, rows.tolist(), strict=True):
                tokens = reader.get_batch(row // GROUP).column("tokens").flatten().to_numpy()
                target[:] = tokens.reshape(-1, CONTEXT + 1)[row % GROUP]
        return count * DRAW / (time.perf_counter() - started)


def _sample_dataset(path: Path, count: int = 5) -> float:
    dataset = pyarrow.dataset.dataset(str(path), format="arrow")
    started = time.perf_counter()
    for rows in _draws(count):
        dataset.take(pa.array(rows), columns=["tokens"])
    return count * DRAW / (time.perf_counter() - started)


def _summary(rates: dict[str, list[float]]) -> dict[str, Figures]:
    store = {name.split(":")[0]: values for name, values in rates.items() if ": store" in name}
    summary = {}
    for name, values in rates.items():
        ratios = [ours / theirs for ours, theirs in zip(store[name.split(":")[0]], values, strict=True)]
        summary[name] = {
            "rows_per_s": statistics.median(values),
            "min": min(values),
            "max": max(values),
            "ratio": statistics.median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
        }
    return summary


def main() -> None:
    """Measure and print a table."""
    print(f"{ROWS} rows of {CONTEXT + 1} {DTYPE} tokens; rows/s, median (min .. max); then store / this, the same")
    for name, figures in measure().items():
        rate = "{rows_per_s:>12,.0f} ({min:,.0f} .. {max:,.0f})".format(**figures)
        print(f"{name:36}{rate:44}" + "{ratio:8.2f} ({ratio_min:.2f} .. {ratio_max:.2f})".format(**figures))


if __name__ == "__main__":
    main()
