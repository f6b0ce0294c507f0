"""What every process of a run must agree on: corpus, tokenizer, sources, probes. Built from the configuration alone."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, Dict, List, Optional

from pipelines.config.schema import Config
from pipelines.data.corpus import Corpus, open_corpus
from pipelines.data.stream import Cursor, Probe, Stream, build_probes, select_sources
from pipelines.data.tokens import Tokenizer, build_tokenizer, tokenizer_from_state


@dataclass(frozen=True)
class DataModule:
    """The data side of a run."""

    cfg: Config
    corpus: Corpus
    tokenizer: Tokenizer
    base_sources: List[str]
    """Sources of the base mixture; of a run that starts from a checkpoint, those that base.sources names."""
    stream_sources: List[str]
    """Sources of the stream, in order."""

    @property
    def sources(self) -> List[str]:
        """All sources that are probed: those of the base, then those of the stream."""
        return list(dict.fromkeys([*self.base_sources, *self.stream_sources]))

    def stream(self, cursor: Optional[Cursor] = None) -> Stream:
        """The stream from its beginning or from a cursor."""
        cfg = self.cfg
        return Stream(
            self.corpus, self.tokenizer, cfg.stream, cfg.model.context, self.stream_sources, cfg.run.seed, cursor
        )

    def probes(self) -> Dict[str, Probe]:
        """Held-out sequences of every source."""
        return build_probes(self.corpus, self.tokenizer, self.cfg.stream, self.cfg.model.context, self.sources)


def open_data(cfg: Config, tokenizer_state: Optional[Dict[str, Any]] = None) -> DataModule:
    """Open the corpus and build (or rebuild) the tokenizer. ValueError for anything wrong with the data."""
    corpus = open_corpus(cfg.stream)
    base_sources, stream_sources = select_sources(corpus, cfg.stream, cfg.base)
    if tokenizer_state is not None:
        tokenizer = tokenizer_from_state(tokenizer_state)
    else:
        named = base_sources or stream_sources[:2]
        texts = (d.text for s in named for _, d in itertools.islice(corpus.documents(s), 512))
        tokenizer = build_tokenizer(cfg.tokenizer, texts)
    return DataModule(cfg, corpus, tokenizer, base_sources, stream_sources)
