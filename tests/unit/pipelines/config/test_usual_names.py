"""Names that are usual elsewhere lead to a key that exists here, or are said to have no counterpart."""

from __future__ import annotations

import re
from typing import List

import pytest

from pipelines.config.documentation import every_key, find
from pipelines.config.load import load_config
from pipelines.config.usual_names import NAMES, usual

KEY = re.compile(r"\b[a-z_]+(?:\.[A-Za-z_0-9]+)+")
FILES = {"events.jsonl"}


def keys_in(says: str) -> List[str]:
    return [name for name in KEY.findall(says) if name not in FILES]


@pytest.mark.parametrize(("names", "says"), NAMES, ids=lambda value: value.split()[0])
def test_every_key_that_a_name_leads_to_is_there(names: str, says: str) -> None:
    assert "\n" not in says and len(says) < 300
    assert keys_in(says) or says.startswith("there is no counterpart"), says
    for name in keys_in(says):
        key = find(name)
        assert key is not None and not key.is_section, name
    for name in re.findall(r"\b([a-z_]+(?:\.[a-z_]+)+)=([a-z0-9]+)", says):
        key = find(name[0])
        assert key is not None and (name[1] in key.bound or name[1] in key.doc), name


@pytest.mark.parametrize("name", ["batch_size", "seed", "wandb", "learning_rate", "warmup_steps", "sequence_length"])
def test_the_usual_names_are_led_to_ours(name: str) -> None:
    says = usual(name)
    assert says is not None
    for given in (name, name.upper(), name.replace("_", "-"), f"wake.{name}", f"levels.fast.optimizer.{name}"):
        with pytest.raises(ValueError, match=re.escape(f"unknown key '{given}'; {says}")):
            load_config("default", [f"{given}=1"])


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("lr", "base.lr"),
        ("num_train_epochs", "sleep.epochs"),
        ("block_size", "model.context"),
        ("max_length", "model.context"),
        ("output_dir", "run.root"),
        ("bf16", "compute.precision"),
        ("save_steps", "wake.checkpoint_every"),
        ("report_to", "tracking.uri"),
        ("num_workers", "compute.threads"),
        ("max_steps", "sleep.max_steps"),
        ("weight_decay", "sleep.optimizer.weight_decay"),
        ("optimizer", "sleep.optimizer.name"),
        ("train_file", "stream.path"),
        ("model_name_or_path", "base.checkpoint"),
        ("gradient_accumulation_steps", "pool.micro_batch"),
        ("max_grad_norm", "sleep.optimizer.clip"),
        ("device", "compute.device"),
        ("logging_steps", "report.look_every"),
        ("eval_steps", "report.look_every"),
        ("n_layer", "model.blocks"),
    ],
)
def test_a_name_leads_to_the_key_that_it_means(name: str, key: str) -> None:
    assert key in keys_in(usual(name) or "")


def test_no_name_of_the_table_hides_a_section_and_what_is_not_in_it_gets_the_nearest_key() -> None:
    sections = {key.name for key in every_key() if "." not in key.name}
    assert not sections & {name for names, _ in NAMES for name in names.split()}
    assert usual("half_lif") is None
    with pytest.raises(ValueError, match=r"did you mean 'wake\.batch'"):
        load_config("default", ["wake.batchh=1"])
