"""The data of a comparison: the stream in its orders, and what only the measuring side knows of it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Dict, List, Sequence

import numpy as np

from pipelines.config.paths import from_home
from pipelines.config.schema import Config
from pipelines.data.module import DataModule, open_data
from pipelines.data.stream import Sequence as StreamSequence
from pipelines.sleep.base import base_sequences


def stream_of_folder(overrides: Sequence[str]) -> List[str]:
    """Overrides in which a folder of NAME/train.txt and NAME/valid.txt stands as the glob of just these files."""
    found = []
    for item in overrides:
        key, _, path = item.partition("=")
        path = from_home(key, path) or "" if key == "stream.path" else path
        folder = key == "stream.path" and list(Path(path).glob("*/train.txt"))
        found.append(f"{key}={path.rstrip('/')}/*/[tv][ra]*.txt" if folder else item)
    return found


def order_sources(sources: Sequence[str], order: str) -> List[str]:
    """The stream's sources in a named order: A, reverse, random-N. ValueError for another name."""
    if order == "A":
        return list(sources)
    if order == "reverse":
        return list(reversed(sources))
    kind, _, seed = order.partition("-")
    if kind == "random" and seed.isdigit():
        return [sources[i] for i in np.random.default_rng(int(seed)).permutation(len(sources))]
    raise ValueError(f"--orders: {order!r} is unknown; use A, reverse, or random-N with a number N")


@dataclass(frozen=True)
class TrialData:
    """Text of all trials of one order and size. Methods get `setting`; the rest is for who measures them."""

    setting: DataModule

    @classmethod
    def open(cls, cfg: Config, order: str) -> TrialData:
        """Read the stream of a configuration in one order. ValueError where the data is not as configured."""
        opened = open_data(cfg)
        names = order_sources(opened.stream_sources, order)
        ordered = replace(cfg, stream=replace(cfg.stream, sources=names))
        return cls(replace(opened, cfg=ordered, stream_sources=names))

    def of(self, cfg: Config) -> DataModule:
        """The same text under the configuration of a method, its sources in this order."""
        stream = replace(cfg.stream, sources=self.setting.stream_sources)
        return replace(self.setting, cfg=replace(cfg, stream=stream))

    @cached_property
    def sequences(self) -> List[StreamSequence]:
        """The whole stream."""
        return list(self.setting.stream())

    @property
    def tokens(self) -> int:
        """Its predicted tokens."""
        return len(self.sequences) * self.setting.cfg.model.context

    def base(self, cfg: Config) -> List[StreamSequence]:
        """The base mixture that a configuration's seed makes."""
        setting = self.setting
        return base_sequences(setting.corpus, setting.tokenizer, cfg, setting.base_sources)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all text that trials read, in its order, and of the probes that they are judged on."""
        found = hashlib.sha256("\n".join(self.setting.sources).encode())
        for sequence in (*self.sequences, *self.base(self.setting.cfg)):
            found.update(sequence.source.encode() + sequence.tokens.tobytes())
        probes: Dict[str, np.ndarray] = {name: probe.tokens for name, probe in self.setting.probes().items()}
        for name, tokens in probes.items():
            found.update(name.encode() + np.ascontiguousarray(tokens).tobytes())
        return found.hexdigest()


def configured_bytes(cfg: Config, sources: int) -> int:
    """Bytes of the stream as configured: what regimes are shares of. ValueError where nothing is configured."""
    if not cfg.stream.max_source_bytes:
        raise ValueError(
            "stream.max_source_bytes=0 configures no size that a store could be a share of; give bytes per source, or "
            "compare with --regimes whole"
        )
    return cfg.stream.max_source_bytes * sources
