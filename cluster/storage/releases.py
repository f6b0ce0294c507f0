"""Releases: versions of the slow levels on disk. A directory per version, shards, checksums, `STABLE` written last.

A release holds `weight/<parameter>` for every parameter (slow levels, and the fast levels' rest state) and
`offset/<parameter>` for the learner's levels (docs/ARCHITECTURE.md, rebasing). Readers trust only the marker.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence

from safetensors import SafetensorError
from torch import Tensor

from nl_model.weights import load_tensors, save_tensors, sync, tensor_digest, write_durably
from pipelines.gate.evidence import ShardFacts, TensorFacts, weights_fingerprint

MARKER = "STABLE"
INDEX = "release.json"
DTYPES = {"F64": "torch.float64", "F32": "torch.float32", "F16": "torch.float16", "BF16": "torch.bfloat16"}
"""Names of safetensors for what a release may hold."""


@dataclass(frozen=True)
class Shard:
    """One safetensors file of a release."""

    file: str
    sha256: str
    tensors: List[str]
    digests: Dict[str, str] = field(default_factory=dict)
    """Hash of each tensor by name; empty in releases of earlier versions."""


@dataclass(frozen=True)
class Release:
    """What `release.json` says: where a release comes from and what is in it."""

    number: int
    """0 is the base."""
    parent: Optional[int]
    """Release that the student started from."""
    round: int
    """Round that made it; 0 for the base."""
    snapshot: int
    """Version of the experience store it was trained on."""
    last_key: int
    """Last stream key it was trained on; -1 for the base."""
    tokens: int
    """Stream position that its experience reaches to."""
    fingerprint: str
    """Hash over the shards' checksums."""
    shards: List[Shard] = field(default_factory=list)
    record: Dict[str, Any] = field(default_factory=dict)
    """The round's record: steps, seconds, decision, gate figures."""
    restores: Optional[int] = None
    """Release that this one makes live again, tensor by tensor (a rollback)."""
    audit: Dict[str, Any] = field(default_factory=dict)
    """Length and head of the audit log before the decision that made it live."""

    @property
    def weights(self) -> str:
        """Hash of its weights, however they are sharded."""
        return weights_fingerprint({name: digest for shard in self.shards for name, digest in shard.digests.items()})


class Releases:
    """The releases of a run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)

    def directory(self, number: int) -> Path:
        """Directory of a release, published or not."""
        return self.path / f"{number:06d}"

    def numbers(self) -> List[int]:
        """Numbers of the published releases, ascending."""
        found = (int(p.parent.name) for p in self.path.glob(f"[0-9]*/{MARKER}") if p.parent.name.isdigit())
        return sorted(found)

    def prepare(self, number: int) -> Path:
        """An empty directory for a candidate; what an earlier attempt left there is removed."""
        directory = self.directory(number)
        assert not (directory / MARKER).exists(), f"release {number} is published already"
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        return directory

    def publish(self, release: Release) -> None:
        """Make a candidate whose shards are in place live on disk: index first, marker last."""
        directory = self.directory(release.number)
        write_durably(directory / INDEX, json.dumps(asdict(release), indent=1).encode())
        write_durably(directory / MARKER, f"{release.fingerprint}\n".encode())

    def discard(self, number: int) -> None:
        """Remove a candidate that was not promoted."""
        assert not (self.directory(number) / MARKER).exists(), f"release {number} is published"
        shutil.rmtree(self.directory(number), ignore_errors=True)

    def read(self, number: int) -> Release:
        """The index of a published release."""
        return read_release(self.directory(number))


def read_release(directory: Path) -> Release:
    """The index of a published release in any directory; ValueError where it is not one."""
    if not (directory / MARKER).is_file():
        raise ValueError(
            f"{directory} is no published release: it has no {MARKER} marker; name a complete release folder"
        )
    plain = json.loads((directory / INDEX).read_text())
    return Release(**{**plain, "shards": [Shard(**shard) for shard in plain["shards"]]})


def sha256_of(path: Path) -> str:
    """Checksum of a file, read piece by piece; "no file" where there is none."""
    if not path.is_file():
        return "no file"
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_release(directory: Path, names: Optional[Sequence[str]] = None) -> Dict[str, Tensor]:
    """Tensors of a published release, all or those named, after checking the files they are in.

    Raises:
        ValueError: a shard is missing or does not have the checksum that the index gives.
    """
    release, wanted, tensors = read_release(directory), None if names is None else set(names), {}
    for shard in release.shards:
        if wanted is not None and not wanted & set(shard.tensors):
            continue
        path = directory / shard.file
        found = sha256_of(path)
        if found != shard.sha256:
            raise ValueError(f"{path} is damaged: sha256 {found}, {INDEX} says {shard.sha256}; restore it from a copy")
        loaded, _ = load_tensors(path)
        tensors.update({n: t for n, t in loaded.items() if wanted is None or n in wanted})
    missing = sorted((wanted or set()) - set(tensors))
    if missing:
        raise ValueError(f"{directory} lacks {missing[0]!r} and {len(missing) - 1} other tensors of this model")
    return tensors


def write_shard(directory: Path, rank: int, world: int, tensors: Mapping[str, Tensor], candidate: str = "") -> Shard:
    """Write one rank's shard of a candidate; `candidate` is the identity that its shards share."""
    file = f"shard-{rank:05d}-of-{world:05d}.safetensors"
    digest = save_tensors(directory / file, tensors, {"rank": rank, "world": world, "candidate": candidate})
    return Shard(file, digest, sorted(tensors), {name: tensor_digest(tensors[name]) for name in sorted(tensors)})


def inspect_shard(path: Path) -> ShardFacts:
    """Read a shard back and say what is there; a file that is missing or unreadable has no facts."""
    if not path.is_file():
        return ShardFacts(path.name, "")
    sha256 = sha256_of(path)
    try:
        tensors, meta = load_tensors(path)
    except (SafetensorError, ValueError):
        return ShardFacts(path.name, sha256)
    facts = {name: TensorFacts.of(tensor) for name, tensor in tensors.items()}
    place = (int(meta.get("rank", -1)), int(meta.get("world", 0)), str(meta.get("candidate", "")))
    return ShardFacts(path.name, sha256, *place, facts)


def layout(directory: Path) -> Dict[str, TensorFacts]:
    """Names, shapes and dtypes of a published release's tensors, from the headers of its shards alone."""
    wanted: Dict[str, TensorFacts] = {}
    for shard in read_release(directory).shards:
        with open(directory / shard.file, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name in shard.tensors:
            wanted[name] = TensorFacts(tuple(header[name]["shape"]), DTYPES[header[name]["dtype"]])
    return wanted


def copy_release(source: Path, target: Path) -> None:
    """Put the shards of a release into another directory, by hard link where the file system has them."""
    for shard in read_release(source).shards:
        try:
            os.link(source / shard.file, target / shard.file)
        except OSError:
            shutil.copyfile(source / shard.file, target / shard.file)
            sync(target / shard.file)
    sync(target)


def shards_fingerprint(shards: Sequence[Shard]) -> str:
    """One hash for all shards of a release."""
    return hashlib.sha256("".join(sorted(shard.sha256 for shard in shards)).encode()).hexdigest()
