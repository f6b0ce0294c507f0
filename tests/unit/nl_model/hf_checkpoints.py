"""Tiny checkpoints of every supported architecture, made with transformers itself, and processes that know it alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict

import torch
from safetensors import safe_open
from torch import Tensor

ROOT = Path(__file__).resolve().parents[3]
KINDS = ("llama", "qwen2", "qwen3", "mistral", "gpt2", "gpt_neox")
BLOCKS, VOCAB, CONTEXT = 8, 61, 32
IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}


def config(kind: str, **values: Any) -> Any:
    """A config of 8 blocks of width 32."""
    from transformers import AutoConfig

    shape = {"hidden_size": 32, "num_hidden_layers": BLOCKS, "num_attention_heads": 4, "vocab_size": VOCAB, **IDS}
    shape["max_position_embeddings"] = CONTEXT
    if kind != "gpt2":
        shape["intermediate_size"] = 48
    if kind in ("llama", "qwen2", "qwen3", "mistral"):
        shape["num_key_value_heads"] = 2
    if kind == "llama":
        shape["tie_word_embeddings"] = True
    return AutoConfig.for_model(kind, **{**shape, **values})


def save_checkpoint(kind: str, folder: Path, dtype: torch.dtype = torch.float32, **values: Any) -> Path:
    """A sharded checkpoint none of whose tensors is all zeros or ones."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config(kind, **values))
    generator = torch.Generator().manual_seed(len(kind))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.empty(parameter.shape).normal_(0.0, 0.2, generator=generator))
    model.to(dtype).save_pretrained(folder, max_shard_size="40KB")
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 32}')
    (folder / "optimizer.bin").write_bytes(b"not ours to copy")
    return folder


def load_plainly(folder: Path) -> Any:
    """The model as transformers loads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True).eval()


def stored(folder: Path) -> Dict[str, Tensor]:
    """Every tensor of a folder's safetensors files."""
    tensors: Dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return tensors


def tokens(rows: int = 3, length: int = 17, vocab: int = VOCAB) -> Tensor:
    return torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(1))


def python(code: str, *arguments: str, cwd: Path, ours: bool) -> str:
    """Output of a program in a process of its own, with our packages on its path or without."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", **({"PYTHONPATH": str(ROOT)} if ours else {}))
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=env,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
