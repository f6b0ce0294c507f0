"""Weights on disk: safetensors, with JSON for what is not a tensor. No pickle anywhere."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Dict, Mapping, Tuple, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from nl_model.levelled import Levelled

T = TypeVar("T")


def write_durably(path: Path, payload: bytes) -> None:
    """Write a file so that it is there whole or not at all, also after a crash: temp, fsync, rename, fsync folder."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any] | None = None) -> str:
    """Write tensors and a JSON-able `meta` as one safetensors file, durably; returns its sha256."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    payload = save(plain, metadata={"meta": json.dumps(dict(meta or {}))})
    write_durably(path, payload)
    return hashlib.sha256(payload).hexdigest()


def load_tensors(path: Path) -> Tuple[Dict[str, Tensor], Dict[str, Any]]:
    """Read what `save_tensors` wrote: tensors on the CPU, and the meta object."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        meta = json.loads((file.metadata() or {}).get("meta", "{}"))
    return tensors, meta


def join(**kinds: Mapping[str, T]) -> Dict[str, T]:
    """What lies in one file together, by `KIND/NAME`: a release is join(weight=..., offset=...)."""
    return {f"{kind}/{name}": one for kind, named in kinds.items() for name, one in named.items()}


def split(joined: Mapping[str, T], kind: str) -> Dict[str, T]:
    """What `join` was given as this kind."""
    return {name.removeprefix(f"{kind}/"): one for name, one in joined.items() if name.startswith(f"{kind}/")}


def parameters_of(model: Levelled, owner: str) -> Dict[str, Tensor]:
    """Copies of the parameters of one owner's levels, by name."""
    state = dict(model.named_parameters())
    return {name: state[name].detach().clone() for name in model.owned_by(owner)}


def load_into(model: Levelled, tensors: Mapping[str, Tensor]) -> None:
    """Copy named tensors into a model's parameters; ValueError for unknown names and other shapes."""
    state = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name not in state:
                raise ValueError(f"weights hold {name!r}, which this model does not have; check model and levels")
            if state[name].shape != tensor.shape:
                raise ValueError(
                    f"weights of {name!r} have shape {tuple(tensor.shape)}, this model wants "
                    f"{tuple(state[name].shape)}; check model.dim, levels.*.width and the tokenizer"
                )
            state[name].copy_(tensor)


def tensor_digest(tensor: Tensor) -> str:
    """sha256 over shape, dtype and bytes."""
    plain = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{tuple(plain.shape)} {plain.dtype}".encode())
    digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
    return digest.hexdigest()


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes, dtypes and bytes, independent of order in the mapping."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()
