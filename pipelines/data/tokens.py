"""Text to tokens: one per UTF-8 byte, or byte-pair encoding. Every token knows how many bytes it stands for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Dict, Iterable, Protocol, Union, runtime_checkable

import numpy as np
from tokenizers import Tokenizer as _Library
from tokenizers import decoders, models, pre_tokenizers, trainers

from pipelines.config.schema import TokenizerConfig

EOS_TEXT = "<|endoftext|>"
_EOS_NAMES = (EOS_TEXT, "</s>", "<eos>", "<|end_of_text|>", "<|eos|>")
_ROUND_TRIP = "Größe  of\ta line\n\nwith 12 numbers, naïve 語 and 🌙 signs. "


@runtime_checkable
class Tokenizer(Protocol):
    """Text to tokens and back, lossless on bytes."""

    vocab_size: int
    """Number of tokens, eos included."""
    eos: int
    """The token between documents; never the result of encoding a text."""
    dtype: np.dtype
    """uint16 where the vocabulary fits, else uint32."""
    byte_lengths: np.ndarray
    """int64 (vocab_size,): bytes each token stands for; eos counts 1."""

    def encode(self, text: str) -> np.ndarray:
        """Tokens of a text, (n,) of `dtype`, without eos."""
        ...

    def decode(self, tokens: np.ndarray) -> str:
        """Text of tokens; eos is left out, bytes cut inside a character become U+FFFD."""
        ...

    def state(self) -> Dict[str, Any]:
        """A JSON-able description from which `tokenizer_from_state` builds the same tokenizer."""
        ...


def _dtype_for(vocab_size: int) -> np.dtype:
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


class ByteTokenizer:
    """One token per UTF-8 byte, and 256 as eos."""

    def __init__(self) -> None:
        self.vocab_size = 257
        self.eos = 256
        self.dtype = _dtype_for(self.vocab_size)
        self.byte_lengths = np.ones(self.vocab_size, dtype=np.int64)

    def encode(self, text: str) -> np.ndarray:
        """Tokens of a text, (bytes,) uint16."""
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(self.dtype)

    def decode(self, tokens: np.ndarray) -> str:
        """Text of tokens; eos is left out."""
        values = np.asarray(tokens)
        return values[values < self.eos].astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def state(self) -> Dict[str, Any]:
        """{"kind": "byte"}."""
        return {"kind": "byte"}


class BPETokenizer:
    """Byte-level byte-pair encoding of the `tokenizers` library."""

    def __init__(self, library: _Library, name: str = "tokenizer") -> None:
        """Wrap a tokenizer; ValueError unless it is byte-level and gives every byte of a text back."""
        found = next((text for text in _EOS_NAMES if library.token_to_id(text) is not None), None)
        if found is None:
            library.add_special_tokens([EOS_TEXT])
            found = EOS_TEXT
        # A document that spells a special token out must not be able to forge a document boundary.
        library.encode_special_tokens = True
        self._library = library
        vocabulary: Dict[str, int] = library.get_vocab(with_added_tokens=True)
        self.eos = vocabulary[found]
        self.vocab_size = max(vocabulary.values()) + 1
        self.dtype = _dtype_for(self.vocab_size)
        self.byte_lengths = np.ones(self.vocab_size, dtype=np.int64)
        added = {int(number) for number in library.get_added_tokens_decoder()}
        for text, number in vocabulary.items():
            # In the byte-level alphabet one character stands for one byte; added tokens are plain text.
            self.byte_lengths[number] = len(text.encode("utf-8")) if number in added else len(text)
        self.byte_lengths[self.eos] = 1
        self._check_lossless(name)

    def _check_lossless(self, name: str) -> None:
        tokens = self.encode(_ROUND_TRIP)
        size = len(_ROUND_TRIP.encode("utf-8"))
        if int(self.byte_lengths[tokens].sum()) != size or self.decode(tokens) != _ROUND_TRIP:
            raise ValueError(
                f"{name} is not a lossless byte-level BPE (its tokens do not add up to the bytes of a text); use one "
                "with a ByteLevel pre-tokenizer and decoder, add_prefix_space=false and no normalizer"
            )

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> BPETokenizer:
        """Learn merges from texts; `vocab_size` counts the 256 bytes and eos, and is an upper bound."""
        if vocab_size < 257:
            raise ValueError(f"tokenizer.vocab_size={vocab_size} must be at least 257 (256 bytes and eos)")
        library = _Library(models.BPE())
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        library.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[EOS_TEXT],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        library.train_from_iterator(iter(texts), trainer=trainer)
        return cls(library)

    @classmethod
    def load(cls, path: Union[str, Path]) -> BPETokenizer:
        """Load a tokenizer.json; ValueError where it is missing, malformed or not byte-level."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"tokenizer.path={str(path)!r} cannot be read: {error}") from None
        return cls._parse(text, f"tokenizer.path={str(path)!r}")

    @classmethod
    def _parse(cls, text: str, name: str) -> BPETokenizer:
        # The library reports malformed files by a bare Exception, so the shape is checked here first.
        try:
            model = json.loads(text)["model"]
            proper = model["type"] == "BPE" and isinstance(model["vocab"], dict) and isinstance(model["merges"], list)
        except (json.JSONDecodeError, KeyError, TypeError):
            proper = False
        if not proper:
            raise ValueError(f"{name} is not a tokenizer.json with a BPE model; save one with the tokenizers library")
        library = _Library.from_str(text)
        return cls(library, name)

    def encode(self, text: str) -> np.ndarray:
        """Tokens of a text, (n,) of `dtype`."""
        return np.asarray(self._library.encode(text, add_special_tokens=False).ids, dtype=self.dtype)

    def decode(self, tokens: np.ndarray) -> str:
        """Text of tokens; eos is left out."""
        return str(self._library.decode([int(token) for token in tokens if token != self.eos]))

    def state(self) -> Dict[str, Any]:
        """{"kind": "bpe", "json": the tokenizer.json as a string}."""
        return {"kind": "bpe", "json": self._library.to_str()}


def tokenizer_from_state(state: Dict[str, Any]) -> Tokenizer:
    """The tokenizer that `state()` described; ValueError for an unknown kind."""
    kind = state.get("kind")
    if kind == "byte":
        return ByteTokenizer()
    if kind == "bpe":
        return BPETokenizer._parse(str(state.get("json", "")), "tokenizer state")
    raise ValueError(f"tokenizer state has kind={kind!r}; use byte or bpe")


def build_tokenizer(cfg: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer that the configuration asks for; `texts` are read only where a BPE has to be trained."""
    if cfg.kind == "byte":
        return ByteTokenizer()
    if cfg.path is not None:
        return BPETokenizer.load(cfg.path)
    return BPETokenizer.train(texts, cfg.vocab_size)
