"""NestedLM as a transformers model: the Auto classes load it, it generates, and its tokenizer gives our ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Callable, Dict

import pytest
import torch
from tokenizers import Tokenizer as Library
from transformers import AutoModelForCausalLM, AutoTokenizer

from nl_model.config import LevelConfig, ModelConfig
from nl_model.hf import CircadianForCausalLM, load_model, save_nested
from nl_model.hf.tokenizer import save_tokenizer
from nl_model.model import NestedLM
from nl_model.weights import fingerprint, save_tensors
from pipelines.data.tokens import BPETokenizer, ByteTokenizer, Tokenizer
from tests.unit.nl_model.hf_checkpoints import python, stored, tokens

SHAPE = ModelConfig(dim=16, blocks=2, heads=2, context=24)
TEXTS = ["", "north and south", "Größe  of\ta line\n\n語 🌙", "<|endoftext|> is text", "a\x00\x7f\x80ÿ\u200b", " lead"]
TRAINED = BPETokenizer.train(["the cat sat on the mat, größer als 12 Katzen\n" * 20], 300)


@pytest.fixture(scope="module")
def model(make_levels: Callable[..., Dict[str, LevelConfig]], make_model: Callable[..., NestedLM]) -> NestedLM:
    levels = make_levels()
    unsorted = {name: levels[name] for name in ("slow", "fast", "medium")}
    return make_model(unsorted, 257, shape=SHAPE).eval()


@pytest.fixture(scope="module")
def exported(model: NestedLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "out"
    save_nested(model, out, ByteTokenizer().state(), 256, shard="8KB")
    return out


READ = """
import sys, torch
import nl_model.hf
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
folder, text = sys.argv[1:]
expected = load_file(folder + ".logits")
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
with torch.no_grad():
    print(torch.equal(model(expected["tokens"]).logits, expected["logits"]))
inputs = tokenizer(text, return_tensors="pt")
print(tokenizer.decode(inputs.input_ids[0]) == text)
print(model.generate(**inputs, max_new_tokens=9, do_sample=False).shape[1])
"""


def test_the_auto_classes_load_it_in_a_process_of_its_own(model: NestedLM, exported: Path) -> None:
    batch = tokens(vocab=257)
    with torch.no_grad():
        save_tensors(exported.with_name("out.logits"), {"tokens": batch, "logits": model(batch)})
    text = "größer 🌙"
    found = python(READ, str(exported), text, cwd=exported.parent, ours=True).split()
    assert found[:2] == ["True", "True"]
    assert len(text.encode()) < int(found[2]) <= len(text.encode()) + 9


def test_what_comes_back_is_the_model(model: NestedLM, exported: Path) -> None:
    again = load_model(exported)
    assert isinstance(again, NestedLM)
    assert again.cfg == model.cfg and again.vocab_size == model.vocab_size
    assert list(again.level_configs.items()) == list(model.level_configs.items()), "in their order, too"
    assert fingerprint(dict(again.named_parameters())) == fingerprint(dict(model.named_parameters()))
    assert {n.removeprefix("lm."): p.shape for n, p in stored(exported).items()} == {
        n: p.shape for n, p in model.named_parameters()
    }
    with torch.no_grad():
        assert torch.equal(again(tokens(vocab=257)), model(tokens(vocab=257)))


def test_other_dtypes_reach_the_rotary_tables(model: NestedLM, exported: Path) -> None:
    batch = tokens(vocab=257)
    with torch.no_grad():
        double = load_model(exported, torch.float64)
        assert double(batch).dtype == torch.float64
        assert (double(batch) - model(batch)).abs().max() < 1e-4
        assert load_model(exported, torch.bfloat16)(batch).dtype == torch.bfloat16


def test_generation_is_the_arg_max_over_the_last_context(model: NestedLM, exported: Path) -> None:
    wrapper = AutoModelForCausalLM.from_pretrained(exported)
    wrapper.generation_config.eos_token_id = None
    prompt = tokens(2, 20, 257)
    found, expected = wrapper.generate(prompt, max_new_tokens=10, do_sample=False), prompt
    with torch.no_grad():
        for _ in range(10):  # past the context of 24
            expected = torch.cat((expected, model(expected[:, -SHAPE.context :])[:, -1:].argmax(-1)), 1)
    assert torch.equal(found, expected)
    assert len(set(expected[0, 20:].tolist())) > 1, "the model is not stuck at one token"
    cached = wrapper.generate(prompt, max_new_tokens=10, do_sample=False, use_cache=True)
    assert torch.equal(cached, expected), "asking for a cache changes nothing"


def test_padding_on_either_side_is_harmless(model: NestedLM) -> None:
    wrapper, batch, T = CircadianForCausalLM.around(model), tokens(3, 12, 257), 12
    pad = (0, 3, 7)
    with torch.no_grad():
        alone = [model(row[None, p:]) for row, p in zip(batch, pad, strict=True)]
        left = torch.stack([torch.arange(T) >= p for p in pad]).long()
        garbage = torch.where(left.bool(), batch, 256)
        logits = wrapper(garbage, left).logits
        for row, p in enumerate(pad):
            assert torch.allclose(logits[row, p:], alone[row][0], rtol=0, atol=1e-5)
        right = torch.stack([torch.cat((row[p:], torch.full((p,), 256))) for row, p in zip(batch, pad, strict=True)])
        logits = wrapper(right, left.flip(1)).logits
        for row, p in enumerate(pad):
            assert torch.allclose(logits[row, : T - p], alone[row][0], rtol=0, atol=1e-5)


def test_loss_and_length(model: NestedLM) -> None:
    wrapper, batch = CircadianForCausalLM.around(model), tokens(vocab=257)
    with torch.no_grad():
        assert torch.allclose(wrapper(batch, labels=batch).loss, model.nll(batch).mean(), rtol=1e-6)
        half = batch.clone()
        half[:, :9] = -100
        assert torch.allclose(wrapper(batch, labels=half).loss, model.nll(batch)[:, 8:].mean(), rtol=1e-6)
    with pytest.raises(ValueError, match="input has 25 tokens, this model takes 24"):
        wrapper(tokens(1, 25, 257))
    assert next(wrapper.parameters()) is next(model.parameters()), "exporting makes no second copy"


@pytest.mark.parametrize("ours", [ByteTokenizer(), TRAINED], ids=["byte", "bpe"])
def test_tokenizers_give_the_same_ids(ours: Tokenizer, tmp_path: Path) -> None:
    save_tokenizer(tmp_path, ours.state(), ours.eos, 24)
    theirs = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert theirs.eos_token_id == ours.eos and len(theirs) == ours.vocab_size and theirs.model_max_length == 24
    for text in [*TEXTS, "".join(map(chr, range(1, 0x250)))]:
        ids = theirs(text).input_ids
        assert ids == ours.encode(text).tolist(), text
        assert theirs.decode(ids) == text
        assert theirs.decode([*ids, ours.eos], skip_special_tokens=True) == text


def test_a_tokenizer_that_adds_tokens_is_tamed(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    library = Library.from_str(TRAINED.state()["json"])
    eos = "<|endoftext|>"
    library.post_processor = TemplateProcessing(single=f"{eos} $A", special_tokens=[(eos, TRAINED.eos)])
    ours = BPETokenizer(library)
    save_tokenizer(tmp_path, ours.state(), ours.eos, 24)
    assert AutoTokenizer.from_pretrained(tmp_path)("the cat").input_ids == ours.encode("the cat").tolist()


def test_what_a_tokenizer_may_not_be(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="kind='words'; use byte or bpe"):
        save_tokenizer(tmp_path, {"kind": "words"}, 0, 24)
    with pytest.raises(ValueError, match="no token 999"):
        save_tokenizer(tmp_path, {"kind": "byte"}, 999, 24)


def test_a_config_without_its_levels_is_refused(exported: Path, tmp_path: Path) -> None:
    plain = json.loads((exported / "config.json").read_text())
    for path in exported.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({**plain, "levels": None}))
    with pytest.raises(ValueError, match="lacks shape or levels"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**plain, "shape": {**plain["shape"], "dim": 20}}))
    with pytest.raises(ValueError, match=r"has shape .* config\.json wants"):
        load_model(tmp_path)
