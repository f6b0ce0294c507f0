"""Tokenizers: lossless, honest about bytes, rebuilt from their state."""

from __future__ import annotations

import json
from pathlib import Path
from typing import List

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from pipelines.config.schema import TokenizerConfig
from pipelines.data.tokens import (
    EOS_TEXT,
    BPETokenizer,
    ByteTokenizer,
    Tokenizer,
    build_tokenizer,
    tokenizer_from_state,
)

TEXTS = ["the cat sat on the mat, the cat sat again\n" * 20, "größer als 12 Katzen; größer als 7\n" * 20]
TRAINED = BPETokenizer.train(TEXTS, 320)


def both() -> List[Tokenizer]:
    return [ByteTokenizer(), TRAINED]


@pytest.mark.parametrize("tokenizer", both(), ids=["byte", "bpe"])
@given(text=st.text(max_size=60))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_round_trip_and_bytes_add_up(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text)
    assert tokens.dtype == tokenizer.dtype == np.uint16
    assert tokenizer.decode(tokens) == text
    assert int(tokenizer.byte_lengths[tokens].sum()) == len(text.encode("utf-8"))
    assert tokenizer.eos not in tokens


def test_bytes_are_tokens() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("aé").tolist() == [97, 0xC3, 0xA9]
    assert (tokenizer.vocab_size, tokenizer.eos) == (257, 256)
    assert tokenizer.decode(np.array([97, 256, 98])) == "ab"
    assert tokenizer.decode(np.array([0xC3])) == "\ufffd"


def test_bpe_learns_merges_and_keeps_its_size() -> None:
    assert 257 < TRAINED.vocab_size <= 320
    assert len(TRAINED.byte_lengths) == TRAINED.vocab_size
    assert len(TRAINED.encode(TEXTS[0])) < len(TEXTS[0]) // 2
    assert TRAINED.byte_lengths.max() > 2
    assert TRAINED.byte_lengths[TRAINED.eos] == 1
    assert BPETokenizer.train(TEXTS, 320).state() == TRAINED.state()


def test_text_cannot_forge_a_document_boundary() -> None:
    text = f"before {EOS_TEXT} after"
    for tokenizer in both():
        assert tokenizer.eos not in tokenizer.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("tokenizer", both(), ids=["byte", "bpe"])
def test_state_rebuilds_the_same(tokenizer: Tokenizer) -> None:
    again = tokenizer_from_state(json.loads(json.dumps(tokenizer.state())))
    assert again.encode(TEXTS[1]).tolist() == tokenizer.encode(TEXTS[1]).tolist()
    assert (again.vocab_size, again.eos) == (tokenizer.vocab_size, tokenizer.eos)
    assert again.byte_lengths.tolist() == tokenizer.byte_lengths.tolist()
    assert tokenizer.eos not in again.encode(EOS_TEXT)


def test_build_follows_the_configuration(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(TRAINED.state()["json"])
    assert build_tokenizer(TokenizerConfig(), []).vocab_size == 257
    loaded = build_tokenizer(TokenizerConfig(kind="bpe", path=str(path)), [])
    assert loaded.encode(TEXTS[0]).tolist() == TRAINED.encode(TEXTS[0]).tolist()
    assert build_tokenizer(TokenizerConfig(kind="bpe", vocab_size=280), TEXTS).vocab_size == 280


def save(path: Path, library: Library) -> Path:
    library.train_from_iterator(TEXTS, trainer=trainers.BpeTrainer(vocab_size=300, show_progress=False))
    path.write_text(library.to_str())
    return path


def test_tokenizers_that_lose_text_are_refused(tmp_path: Path) -> None:
    words = Library(models.BPE())
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match="not a lossless byte-level BPE"):
        BPETokenizer.load(save(tmp_path / "words.json", words))
    folded = Library(models.BPE())
    folded.normalizer = normalizers.Lowercase()
    folded.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    folded.decoder = decoders.ByteLevel()
    with pytest.raises(ValueError, match="not a lossless byte-level BPE"):
        BPETokenizer.load(save(tmp_path / "folded.json", folded))


def test_errors_name_what_is_wrong(tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text('{"model": {"type": "WordPiece"}}')
    with pytest.raises(ValueError, match=r"tokenizer.path='.*broken.json' is not a tokenizer.json with a BPE model"):
        BPETokenizer.load(broken)
    with pytest.raises(ValueError, match=r"tokenizer.path='.*absent.json' cannot be read"):
        BPETokenizer.load(tmp_path / "absent.json")
    with pytest.raises(ValueError, match="vocab_size=100 must be at least 257"):
        BPETokenizer.train(TEXTS, 100)
    with pytest.raises(ValueError, match="kind='word'"):
        tokenizer_from_state({"kind": "word"})
