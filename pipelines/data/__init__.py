"""What is read: files into documents into sequences with keys, held-out probes, the default corpus.

A stream is a function of (corpus, tokenizer, configuration, seed): rebuilt at any cursor it yields the identical
rest.
"""

from typing import TYPE_CHECKING

from nl_model.lazy import face

if TYPE_CHECKING:
    from pipelines.data.corpus import Corpus
    from pipelines.data.module import DataModule, open_data
    from pipelines.data.stream import Cursor, Probe, Sequence, Stream
    from pipelines.data.tokens import Tokenizer

__all__ = [
    "Corpus",
    "Cursor",
    "DataModule",
    "Probe",
    "Sequence",
    "Stream",
    "Tokenizer",
    "open_data",
]
__getattr__ = face(
    __name__,
    {
        "Corpus": "corpus",
        "Cursor": "stream",
        "DataModule": "module",
        "Probe": "stream",
        "Sequence": "stream",
        "Stream": "stream",
        "Tokenizer": "tokens",
        "open_data": "module",
    },
)
