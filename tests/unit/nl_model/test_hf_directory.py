"""Model directories: what is wrong is named, nothing is overwritten, nothing half-written stays."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Callable

import pytest
import torch

from nl_model.hf import RetrofitConfig, import_checkpoint, load_model
from nl_model.hf.directory import export_directory, is_model_directory, new_directory
from tests.unit.nl_model.hf_checkpoints import save_checkpoint

LEVELS = RetrofitConfig((8, 16), "last_half")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint("llama", tmp_path_factory.mktemp("pristine") / "llama")


@pytest.fixture
def checkpoint(pristine: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(pristine, tmp_path / "checkpoint"))


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def pickle_only(folder: Path) -> None:
    for path in [*shards(folder), folder / "model.safetensors.index.json"]:
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda d: edit(d / "config.json", model_type="t5"),
            r"model_type='t5'; supported are llama, qwen2, qwen3, mistral",
        ),
        (lambda d: edit(d / "config.json", quantization_config={"bits": 4}), "is quantised"),
        (lambda d: (d / "config.json").write_text("{"), r"config\.json is not valid JSON"),
        (lambda d: (d / "config.json").write_text("[]"), r"config\.json must hold a JSON object"),
        (lambda d: (d / "config.json").unlink(), r"config\.json cannot be read: No such file"),
        (lambda d: shards(d)[1].unlink(), r"lacks 1 of \d+ shards .*model-00002-of"),
        (lambda d: cut(shards(d)[1]), r"model-00002-of-\d+\.safetensors is damaged or cut short"),
        (pickle_only, r"pytorch_model\.bin is pickled, save the model again"),
        (lambda d: edit(d / "config.json", intermediate_size=40), r"mlp\.\w+\.weight has shape .*config\.json wants"),
        (lambda d: edit(d / "config.json", num_hidden_layers=6), r"no place for: 'model\.layers\.6.* and \d+ more"),
        (lambda d: edit(d / "config.json", num_hidden_layers=9), r"lacks 'model\.layers\.8.* and 8 more"),
        (lambda d: edit(d / "config.json", tie_word_embeddings=False), r"lacks 'lm_head\.weight'"),
    ],
)
def test_a_wrong_checkpoint_is_named_before_anything_is_written(
    checkpoint: Path, damage: Callable[[Path], Any], message: str
) -> None:
    damage(checkpoint)
    with pytest.raises(ValueError, match=message):
        import_checkpoint(checkpoint, checkpoint.parent / "out", LEVELS)
    assert [path.name for path in checkpoint.parent.iterdir()] == ["checkpoint"]


def test_nothing_is_overwritten(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    import_checkpoint(checkpoint, out, LEVELS)  # an empty folder may be filled
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for write in (import_checkpoint, export_directory):
        with pytest.raises(ValueError, match=r"out exists and is not an empty folder"):
            write(checkpoint, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file exists"):
        export_directory(out, tmp_path / "file")


def test_a_directory_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="power cut"), new_directory(tmp_path / "deep" / "out") as directory:
        (directory / "half").write_text("")
        assert not (tmp_path / "deep" / "out").exists()
        raise RuntimeError("power cut")
    assert list((tmp_path / "deep").iterdir()) == []


def test_what_load_model_refuses(checkpoint: Path, tmp_path: Path) -> None:
    assert not is_model_directory(checkpoint) and not is_model_directory(tmp_path)
    with pytest.raises(ValueError, match=r"plain checkpoint without levels\.json; `circadian import` it first"):
        load_model(checkpoint)
    import_checkpoint(checkpoint, tmp_path / "out", LEVELS)
    assert is_model_directory(tmp_path / "out")
    levels = tmp_path / "out" / "levels.json"
    plain = json.loads(levels.read_text())
    for change, message in [
        ({"format": 2}, r"format=2, this version reads 1"),
        ({"levels": {}}, r"levels must be a list"),
        ({"levels": [{**plain["levels"][0], "speed": 1}]}, r"unknown key 'speed' in a LevelConfig"),
        ({"levels": plain["levels"][:1]}, r"no level has owner=pool"),
        ({"levels": [{**plain["levels"][0], "blocks": "8"}, plain["levels"][-1]]}, r"names a block outside 0\.\.7"),
    ]:
        levels.write_text(json.dumps({**plain, **change}))
        with pytest.raises(ValueError, match=message):
            load_model(tmp_path / "out")
    shards(tmp_path / "out")[0].unlink()
    with pytest.raises(ValueError, match="lacks 1 of"):
        load_model(tmp_path / "out")


def test_import_reads_no_weights(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Headers are enough: a checkpoint larger than the memory can be imported."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a weight was allocated or drawn")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", refuse)
    monkeypatch.setattr(torch.nn.Parameter, "__new__", _on_meta_only(torch.nn.Parameter.__new__, refuse))
    import_checkpoint(checkpoint, tmp_path / "out", LEVELS)


def _on_meta_only(new: Any, refuse: Callable[..., None]) -> Any:
    def checked(cls: Any, data: Any = None, requires_grad: bool = True) -> Any:
        if data is not None and data.device.type != "meta":
            refuse()
        return new(cls, data, requires_grad)

    return checked
