"""A transformers checkpoint on disk, judged by its config and its safetensors headers before a weight is read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Dict, List, Tuple

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

Shapes = Dict[str, Tuple[int, ...]]

BLOCKS = {
    "llama": "model.layers",
    "qwen2": "model.layers",
    "qwen3": "model.layers",
    "mistral": "model.layers",
    "gpt2": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
}
"""Where the decoder blocks of each supported architecture lie; every block has its MLP in `mlp`."""
OURS = "circadian"
"""The model_type of our own models."""
WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
_OLD_BUFFERS = re.compile(r"(attn|attention)\.(bias|masked_bias)$|rotary_emb\.inv_freq$")
"""Masks and frequencies that older versions of transformers stored beside the weights."""
_RENAMED = (re.compile(r"^embed_out\."), "lm_head.")
"""GPT-NeoX calls its head so on disk; transformers translates both ways."""


def read_json(path: Path) -> Dict[str, Any]:
    """A JSON object; ValueError where the file is missing or something else."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}; name a complete checkpoint") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); restore it from a copy") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(tree).__name__}")
    return tree


def read_config(directory: Path) -> PretrainedConfig:
    """The config of a checkpoint that we can take in; ValueError for any other."""
    plain = read_json(directory / CONFIG)
    kind = plain.get("model_type")
    if kind not in BLOCKS and kind != OURS:
        raise ValueError(f"{directory} has model_type={kind!r}; supported are {', '.join(BLOCKS)}")
    if plain.get("quantization_config"):
        raise ValueError(
            f"{directory} is quantised; a level needs weights that can be written, use an fp32/bf16/fp16 copy"
        )
    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # its validators raise classes of their own
        raise ValueError(
            f"{directory / CONFIG} cannot be read as a configuration ({error!r}); fetch it again"
        ) from error


def shard_files(directory: Path) -> List[Path]:
    """The safetensors files of a checkpoint, in order of name; ValueError where one of them is missing."""
    if (directory / INDEX).is_file():
        named = sorted(set(read_json(directory / INDEX).get("weight_map", {}).values()))
    elif (directory / WEIGHTS).is_file():
        named = [WEIGHTS]
    else:
        pickled = next(directory.glob("pytorch_model*.bin"), None)
        hint = f"{pickled.name} is pickled, save the model again with save_pretrained" if pickled else "fetch them"
        raise ValueError(f"{directory} has neither {WEIGHTS} nor {INDEX}; {hint}")
    missing = [name for name in named if not (directory / name).is_file()]
    if missing or not named:
        raise ValueError(
            f"{directory} lacks {len(missing)} of {len(named)} shards that {INDEX} names ({', '.join(missing[:3])}); "
            "fetch the checkpoint again"
        )
    return [directory / name for name in named]


def stored_shapes(files: List[Path]) -> Shapes:
    """Shapes by tensor name, read from the headers alone."""
    shapes: Shapes = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                shapes.update({name: tuple(file.get_slice(name).get_shape()) for name in file.keys()})  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or cut short ({error}); fetch it again") from None
    return shapes


def empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """The model of a config without storage for its weights. ValueError where the config cannot be built."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception as error:  # whatever transformers makes of a value that it cannot use
        raise ValueError(f"{CONFIG} does not describe a model of type {config.model_type} ({error!r})") from error


def check_checkpoint(directory: Path) -> PretrainedConfig:
    """The config of a checkpoint whose weights are all there and fit it.

    Raises:
        ValueError: unsupported architecture, missing or damaged shard, tensor missing, left over or of another shape.
    """
    config = read_config(directory)
    found = stored_shapes(shard_files(directory))
    model = empty_model(config)
    # Named once each: of tied tensors a checkpoint may hold one or both.
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    tied = set(model.all_tied_weights_keys)
    known = {name: _model_name(name, wanted, f"{model.base_model_prefix}.") for name in found}
    for name, shape in found.items():
        if known[name] in wanted and shape != wanted[known[name]]:
            raise ValueError(
                f"{directory}: {name} has shape {shape}, {CONFIG} wants {wanted[known[name]]}; "
                "config and weights are of different models"
            )
    _name_first(directory, "lacks", [n for n in wanted if n not in set(known.values()) and n not in tied])
    left = [n for n in found if known[n] not in wanted and n not in tied and not _OLD_BUFFERS.search(n)]
    _name_first(directory, "holds tensors that its config has no place for:", left)
    return config


def _model_name(stored: str, wanted: Shapes, prefix: str) -> str:
    """The parameter that a stored tensor is for. Some checkpoints were saved from the model without its head."""
    candidates = (stored, prefix + stored, _RENAMED[0].sub(_RENAMED[1], stored))
    return next((name for name in candidates if name in wanted), stored)


def _name_first(directory: Path, problem: str, names: List[str]) -> None:
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise ValueError(f"{directory} {problem} {names[0]!r}{more}; config and weights are of different models")
