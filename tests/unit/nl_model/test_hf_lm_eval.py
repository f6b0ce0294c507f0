"""An exported model under lm_eval, with a task of our own and without a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable, Dict

import pytest

from nl_model.config import LevelConfig, ModelConfig
from nl_model.hf import save_nested
from nl_model.model import NestedLM
from pipelines.data.tokens import ByteTokenizer

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'circadian[eval]'")

TASK = """
task: seasons
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
"""


def test_lm_eval_scores_an_export(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_levels: Callable[..., Dict[str, LevelConfig]],
    make_model: Callable[..., NestedLM],
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"question": f"after {n}", "choices": [" a", " b c"], "label": n % 2} for n in range(6)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "seasons.yaml").write_text(TASK.format(data=data))
    model = make_model(make_levels(), 257, shape=ModelConfig(dim=16, blocks=2, heads=2, context=24))
    save_nested(model, tmp_path / "out", ByteTokenizer().state(), 256)

    from lm_eval.tasks import TaskManager

    found: Dict[str, Any] = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(tmp_path / "out"), "device": "cpu", "dtype": "float32"},
        tasks=["seasons"],
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        batch_size=2,
        bootstrap_iters=0,
    )
    correct = 0
    for row in rows:
        scores = [_log_likelihood(model, row["question"], choice) for choice in row["choices"]]
        correct += scores.index(max(scores)) == row["label"]
    assert found["results"]["seasons"]["acc,none"] == pytest.approx(correct / len(rows))


def _log_likelihood(model: NestedLM, question: str, choice: str) -> float:
    import torch

    ids = torch.tensor([list((question + choice).encode())])
    with torch.no_grad():
        return -float(model.nll(ids)[0, len(question.encode()) - 1 :].sum())
