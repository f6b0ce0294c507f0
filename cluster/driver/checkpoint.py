"""What base.checkpoint names, looked at before a run begins: that it is a whole release, and one of this model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Dict, Mapping

import torch

from cluster.storage.export import TOKENIZER, is_run
from cluster.storage.releases import MARKER, Releases, layout, read_release, sha256_of
from nl_model.model import NestedLM
from pipelines.config.schema import Config
from pipelines.data.tokens import Tokenizer
from pipelines.gate.evidence import TensorFacts

WHAT = "give a release directory, runs/NAME/releases/NUMBER"


def check_checkpoint(cfg: Config, run_dir: Path, tokenizer: Tokenizer) -> None:
    """Refuse a checkpoint that a run could not start from. A run that has its release 0 opens none any more.

    Raises:
        ValueError: there is no such release, it is damaged, or it is of another model or another tokenizer.
    """
    if cfg.base.checkpoint is None or (run_dir / "releases" / "000000" / MARKER).is_file():
        return
    directory, named = Path(cfg.base.checkpoint), name(cfg)
    _check_kind(directory, named)
    try:
        shards = read_release(directory).shards
    except (OSError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{named} cannot be read ({error!r}); restore it from a copy, or name another one") from None
    for shard in shards:
        _check_file(directory / shard.file, shard.sha256, named)
    check_tokenizer(directory, named, tokenizer)
    check_tensors(cfg, tokenizer.vocab_size, layout(directory))


def name(cfg: Config) -> str:
    """Key and value, as errors name them."""
    return f"base.checkpoint={cfg.base.checkpoint!r}"


def _check_kind(directory: Path, named: str) -> None:
    """ValueError unless a path is a folder with a release's marker; says what it is instead, where that is known."""
    if not directory.exists():
        raise ValueError(f"{named} does not exist; {WHAT}")
    if not directory.is_dir():
        raise ValueError(f"{named} is a file; {WHAT}")
    if is_run(directory):
        numbers = Releases(directory / "releases").numbers()
        newest = f"its newest release is {directory}/releases/{numbers[-1]:06d}" if numbers else "it has no release yet"
        raise ValueError(f"{named} is a run, not one of its releases; {newest}")
    if (directory / "config.json").is_file():
        raise ValueError(f"{named} is a model for transformers, which a run cannot start from; {WHAT}")
    if not (directory / MARKER).is_file():
        raise ValueError(f"{named} is no published release: it has no {MARKER} marker; {WHAT}")


def _check_file(path: Path, sha256: str, named: str) -> None:
    found = sha256_of(path)
    if found != sha256:
        raise ValueError(
            f"{named}: {path.name} is damaged: sha256 {found}, its index says {sha256}; restore it from a copy"
        )


def check_tokenizer(directory: Path, named: str, tokenizer: Tokenizer) -> None:
    """ValueError where the run that made a release, if it lies beside it, had another tokenizer: its weights know
    other tokens, even where there are as many."""
    path = directory.parent.parent / TOKENIZER
    if not path.is_file():
        return
    old: Dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    new = tokenizer.state()
    if old != new:
        kinds = f"{old.get('kind')} instead of {new['kind']}" if old.get("kind") != new["kind"] else "other merges"
        raise ValueError(
            f"{named} was made with another tokenizer ({kinds}); use tokenizer.kind={old.get('kind')}, and for bpe "
            f"tokenizer.path=OUT/tokenizer.json, which `circadian export {directory.parent.parent} OUT` makes"
        )


def check_tensors(cfg: Config, vocab_size: int, tensors: Mapping[str, TensorFacts]) -> None:
    """ValueError unless a release has every parameter of the pool's levels, in this model's shapes, and no other.

    Levels of the learner that it lacks start neutral.
    """
    with torch.device("meta"):
        model = NestedLM(cfg.model, cfg.levels, vocab_size)
    wanted = {parameter: tuple(p.shape) for parameter, p in model.named_parameters()}
    found = {key.removeprefix("weight/"): facts.shape for key, facts in tensors.items() if key.startswith("weight/")}
    remedy = "use the model.* and levels.* it was made with"
    if cfg.base.checkpoint is not None:
        config = Path(cfg.base.checkpoint).parent.parent / "config.yaml"
        remedy += f": {config}" if config.is_file() else ""
    for parameter, shape in found.items():
        if parameter not in wanted:
            raise ValueError(f"{name(cfg)} holds {parameter!r}, which this model does not have; {remedy}")
        if shape != wanted[parameter]:
            _refuse_shape(f"{name(cfg)}: {parameter!r}", shape, wanted[parameter], vocab_size, remedy)
    missing = [parameter for parameter in model.owned_by("pool") if parameter not in found]
    if missing:
        more = f" and {len(missing) - 1} more parameters" if len(missing) > 1 else ""
        raise ValueError(f"{name(cfg)} lacks {missing[0]!r}{more} of the pool's levels; {remedy}")


def _refuse_shape(what: str, found: tuple[int, ...], wanted: tuple[int, ...], vocab_size: int, remedy: str) -> None:
    if wanted[:1] == (vocab_size,) and found[1:] == wanted[1:]:
        remedy = f"its vocabulary has {found[0]} tokens, this one {vocab_size}: use the tokenizer.* it was made with"
    raise ValueError(f"{what} has shape {found}, this model wants {wanted}; {remedy}")
