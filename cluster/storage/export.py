"""What leaves a run: its champion, the newest promoted release, as a model directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Tuple

from cluster.storage.releases import Releases, load_release
from nl_model.model import NestedLM
from nl_model.weights import load_into, split, write_durably
from pipelines.config.load import load_config
from pipelines.data.module import open_data
from pipelines.data.tokens import Tokenizer, build_tokenizer, tokenizer_from_state

TOKENIZER = "tokenizer_state.json"


def keep_tokenizer(run_dir: Path, tokenizer: Tokenizer) -> None:
    """Store a run's tokenizer, once: what is trained on sources must outlive them."""
    if not (run_dir / TOKENIZER).exists():
        write_durably(run_dir / TOKENIZER, json.dumps(tokenizer.state()).encode())


def read_tokenizer(run_dir: Path) -> Tokenizer:
    """The tokenizer of a run. Where none was stored it is built from the run's configuration and sources."""
    if (run_dir / TOKENIZER).is_file():
        return tokenizer_from_state(json.loads((run_dir / TOKENIZER).read_text()))
    cfg = load_config(str(run_dir / "config.yaml"))
    if cfg.tokenizer.kind == "byte" or cfg.tokenizer.path is not None:
        return build_tokenizer(cfg.tokenizer, ())
    return open_data(cfg).tokenizer


def is_run(path: Path) -> bool:
    """Whether a path is a run directory."""
    return (path / "config.yaml").is_file() and (path / "releases").is_dir()


def load_champion(run_dir: Path) -> Tuple[NestedLM, Tokenizer, int]:
    """Model, tokenizer and number of a run's newest promoted release, on the CPU.

    Raises:
        ValueError: the run has no release yet, or the release is damaged or of another model.
    """
    cfg = load_config(str(run_dir / "config.yaml"))
    releases = Releases(run_dir / "releases")
    if not releases.numbers():
        raise ValueError(f"{run_dir} has no release yet; let the run finish its base first")
    number = releases.numbers()[-1]
    tokenizer = read_tokenizer(run_dir)
    weights = split(load_release(releases.directory(number)), "weight")
    model = NestedLM(cfg.model, cfg.levels, tokenizer.vocab_size)
    missing = [name for name, _ in model.named_parameters() if name not in weights]
    if missing:
        raise ValueError(f"release {number} of {run_dir} lacks {missing[0]!r} and {len(missing) - 1} more parameters")
    load_into(model, weights)
    return model, tokenizer, number


def export(source: Path, out: Path) -> str:
    """Write a run's champion, or a model directory, as a transformers directory; returns one line on what it is.

    Raises:
        ValueError: the source is neither, or incomplete; or `out` is not empty.
    """
    from nl_model import hf  # noqa: PLC0415 (transformers takes seconds to load)

    if is_run(source):
        model, tokenizer, number = load_champion(source)
        hf.save_nested(model, out, tokenizer.state(), tokenizer.eos)
        return f"release {number} of {source} in {out}; `import nl_model.hf` before AutoModelForCausalLM loads it"
    if hf.is_model_directory(source):
        hf.export_directory(source, out)
        return f"{source} in {out}; AutoModelForCausalLM loads it"
    raise ValueError(f"{source} is neither a run directory nor a model directory written by `circadian import`")
