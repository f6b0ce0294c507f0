"""Weights on disk: bit-equal, whole or not there at all, and refused by name where they do not fit."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Callable, Dict

import pytest
import torch
from torch import Tensor

from nl_model.config import LevelConfig
from nl_model.model import NestedLM
from nl_model.weights import (
    fingerprint,
    join,
    load_into,
    load_tensors,
    parameters_of,
    save_tensors,
    split,
    write_durably,
)

Make = Callable[..., NestedLM]


@pytest.fixture
def model(make_model: Make, make_levels: Callable[..., Dict[str, LevelConfig]]) -> NestedLM:
    return make_model(make_levels(), 13)


def tensors() -> Dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    odd = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), 1e-45])
    return {
        "odd": odd,
        "matrix": torch.randn(3, 4, generator=generator, dtype=torch.float64).T,
        "half": torch.randn(5, generator=generator).bfloat16(),
        "count": torch.tensor([3, 2**40]),
        "step": torch.tensor(7.0),
        "none": torch.empty(0, 2),
    }


def test_what_was_joined_is_split_again() -> None:
    weight, offset = {"fast.up": 1, "slow.up": 2}, {"fast.up": 3}
    joined = join(weight=weight, offset=offset)
    assert joined == {"weight/fast.up": 1, "weight/slow.up": 2, "offset/fast.up": 3}
    assert split(joined, "weight") == weight and split(joined, "offset") == offset and split(joined, "off") == {}


def test_a_round_trip_is_exact_to_the_bit(tmp_path: Path) -> None:
    path, meta = tmp_path / "file.safetensors", {"tokens": 2**40, "cursor": {"key": 1, "positions": {"ä": [1, 2]}}}
    digest = save_tensors(path, tensors(), meta)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    loaded, found = load_tensors(path)
    assert found == meta
    assert loaded.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape
        assert torch.equal(loaded[name], tensor), name
    assert torch.equal(torch.signbit(loaded["odd"]), torch.signbit(tensors()["odd"]))


def test_the_same_tensors_give_the_same_file(tmp_path: Path) -> None:
    assert save_tensors(tmp_path / "a", tensors(), {"x": 1}) == save_tensors(tmp_path / "b", tensors(), {"x": 1})
    assert save_tensors(tmp_path / "a", tensors(), {"x": 1}) != save_tensors(tmp_path / "b", tensors(), {"x": 2})


def test_meta_may_be_left_out(tmp_path: Path) -> None:
    save_tensors(tmp_path / "file", {"a": torch.zeros(1)})
    assert load_tensors(tmp_path / "file")[1] == {}


def test_writing_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_durably(path, b"old")
    with open(path, "rb") as reader:
        write_durably(path, b"new content")
        assert reader.read() == b"old", "a reader of the old file is not disturbed"
    assert path.read_bytes() == b"new content"
    assert os.listdir(tmp_path) == ["state.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.mkdir()
    with pytest.raises(OSError):
        write_durably(path, b"new")
    assert path.is_dir()
    with pytest.raises(FileNotFoundError):
        write_durably(tmp_path / "missing" / "state.json", b"new")


@pytest.mark.parametrize("owner", ["learner", "pool"])
def test_parameters_of_an_owner_are_copies(model: NestedLM, owner: str) -> None:
    copies, state = parameters_of(model, owner), dict(model.named_parameters())
    assert list(copies) == model.owned_by(owner)
    for name, tensor in copies.items():
        assert torch.equal(tensor, state[name]) and not tensor.requires_grad
        tensor.zero_()
        assert state[name].abs().sum() > 0


def test_load_into_writes_what_is_named_and_nothing_else(model: NestedLM) -> None:
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    load_into(model, {name: tensor + 1 for name, tensor in parameters_of(model, "learner").items()})
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name] + 1 if name in model.owned_by("learner") else before[name])
        assert parameter.requires_grad


def test_weights_that_do_not_fit_are_named(model: NestedLM) -> None:
    with pytest.raises(ValueError, match=r"'blocks\.7\.mixer\.out\.weight'.*check model and levels"):
        load_into(model, {"blocks.7.mixer.out.weight": torch.zeros(8, 8)})
    with pytest.raises(ValueError, match=r"'head\.weight'.*\(13, 9\).*\(13, 8\)"):
        load_into(model, {"head.weight": torch.zeros(13, 9)})


def test_a_fingerprint_sees_everything_but_order() -> None:
    plain = {"a": torch.ones(2, 3), "b": torch.zeros(4)}
    assert fingerprint(plain) == fingerprint(dict(reversed(plain.items())))
    others = [
        {"a": torch.ones(3, 2), "b": torch.zeros(4)},
        {"a": torch.ones(2, 3), "c": torch.zeros(4)},
        {"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.int32)},
        {"a": torch.ones(2, 3), "b": torch.tensor([0.0, 0.0, -0.0, 0.0])},
        {"a": torch.ones(2, 3)},
    ]
    assert len({fingerprint(tensors) for tensors in [plain, *others]}) == 6
