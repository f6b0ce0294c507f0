"""The default corpus: there, varied, the same every time, and cheap to open."""

from __future__ import annotations

import subprocess
import sys
from typing import Dict, List

import numpy as np
import pytest

from pipelines.config.schema import StreamConfig
from pipelines.data.corpus import open_corpus
from pipelines.data.documents import Corpus
from pipelines.data.installed import DEFAULT_BASE, DEFAULT_ORDER, open_installed

CORE = (*DEFAULT_BASE, *DEFAULT_ORDER)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return open_installed(StreamConfig())


def test_six_sources_with_enough_text(corpus: Corpus) -> None:
    assert set(CORE) <= set(corpus.sources)
    assert len(CORE) >= 6
    for source in CORE:
        train = [document.text for _, document in corpus.documents(source)]
        probe = [document.text for document in corpus.probe_documents(source)]
        assert sum(len(text.encode()) for text in train) >= 2 * StreamConfig().limit - 20_000, source
        assert sum(len(text.encode()) for text in probe) >= StreamConfig().probe_bytes, source
        assert len(probe) >= 4
        assert len(set(train)) == len(train)
        assert not set(train) & set(probe)
        assert all(len(text) >= 50 and text.strip() for text in train + probe)
    assert corpus.quarantined == []


def trigrams(text: str) -> np.ndarray:
    """Hashed byte trigrams, (n - 2,) int64 below 2^16."""
    data = np.frombuffer(text.encode(), np.uint8).astype(np.int64)
    return (data[:-2] * 40_503 + data[1:-1] * 257 + data[2:]) % (1 << 16)


def test_sources_differ_clearly(corpus: Corpus) -> None:
    """The trigrams of a source say its own held-out text at least a tenth of a bit per byte better than any other's."""
    logs: Dict[str, np.ndarray] = {}
    for source in CORE:
        text = "".join(document.text for _, document in corpus.documents(source))
        counts = np.bincount(trigrams(text), minlength=1 << 16) + 0.1
        logs[source] = np.log2(counts / counts.sum())
    for source in CORE:
        probe = trigrams("".join(document.text for document in corpus.probe_documents(source)))
        bits = {other: -float(logs[other][probe].mean()) for other in CORE}
        nearest = min(value for other, value in bits.items() if other != source)
        assert bits[source] + 0.1 < nearest, (source, bits)


def test_the_same_every_time(corpus: Corpus) -> None:
    again = open_corpus(StreamConfig())
    assert again.sources == corpus.sources
    for source in CORE:
        first: List[str] = [document.origin for _, document in corpus.documents(source)]
        assert [document.origin for _, document in again.documents(source)] == first
        assert list(again.probe_documents(source)) == list(corpus.probe_documents(source))


def test_a_limit_takes_a_prefix(corpus: Corpus) -> None:
    short = open_installed(StreamConfig(max_source_bytes=50_000))
    for source in CORE:
        some = list(short.documents(source))
        assert list(corpus.documents(source))[: len(some)] == some
        assert 50_000 <= short.size(source) < corpus.size(source)
        assert list(short.probe_documents(source)) == list(corpus.probe_documents(source))


def test_scripts_are_broken_into_lines(corpus: Corpus) -> None:
    lines = [line for _, document in corpus.documents("javascript") for line in document.text.splitlines()]
    assert max(map(len, lines)) <= 400
    assert len(lines) > 2000


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"stream.sources names 'pyhton'.*did you mean 'python'"):
        open_installed(StreamConfig(sources=["pyhton"]))


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys\nfrom pipelines.config.schema import StreamConfig\n"
        "from pipelines.data.installed import open_installed\n"
        "open_installed(StreamConfig())\n"
        "print([name for name in ('torch', 'mlflow', 'ray', 'matplotlib', 'torchgen') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
