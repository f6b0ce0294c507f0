"""Retrofits: nothing is added, the first forward pass is the host's, and a write touches one level."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Callable, Dict, List

import pytest
import torch
from torch import Tensor

from nl_model.config import LevelConfig, OptimizerConfig
from nl_model.hf import (
    RetrofitConfig,
    RetrofitLM,
    import_checkpoint,
    load_model,
    parse_periods,
    retrofit,
    save_retrofit,
)
from nl_model.hf.directory import export_directory
from nl_model.hf.retrofit import depth_partition, retrofit_levels
from nl_model.optim.levelwise import LevelOptimizers
from nl_model.weights import fingerprint, save_tensors
from tests.unit.nl_model.hf_checkpoints import (
    BLOCKS,
    KINDS,
    config,
    load_plainly,
    python,
    save_checkpoint,
    stored,
    tokens,
)

LEVELS = RetrofitConfig((8, 16, 32), "last_half", optimizer=OptimizerConfig(lr=1e-2))
LEARNER = ["period8", "period16", "period32"]


class Folders(Dict[str, Path]):
    """Folders by architecture, each made when it is first asked for."""

    def __init__(self, make: Callable[[str], Path]) -> None:
        super().__init__()
        self.make = make

    def __missing__(self, kind: str) -> Path:
        self[kind] = self.make(kind)
        return self[kind]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return Folders(lambda kind: save_checkpoint(kind, folder / kind))


@pytest.fixture(scope="module")
def imported(checkpoints: Dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Dict[str, Path]:
    folder = tmp_path_factory.mktemp("imported")

    def make(kind: str) -> Path:
        import_checkpoint(checkpoints[kind], folder / kind, LEVELS)
        return folder / kind

    return Folders(make)


def load(path: Path) -> RetrofitLM:
    model = load_model(path)
    assert isinstance(model, RetrofitLM)
    return model


def accumulate(model: RetrofitLM) -> LevelOptimizers:
    """Gradients of one batch, ready to be written."""
    optimizers, batch = LevelOptimizers(model.train_only("learner"), LEARNER), tokens()
    model.nll(batch).sum().backward()
    optimizers.count(batch[:, 1:].numel())
    return optimizers


@pytest.mark.parametrize("kind", KINDS)
def test_an_imported_model_is_its_host_to_the_bit(
    kind: str, checkpoints: Dict[str, Path], imported: Dict[str, Path]
) -> None:
    """Check 7: before the first write the logits are the pretrained model's."""
    assert len(list(checkpoints[kind].glob("*.safetensors"))) > 3, "the test wants shards"
    host, model = load_plainly(checkpoints[kind]), load(imported[kind])
    with torch.no_grad():
        assert torch.equal(model(tokens()), host(tokens()).logits)
        assert torch.equal(model.train()(tokens()), host(tokens()).logits), "dropout stays off"
    assert [n for n, _ in model.named_parameters()] == [f"body.{n}" for n, _ in host.named_parameters()]
    assert model.vocab_size == host.config.vocab_size


@pytest.mark.parametrize("kind", KINDS)
def test_levels_are_the_mlps_of_their_blocks(kind: str, imported: Dict[str, Path]) -> None:
    model = load(imported[kind])
    blocks = {level: sorted({n.split(".mlp.")[0][-1] for n in model.parameters_of(level)}) for level in LEARNER}
    assert blocks == {"period8": ["4"], "period16": ["5"], "period32": ["6", "7"]}
    assert all(".mlp." in name for name in model.owned_by("learner"))
    anchor = model.parameters_of("anchor")
    assert {n for n, _ in model.named_parameters()} - set(model.owned_by("learner")) == set(anchor)
    assert {n.split(".mlp.")[0][-1] for n in anchor if ".mlp." in n} == set("0123")
    assert model.level_names == (*LEARNER, "anchor") and model.level_configs["anchor"].owner == "pool"
    assert model.level_sizes()["period32"] == 2 * model.level_sizes()["period8"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_write_changes_one_level(kind: str, imported: Dict[str, Path]) -> None:
    model = load(imported[kind])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizers = accumulate(model)
    assert {n for n, p in model.named_parameters() if p.grad is not None} == set(model.owned_by("learner"))
    optimizers.write("period8")
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(model.parameters_of("period8"))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_of_size_zero_change_nothing(kind: str, optimizer: str, checkpoints: Dict[str, Path]) -> None:
    """Check 7: with eta = 0 the logits stay the pretrained model's."""
    model = retrofit(checkpoints[kind], replace(LEVELS, optimizer=OptimizerConfig(optimizer, lr=0.0)))
    optimizers = accumulate(model)
    for name in LEARNER:
        optimizers.write(name)
    with torch.no_grad():
        assert torch.equal(model(tokens()), load_plainly(checkpoints[kind])(tokens()).logits)


def test_the_backward_pass_stops_at_the_lowest_adaptive_block(imported: Dict[str, Path]) -> None:
    model, differentiable = load(imported["llama"]).train_only("learner"), []
    for block in model.body.model.layers:
        block.register_forward_hook(lambda _module, _inputs, output: differentiable.append(output.requires_grad))
    model.nll(tokens())
    assert differentiable == [False] * 4 + [True] * 4


READ = """
import sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    expected = load_file(folder + ".logits")
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    with torch.no_grad():
        print(torch.equal(model(expected["tokens"]).logits, expected["logits"]))
assert not any(name.split(".")[0] in ("nl_model", "pipelines", "cluster") for name in sys.modules)
"""


def test_others_load_what_has_learned(imported: Dict[str, Path], tmp_path: Path) -> None:
    """The exports are plain transformers directories: a process without our packages gets the same logits."""
    out: List[str] = []
    for kind in KINDS:
        path = imported[kind]
        model, saved, exported = load(path), tmp_path / f"{kind}-saved", tmp_path / kind
        before = fingerprint(stored(path))
        accumulate(model).write("period8")
        save_retrofit(model, saved, path, shard="40KB")
        again = load(saved)
        assert again.level_configs == model.level_configs
        export_directory(saved, exported)
        assert fingerprint(stored(exported)) != before
        assert not (exported / "levels.json").exists() and (exported / "tokenizer_config.json").exists()
        with torch.no_grad():
            logits = model(tokens())
            assert torch.equal(again(tokens()), logits)
        save_tensors(tmp_path / f"{kind}.logits", {"tokens": tokens(), "logits": logits})
        out.append(str(exported))
    assert python(READ, *out, cwd=tmp_path, ours=False).split() == ["True"] * len(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_import_and_export_hand_the_weights_through(
    kind: str, checkpoints: Dict[str, Path], imported: Dict[str, Path], tmp_path: Path
) -> None:
    export_directory(imported[kind], tmp_path / "out")
    hashes = {fingerprint(stored(path)) for path in (checkpoints[kind], imported[kind], tmp_path / "out")}
    assert len(hashes) == 1
    save_retrofit(load(imported[kind]), tmp_path / "saved", imported[kind])
    assert fingerprint(stored(tmp_path / "saved")) in hashes, "loading and saving is exact as well"
    copied = {path.name for path in checkpoints[kind].iterdir()} - {"optimizer.bin"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == copied
    assert {path.name for path in imported[kind].iterdir()} == copied | {"levels.json"}


def test_weights_keep_their_dtype_unless_asked(tmp_path: Path) -> None:
    path = save_checkpoint("qwen3", tmp_path / "half", torch.bfloat16)
    model, host = retrofit(path, LEVELS), load_plainly(path)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert torch.equal(model(tokens()), host(tokens()).logits)
    assert {p.dtype for p in retrofit(path, LEVELS, torch.float64).parameters()} == {torch.float64}


def test_a_checkpoint_of_the_model_without_its_head_is_taken(tmp_path: Path) -> None:
    """Published GPT-2 checkpoints name their tensors so, and bring masks along."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    plain: Dict[str, Tensor] = AutoModelForCausalLM.from_config(config("gpt2")).transformer.state_dict()
    config("gpt2").save_pretrained(tmp_path)
    save_file({**plain, "h.0.attn.bias": torch.ones(1, 1, 32, 32)}, tmp_path / "model.safetensors", {"format": "pt"})
    with torch.no_grad():
        assert torch.equal(retrofit(tmp_path, LEVELS)(tokens()), load_plainly(tmp_path)(tokens()).logits)


def test_default_levels() -> None:
    levels = retrofit_levels(config("gpt2", num_hidden_layers=12), RetrofitConfig())
    assert {name: (level.period, level.blocks, level.owner, level.width) for name, level in levels.items()} == {
        "period512": (512, "9", "learner", 128),
        "period2048": (2048, "10", "learner", 128),
        "period8192": (8192, "11", "learner", 128),
        "anchor": (64 * 8192, "all", "pool", 128),
    }


@pytest.mark.parametrize(
    ("blocks", "parts", "groups"),
    [(3, 3, [(0,), (1,), (2,)]), (8, 3, [(0, 1), (2, 3, 4), (5, 6, 7)]), (5, 1, [(0, 1, 2, 3, 4)])],
)
def test_depth_partition(blocks: int, parts: int, groups: List[tuple[int, ...]]) -> None:
    assert depth_partition(range(blocks), parts) == groups


@pytest.mark.parametrize("periods", [(512, 1000), (512, 512), (2048, 512), (), (0, 4), (-4,)])
def test_periods_must_ascend_as_multiples(periods: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"levels="):
        RetrofitConfig(periods)


def test_the_message_on_periods_names_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"levels=512,1000.*1000 is not a larger multiple of 512.*for instance 1024"):
        RetrofitConfig((512, 1000))
    with pytest.raises(ValueError, match=r"anchor 100.*100 is not a larger multiple of 64"):
        RetrofitConfig((64,), anchor_period=100)
    with pytest.raises(ValueError, match=r"levels='512,2k' must be whole numbers"):
        parse_periods("512,2k")
    assert parse_periods("512,2048") == (512, 2048)


def test_too_few_adaptive_blocks_are_refused() -> None:
    message = rf"adaptive=last_quarter means 2 of {BLOCKS} blocks, too few for 3 levels; name at most 2 periods"
    with pytest.raises(ValueError, match=message):
        retrofit_levels(config("llama"), RetrofitConfig())


def test_no_block_has_two_levels(checkpoints: Dict[str, Path]) -> None:
    levels = {
        "a": LevelConfig(8, blocks="6,7"),
        "b": LevelConfig(16, blocks="7"),
        "rest": LevelConfig(32, blocks="all", owner="pool"),
    }
    with pytest.raises(ValueError, match=r"levels\.b: block 7 belongs to levels\.a already"):
        RetrofitLM(load_plainly(checkpoints["llama"]), levels)
