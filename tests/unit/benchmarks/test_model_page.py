"""The examples of docs/MODEL.md run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Dict

import pytest
import torch

from nl_model.hf import RetrofitConfig, import_checkpoint, load_model
from tests.unit.nl_model.hf_checkpoints import VOCAB, save_checkpoint

PAGE = Path(__file__).resolve().parents[3] / "docs" / "MODEL.md"


def example(number: int) -> Any:
    """A Python example by its place."""
    found = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(found) == 2
    return compile(found[number], str(PAGE), "exec")


def test_the_example_of_an_imported_model_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    import_checkpoint(save_checkpoint("llama", tmp_path / "there"), tmp_path / "OUT", RetrofitConfig((32, 64), "all"))
    generator = torch.Generator().manual_seed(0)
    given: Dict[str, Any] = {
        "tokens_BS": torch.randint(VOCAB, (4, 17), generator=generator),
        "prompt_BN": torch.randint(VOCAB, (2, 5), generator=generator),
    }
    exec(example(1), given)
    assert given["loss_BT"].shape == (4, 16) and given["text_BN"].size(1) <= 25
    learned, before = load_model(tmp_path / "LEARNED"), load_model(tmp_path / "OUT")
    changed = {n for (n, a), b in zip(learned.named_parameters(), before.parameters(), strict=True) if not a.equal(b)}
    assert changed and all(learned.level_of(name) != learned.level_names[-1] for name in changed)


def test_the_example_of_the_model_runs() -> None:
    generator = torch.Generator().manual_seed(0)
    given: Dict[str, Any] = {
        "tokens_BS": torch.randint(256, (8, 129), generator=generator),
        "more_tokens_BN": torch.randint(256, (4, 700), generator=generator),
        "prompt_BN": torch.randint(256, (2, 40), generator=generator),
    }
    exec(example(0), given)
    assert given["loss_BT"].shape == (8, 128)
    assert given["logits_BNV"].shape == (4, 700, 256)
    assert given["text_BN"].shape == (2, 140)
    assert int(given["state"]["tokens"]) == 1024
