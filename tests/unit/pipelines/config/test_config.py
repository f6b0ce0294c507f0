"""The configuration: defaults that hold, YAML there and back, and errors that name the key."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, List

import pytest

from nl_model.config import LevelConfig, OptimizerConfig
from pipelines.config.load import (
    config_hash,
    differences,
    load_config,
    presets,
    shipped_configs,
    to_yaml,
    with_strategy,
)
from pipelines.config.schema import Config, ControlConfig, PoolConfig, RunSection, SleepConfig, WakeConfig

LEVELS = """
levels:
  quick: {period: 4096, width: 8}
  calm: {period: 16384, width: 8, blocks: "0,1", owner: pool}
"""


def test_the_shipped_default_is_the_defaults_but_for_what_makes_it_repeatable_and_measured() -> None:
    plain = Config()
    shipped = load_config("default")
    assert shipped.run == RunSection(name="default", deterministic=True, lag=0.5) and shipped.report.look_every > 0
    muon = replace(plain.sleep.optimizer, name="muon", lr=2e-2)
    assert shipped.sleep == replace(plain.sleep, epochs=2.0, average=25, optimizer=muon)
    periods = {name: level.period for name, level in shipped.levels.items()}
    assert periods == {"fast": 2048, "medium": 4096, "slow": 8192} and list(periods) == list(plain.levels)
    assert shipped.levels == {name: replace(plain.levels[name], period=period) for name, period in periods.items()}
    sections = ("run", "sleep", "report", "levels", "gate", "control")
    assert replace(shipped, **{name: getattr(plain, name) for name in sections}) == plain


def test_every_shipped_configuration_is_valid() -> None:
    assert {"default", "smoke"} <= set(shipped_configs())
    for name in shipped_configs():
        assert load_config(name).run.name == name


@pytest.mark.parametrize(
    ("name", "overrides", "limit"),
    [
        ("default", [], 65_536),
        ("default", ["stream.path=/texts"], 0),
        ("default", ["stream.path=/texts", "stream.max_source_bytes=-1"], 0),
        ("default", ["stream.path=/texts", "stream.max_source_bytes=196608"], 196_608),
        ("default", ["stream.max_source_bytes=0"], 0),
        ("smoke", [], 12_288),
        ("smoke", ["stream.path=/texts"], 12_288),
    ],
)
def test_text_of_ones_own_is_read_whole_where_no_limit_is_given(
    write: Callable[[str], str], name: str, overrides: List[str], limit: int
) -> None:
    config = load_config(name, overrides)
    assert config.stream.max_source_bytes == config.stream.limit == limit, "what is printed and stored is decided"
    assert load_config(write(to_yaml(config))) == config
    assert with_strategy(config, "replay", {}).stream == config.stream
    assert not differences(config, load_config(name, [*overrides, f"stream.max_source_bytes={limit}"]))


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["run.name=x", "base.sources=[a,b]", "stream.path=/some/where", "sleep.optimizer.lr=0.5"],
        ["levels.fast.blocks=2,3", "control.learning_rates=[0.1]", "tracking.uri=null", "ray.pool_resource=slow"],
    ],
    ids=["defaults", "many kinds", "levels"],
)
@pytest.mark.parametrize("name", ["default", "smoke"])
def test_yaml_there_and_back(write: Callable[[str], str], name: str, overrides: List[str]) -> None:
    config = load_config(name, overrides)
    again = load_config(write(to_yaml(config)))
    assert again == config
    assert to_yaml(again) == to_yaml(config)


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(write: Callable[[str], str]) -> None:
    config = load_config(write("sleep: {recent: 0.25, half_life: 7}\n"), ["sleep.half_life=9"])
    assert (config.sleep.recent, config.sleep.half_life) == (0.25, 9)
    assert config.sleep.sampler == SleepConfig().sampler


def test_levels_of_a_file_replace_the_default_ones(write: Callable[[str], str]) -> None:
    config = load_config(write(LEVELS), ["levels.quick.width=9"])
    assert list(config.levels) == ["quick", "calm"]
    assert config.levels["quick"] == LevelConfig(period=4096, width=9)
    assert list(load_config("default", ["levels.fast.width=9"]).levels) == ["fast", "medium", "slow"]


@pytest.mark.parametrize(
    ("given", "changed"),
    [
        ("", {}),
        ("width: 7", {"width": 7}),
        ("blocks: all", {"blocks": "all"}),
        ("optimizer: {eps: 0.5}", {"optimizer": OptimizerConfig(eps=0.5)}),
    ],
)
@pytest.mark.parametrize("name", list(Config().levels))
def test_a_level_of_a_file_keeps_what_it_does_not_change(
    write: Callable[[str], str], name: str, given: str, changed: Dict[str, Any]
) -> None:
    shipped = Config().levels
    others = ", ".join(f"{other}: {{}}" for other in shipped if other != name)
    config = load_config(write(f"levels: {{{others}, {name}: {{{given}}}}}"))
    assert config.levels == {**shipped, name: replace(shipped[name], **changed)}
    assert list(config.levels)[-1] == name, "in the order of the file"


def test_the_levels_of_a_file_are_all_there_are_and_presets_start_from_defaults_too(
    write: Callable[[str], str],
) -> None:
    file = write("levels: {fast: {period: 4096}, slow: {period: 32768, optimizer: {eps: 0.5}}, odd: {period: 8192}}")
    config, shipped = load_config(file, ["levels.odd.width=9"]), Config().levels
    assert list(config.levels) == ["fast", "slow", "odd"]
    assert config.levels["fast"] == replace(shipped["fast"], period=4096)
    assert config.levels["slow"] == replace(shipped["slow"], optimizer=OptimizerConfig(eps=0.5))
    assert config.levels["odd"] == LevelConfig(period=8192, width=9)
    micro = load_config(file, [], "micro")
    assert micro.levels == load_config("default", [], "micro").levels, "a preset's levels replace those of a file"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("wake.batchh=3", r"unknown key 'wake\.batchh'; did you mean 'wake\.batch'\?"),
        ("wak.batch=3", r"unknown key 'wak'; did you mean 'wake'\?"),
        ("half_lif=3", r"unknown key 'half_lif'; did you mean 'sleep\.half_life'\?"),
        ("levels.fast.perid=3", r"unknown key 'levels\.fast\.perid'; did you mean 'levels\.fast\.period'\?"),
        ("sleep.optimizer.lrr=3", r"unknown key 'sleep\.optimizer\.lrr'; did you mean 'sleep\.optimizer\.lr'\?"),
        ("gate.zzz=1", r"unknown key 'gate\.zzz'; known here: sequences, max_forgetting, budgets, max_drift"),
    ],
)
def test_unknown_keys_get_a_suggestion(write: Callable[[str], str], override: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"the command line: {message}"):
        load_config("default", [override])
    path, value = override.split("=")
    for key in reversed(path.split(".")):
        value = f"{{{key}: {value}}}"
    with pytest.raises(ValueError, match=f"given.yaml: {message}"):
        load_config(write(value))


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("wake.batch=abc", r"wake\.batch: .*'abc'"),
        ("wake.batch=1.5", r"wake\.batch: .*'1\.5'"),
        ("wake.batch=", r"wake\.batch: "),
        ("run.deterministic=maybe", r"run\.deterministic: .*'maybe'"),
        ("levels.fast.optimizer.lr=quick", r"levels\.fast\.optimizer\.lr: .*'quick'"),
        ("control.learning_rates=[0.1,x]", r"control\.learning_rates\[1\]: .*'x'"),
        ("stream.sources=docs", r"stream\.sources: "),
        ("wake=3", "wake=3 must be a section"),
        ("levels.fast=3", r"levels\.fast=3 must be a section"),
        ("wake.batch.size=3", r"wake\.batch is a single value"),
        ("levels=3", "levels"),
        ("levels=[fast]", "levels"),
    ],
)
def test_wrong_types_are_named(override: str, key: str) -> None:
    with pytest.raises(ValueError, match=key):
        load_config("default", [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "must hold a mapping of sections, not a list"),
        ("run: [", "is not valid YAML"),
        ("wake:", "wake=None must be a section"),
        ("levels: {fast: 3}", r"levels\.fast=3 must be a section"),
        ("levels: [fast]", "levels"),
        ("levels: {}", "no level has owner=pool"),
        ("1: 2", "unknown key '1'"),
    ],
)
def test_files_that_are_no_configuration(write: Callable[[str], str], text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(write(text))


@pytest.mark.parametrize(("value", "fitting"), [("1000", "512"), ("3", "2"), (str(1 << 31), str(1 << 30))])
def test_recall_is_a_power_of_two_or_nothing(value: str, fitting: str) -> None:
    assert load_config("default", ["wake.recall=0"]).wake.recall == 0
    with pytest.raises(
        ValueError, match=rf"wake\.recall={value} is no power of two up to 1073741824; use {fitting}, or 0"
    ):
        load_config("default", [f"wake.recall={value}"])


@pytest.mark.parametrize("override", ["run.name", "=3", "--help"])
def test_overrides_have_the_form_key_value(override: str) -> None:
    with pytest.raises(ValueError, match=f"override '{override}' is not of the form key=value"):
        load_config("default", [override])


def test_a_missing_file_is_named_with_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"no configuration file 'nosuch'.*default, smoke"):
        load_config("nosuch")


TWO_LEVELS = ["wake.batch=2", "model.context=128"]


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        (
            "{fast: {period: 512}, slow: {period: 1280, owner: pool}}",
            r"levels\.slow\.period=1280 is not a multiple of levels\.fast\.period=512; use 1024 or another",
        ),
        (
            "{fast: {period: 384}, slow: {period: 768, owner: pool}}",
            r"levels\.fast\.period=384 is not a multiple of one wake step .*= 256 tokens",
        ),
        (
            "{slow: {period: 256, owner: pool}, late: {period: 512}}",
            r"levels\.late \(period 512\) is written by the learner but is slower than levels\.slow",
        ),
        ("{fast: {period: 256}, medium: {period: 512}}", "no level has owner=pool"),
        ("{slow: {period: 512, owner: pool}}", "no level has owner=learner"),
        (
            "{fast: {period: 256, blocks: '7'}, slow: {period: 512, owner: pool}}",
            r"levels\.fast: blocks='7' names a block outside 0\.\.3",
        ),
        (
            "{fast: {period: 256}, slow: {period: 512, owner: pool, blocks: middle}}",
            r"levels\.slow: blocks='middle' is neither",
        ),
        ("{fast: {period: 256, owner: me}, slow: {period: 512, owner: pool}}", "owner='me' is unknown"),
    ],
)
def test_levels_that_form_no_hierarchy(write: Callable[[str], str], levels: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(write(f"levels: {levels}"), TWO_LEVELS)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sleep.batch=9", "pool.ranks=2"], r"sleep\.batch=9 must be a multiple of pool\.ranks=2"),
        (["pool.ranks=0"], r"pool\.ranks=0 must be at least 1"),
        (["pool.micro_batch=3"], r"sleep\.batch / pool\.ranks=4 must be a multiple of pool\.micro_batch=3"),
        (
            ["pool.micro_batch=4", "base.batch=12"],
            r"base\.batch / pool\.ranks=6 must be a multiple of pool\.micro_batch=4",
        ),
        (["base.batch=9", "pool.ranks=2"], r"base\.batch=9 must be a multiple of pool\.ranks=2"),
        (["pool.checkpoint_every=-1"], r"pool\.checkpoint_every=-1 must be at least 0"),
        (["pool.bf16_weights=true"], r"pool\.bf16_weights=true .* compute\.precision=bf16"),
        (["pool.bf16_weights=true", "pool.zero_stage=0"], r"pool\.bf16_weights=true .* pool\.zero_stage=1 to 3"),
        (["pool.zero_stage=4"], r"pool\.zero_stage=4"),
        (["base.tokens=0", "base.sources=[a]"], r"base\.tokens=0 leaves base\.sources unused"),
        (["run.name=a/b"], r"run\.name='a/b'"),
        (["run.name=.hidden"], r"run\.name='\.hidden'"),
        (["sleep.recent=1.5"], r"sleep\.recent=1\.5 must lie between 0 and 1"),
        (["sleep.teacher=-0.1"], r"sleep\.teacher=-0\.1"),
        (["sleep.mixing=square"], r"sleep\.mixing='square'.*constant, linear, cosine"),
        (["sleep.divergence=kl"], r"sleep\.divergence='kl'.*forward_kl, reverse_kl, jsd, topk"),
        (["sleep.jsd_beta=1.0"], r"sleep\.jsd_beta=1\.0 must lie between 0 and 1, both excluded"),
        (["sleep.top_k=0"], r"sleep\.top_k=0 must be at least 1"),
        (["sleep.guide=cached"], r"sleep\.guide='cached'.*recompute, stored"),
        (["sleep.on_policy=1.5"], r"sleep\.on_policy=1\.5 must lie between 0 and 1"),
        (["sleep.continuation=0"], r"sleep\.continuation=0 must be at least 1"),
        (["sleep.on_policy=0.5", "sleep.teacher=0", "sleep.anchor=0"], r"sleep\.on_policy needs a guide"),
        (
            ["sleep.teacher=0.1", "sleep.on_policy=0.5", "sleep.continuation=127", "model.context=128"],
            r"continuation=127.*at most 126",
        ),
        (
            ["sleep.teacher=0.1", "sleep.on_policy=0.5", "pool.zero_stage=3", "sleep.optimizer.name=adamw"],
            r"pool\.zero_stage=2 or less",
        ),
        (["sleep.imitation.weight=0.5"], r"sleep\.imitation\.weight.*sleep\.on_policy"),
        (["sleep.imitation.semantic=2"], r"sleep\.imitation\.semantic=2"),
        (["sleep.imitation.cutoff=-1"], r"sleep\.imitation\.cutoff=-1 must be at least 0"),
        (["sleep.sampler=oldest"], r"sleep\.sampler='oldest'.*uniform, recency, surprise"),
        (["sleep.surprise_cap=0.5"], r"sleep\.surprise_cap=0\.5 must be at least 1"),
        (["stream.schedule=random"], r"stream\.schedule='random'"),
        (["tokenizer.kind=words"], r"tokenizer\.kind='words'"),
        (["tokenizer.vocab_size=256"], r"tokenizer\.vocab_size=256 must be at least 257"),
        (["gate.max_forgetting=nan"], r"gate\.max_forgetting=nan"),
        (["compute.device=tpu"], r"compute\.device='tpu'"),
        (["compute.precision=fp8"], r"compute\.precision='fp8'"),
        (["model.heads=7"], r"model\.heads=7"),
        (["sleep.optimizer.name=lion"], r"optimizer\.name='lion'"),
    ],
)
def test_values_out_of_bounds_are_named(overrides: List[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config("default", overrides)


def test_differences_name_what_decides_a_run() -> None:
    old = Config()
    assert differences(old, Config()) == []
    new = replace(
        old,
        sleep=replace(old.sleep, recent=0.25, optimizer=replace(old.sleep.optimizer, lr=0.5)),
        levels={**old.levels, "fast": replace(old.levels["fast"], width=1)},
    )
    assert differences(old, new) == [
        ("levels.fast.width", old.levels["fast"].width, 1),
        ("sleep.optimizer.lr", old.sleep.optimizer.lr, 0.5),
        ("sleep.recent", old.sleep.recent, 0.25),
    ]


def test_differences_see_levels_that_come_and_go() -> None:
    old = Config()
    levels: Dict[str, LevelConfig] = {name: level for name, level in old.levels.items() if name != "medium"}
    keys = {key for key, _, _ in differences(old, replace(old, levels=levels))}
    assert {"levels.medium.period", "levels.medium.width", "levels.medium.optimizer.lr"} <= keys
    assert all(key.startswith("levels.medium.") for key in keys)


def test_differences_ignore_where_and_how_fast_a_run_computes() -> None:
    old = Config()
    new = replace(
        old,
        run=replace(old.run, root="elsewhere"),
        ray=replace(old.ray, address="auto", rank_cpus=2.0),
        failures=replace(old.failures, pool=9),
        tracking=replace(old.tracking, uri="http://somewhere"),
        control=ControlConfig(enabled="false"),
        pool=PoolConfig(ranks=1, zero_stage=3, micro_batch=2, checkpoint_every=8, timeout=1.0, start_timeout=2.0),
    )
    assert differences(old, new) == []
    bf16 = replace(old, pool=PoolConfig(bf16_weights=True), compute=replace(old.compute, precision="bf16"))
    assert [key for key, _, _ in differences(old, bf16)] == ["compute.precision", "pool.bf16_weights"]
    assert [key for key, _, _ in differences(old, replace(old, run=replace(old.run, seed=1)))] == ["run.seed"]


def test_a_hash_depends_on_values_alone() -> None:
    assert config_hash(WakeConfig(), {"a": 1, "b": 2}) == config_hash(WakeConfig(), {"b": 2, "a": 1})
    assert config_hash(OptimizerConfig(lr=0.1)) != config_hash(OptimizerConfig(lr=0.2))
    assert config_hash([1, 2]) != config_hash([2, 1])


@pytest.mark.parametrize("name", presets())
def test_a_preset_decides_sizes_and_nothing_else(name: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("model: {dim: 6, heads: 1}\nstream: {schedule: soft}\nlevels: {a: {period: 64}}\n")
    found = load_config(str(path), ["sleep.batch=4"], name)
    assert found.model.dim > 6 and set(found.levels) == {"fast", "medium", "slow"}
    assert found.stream.schedule == "soft" and found.sleep.batch == 4


def test_an_unknown_preset_is_named() -> None:
    with pytest.raises(ValueError, match="--preset 'tiny' is unknown; use one of base, micro, small"):
        load_config("default", [], "tiny")
