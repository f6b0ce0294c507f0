"""`circadian import` and `circadian export`: thin, and honest about what they are given."""

from __future__ import annotations

from pathlib import Path
from typing import Callable

import pytest
import torch
from typer.testing import CliRunner

from cluster.cli import app, main
from cluster.storage.export import TOKENIZER, export, keep_tokenizer, load_champion
from cluster.storage.releases import Release, Releases, shards_fingerprint, write_shard
from nl_model.hf import load_model
from nl_model.model import NestedLM
from nl_model.weights import fingerprint, join
from pipelines.config.load import to_yaml
from pipelines.config.schema import Config, TokenizerConfig
from pipelines.data.module import open_data
from pipelines.data.tokens import BPETokenizer
from tests.unit.nl_model.hf_checkpoints import save_checkpoint, stored, tokens


def publish(releases: Releases, number: int, model: NestedLM, marked: bool = True) -> None:
    directory = releases.prepare(number)
    tensors = join(weight={name: p.detach() for name, p in model.named_parameters()})
    shard = write_shard(directory, 0, 1, tensors)
    if marked:
        releases.publish(Release(number, None, 0, 0, -1, 0, shards_fingerprint([shard]), [shard]))


@pytest.fixture
def run_dir(tmp_path: Path, make_config: Callable[..., Config], make_model: Callable[..., NestedLM]) -> Path:
    """A run with a base, one promoted release, and a candidate nobody promoted; weights are drawn by number."""
    cfg, path = make_config(), tmp_path / "run"
    path.mkdir()
    (path / "config.yaml").write_text(to_yaml(cfg))
    releases = Releases(path / "releases")
    for number in range(3):
        publish(releases, number, make_model(cfg.levels, 257, seed=number), marked=number < 2)
    return path


def test_the_champion_is_the_newest_promoted_release(
    run_dir: Path, tmp_path: Path, make_config: Callable[..., Config], make_model: Callable[..., NestedLM]
) -> None:
    expected = make_model(make_config().levels, 257, seed=1)
    model, tokenizer, number = load_champion(run_dir)
    assert number == 1 and tokenizer.vocab_size == 257
    assert fingerprint(dict(model.named_parameters())) == fingerprint(dict(expected.named_parameters()))
    result = CliRunner().invoke(app, ["export", str(run_dir), str(tmp_path / "out")])
    assert result.exit_code == 0 and "release 1 of" in result.output
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "out")(tokens(2, 9)), expected(tokens(2, 9)))
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_a_trained_tokenizer_outlives_its_sources(
    tmp_path: Path, make_config: Callable[..., Config], make_model: Callable[..., NestedLM], corpus_folder: Path
) -> None:
    cfg = make_config(tokenizer=TokenizerConfig("bpe", 300))
    trained = open_data(cfg).tokenizer
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(to_yaml(cfg))
    publish(Releases(run_dir / "releases"), 0, make_model(cfg.levels, trained.vocab_size))
    _, rebuilt, _ = load_champion(run_dir)
    assert rebuilt.state() == trained.state(), "without a stored one it is trained again from the sources"
    keep_tokenizer(run_dir, trained)
    keep_tokenizer(run_dir, BPETokenizer.train(["another text"], 280))
    (run_dir / "config.yaml").write_text(to_yaml(cfg).replace(str(corpus_folder), "/nowhere"))
    _, kept, _ = load_champion(run_dir)
    assert kept.state() == trained.state() and (run_dir / TOKENIZER).is_file()


def test_import_then_export(tmp_path: Path) -> None:
    source, ours, theirs = save_checkpoint("qwen2", tmp_path / "hf"), tmp_path / "ours", tmp_path / "theirs"
    command = ["import", str(source), str(ours), "--levels", "16,32", "--adaptive", "last_half"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert load_model(ours).level_names == ("period16", "period32", "anchor")
    assert CliRunner().invoke(app, ["export", str(ours), str(theirs)]).exit_code == 0
    assert fingerprint(stored(theirs)) == fingerprint(stored(source))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["import", "{hf}", "{out}", "--levels", "512,1000"], "1000 is not a larger multiple of 512"),
        (["import", "{hf}", "{out}", "--levels", "fast"], "levels='fast' must be whole numbers"),
        (["import", "{hf}", "{out}", "--adaptive", "first"], "blocks='first' is neither"),
        (["import", "{hf}", "{hf}"], "is not an empty folder"),
        (["import", "{hf}/none", "{out}"], "config.json cannot be read"),
        (["export", "{hf}", "{out}"], "is neither a run directory nor a model directory"),
    ],
)
def test_errors_of_users_are_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = {"hf": str(save_checkpoint("llama", tmp_path / "hf")), "out": str(tmp_path / "out")}
    monkeypatch.setattr("sys.argv", ["circadian", *(word.format(**names) for word in arguments)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0]
    assert not (tmp_path / "out").exists()


def test_runs_that_cannot_be_exported(run_dir: Path, tmp_path: Path) -> None:
    shard = next((run_dir / "releases" / "000001").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is damaged"):
        export(run_dir, tmp_path / "out")
    for marker in (run_dir / "releases").glob("*/STABLE"):
        marker.unlink()
    with pytest.raises(ValueError, match="has no release yet"):
        export(run_dir, tmp_path / "out")
    assert not (tmp_path / "out").exists()
