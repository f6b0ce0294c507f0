"""Model directories: what `circadian import` and `circadian export` write and `load_model` reads.

A retrofit's directory is a plain transformers directory with `levels.json` beside the config; without that file it is
its own export. A NestedLM's directory has model_type "circadian" and its levels in the config. Directories appear
under their name only when every byte of them is on disk.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, Iterator, Mapping

import torch
from transformers import AutoModelForCausalLM

from nl_model.hf.checkpoint import CONFIG, INDEX, OURS, check_checkpoint, read_config, read_json, shard_files
from nl_model.hf.nested import CircadianForCausalLM
from nl_model.hf.plain import levels_from_plain, levels_to_plain
from nl_model.hf.retrofit import RetrofitConfig, RetrofitLM, load_retrofit, retrofit_levels
from nl_model.hf.tokenizer import save_tokenizer
from nl_model.levelled import Levelled
from nl_model.model import NestedLM
from nl_model.weights import sync, write_durably

LEVELS = "levels.json"
FORMAT = 1
COMPANIONS = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)
"""Files that travel with the weights."""
SHARD = "5GB"
"""Largest safetensors file written."""


def check_new(out: Path) -> None:
    """ValueError where a path is taken."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder; choose another name, nothing is overwritten")


@contextlib.contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A folder to fill; it takes its name when the block ends well and all of it is on disk, else it is removed."""
    out = out.resolve()
    check_new(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        yield staging
        for path in sorted(staging.iterdir()):
            sync(path)
        sync(staging)
        os.replace(staging, out)
        sync(out.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def import_checkpoint(source: Path, out: Path, cfg: RetrofitConfig | None = None) -> None:
    """Turn a transformers checkpoint into a model directory. Files are copied, the weights are never loaded.

    Raises:
        ValueError: the checkpoint is incomplete or unsupported, the levels do not fit it, or `out` is not empty.
    """
    check_new(out)
    config = check_checkpoint(source)
    if config.model_type == OURS:
        raise ValueError(f"{source} has levels already; it needs no import")
    levels = retrofit_levels(config, cfg or RetrofitConfig())
    with new_directory(out) as directory:
        _copy_model(source, directory)
        _write_levels(directory, levels_to_plain(levels))


def load_model(directory: Path, dtype: torch.dtype | None = None) -> Levelled:
    """The model of a directory written by `import_checkpoint`, `save_retrofit` or `save_nested`, on the CPU.

    Args:
        directory: its path.
        dtype: of the weights; empty: as stored.

    Raises:
        ValueError: the directory is incomplete or damaged, or is a checkpoint that was not imported.
    """
    config = check_checkpoint(directory)
    if config.model_type == OURS:
        wrapper = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype or "auto", local_files_only=True)
        nested: NestedLM = wrapper.lm
        return nested
    if not (directory / LEVELS).is_file():
        raise ValueError(f"{directory} is a plain checkpoint without {LEVELS}; `circadian import` it first")
    plain = read_json(directory / LEVELS)
    if plain.get("format") != FORMAT:
        raise ValueError(f"{directory / LEVELS} has format={plain.get('format')!r}, this version reads {FORMAT}")
    return load_retrofit(directory, levels_from_plain(plain.get("levels")), dtype)


def save_retrofit(model: RetrofitLM, out: Path, companions: Path, shard: str = SHARD) -> None:
    """Write a retrofit, for instance after it has learned, as a model directory.

    Args:
        model: the model.
        out: a new or empty folder.
        companions: the directory it came from, whose tokenizer goes with it.
        shard: largest size of one file, as transformers writes sizes.
    """
    with new_directory(out) as directory:
        model.body.save_pretrained(directory, max_shard_size=shard)
        _copy_companions(companions, directory)
        _write_levels(directory, levels_to_plain(model.level_configs))


def save_nested(model: NestedLM, out: Path, tokenizer: Mapping[str, Any], eos: int, shard: str = SHARD) -> None:
    """Write a NestedLM as a directory that AutoModelForCausalLM loads once `nl_model.hf` is imported.

    Args:
        model: the model.
        out: a new or empty folder.
        tokenizer: {"kind": "byte"}, or {"kind": "bpe", "json": a tokenizer.json as a string}.
        eos: id of the token between documents.
        shard: largest size of one file, as transformers writes sizes.
    """
    with new_directory(out) as directory:
        wrapper = CircadianForCausalLM.around(model)
        wrapper.generation_config.update(bos_token_id=eos, eos_token_id=eos, pad_token_id=eos)
        wrapper.save_pretrained(directory, max_shard_size=shard)
        save_tokenizer(directory, tokenizer, eos, model.cfg.context)


def export_directory(source: Path, out: Path) -> None:
    """Copy a model directory as one for others: a retrofit's becomes a plain transformers directory."""
    check_new(out)
    check_checkpoint(source)
    with new_directory(out) as directory:
        _copy_model(source, directory)


def is_model_directory(path: Path) -> bool:
    """Whether a path holds a model of ours (imported, or saved)."""
    return (path / LEVELS).is_file() or ((path / CONFIG).is_file() and read_config(path).model_type == OURS)


def _copy_model(source: Path, directory: Path) -> None:
    names = [CONFIG, *([INDEX] if (source / INDEX).is_file() else [])]
    for path in [*(source / name for name in names), *shard_files(source)]:
        shutil.copyfile(path, directory / path.name)
    _copy_companions(source, directory)


def _copy_companions(source: Path, directory: Path) -> None:
    for path in sorted({path for pattern in COMPANIONS for path in source.glob(pattern) if path.is_file()}):
        if not (directory / path.name).exists():
            shutil.copyfile(path, directory / path.name)


def _write_levels(directory: Path, levels: Any) -> None:
    write_durably(directory / LEVELS, json.dumps({"format": FORMAT, "levels": levels}, indent=1).encode())
