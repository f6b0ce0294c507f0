"""Interpolation: a file may refer to its own keys and to nothing else; who types an override may do more."""

from __future__ import annotations

from typing import Callable, List

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipelines.config.load import load_config
from pipelines.config.schema import Config
from pipelines.config.values import read_tree
from pipelines.config.yaml_reader import compose

SECRET = "what nobody should see"


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Something in the environment that no file may read."""
    monkeypatch.setenv("CIRCADIAN_SECRET", SECRET)


@pytest.mark.parametrize(
    "text",
    [
        "${oc.env:CIRCADIAN_SECRET}",
        "a-${oc.env:CIRCADIAN_SECRET}-b",
        "${ oc.env : CIRCADIAN_SECRET }",
        "${oc.decode:'1'}",
        "${oc.create:${run}}",
        "${oc.env:${stream.text_field}}",
        "${${oc.env:CIRCADIAN_SECRET}}",
        "${run.${oc.env:CIRCADIAN_SECRET}}",
        "${run.seed}${oc.env:CIRCADIAN_SECRET}",
        "\\\\${oc.env:CIRCADIAN_SECRET}",
        "$${oc.env:CIRCADIAN_SECRET}",
        "${oc.env:NOT_THERE,fallback}",
        "${nobody.knows:1}",
        "${",
        "${}",
        "${run.name",
    ],
)
@pytest.mark.parametrize("key", ["run: {name: ", "stream: {path: ", "stream: {sources: [", "wake: {batch: "])
def test_a_file_works_out_nothing_but_its_own_keys(write: Callable[[str], str], text: str, key: str) -> None:
    close = "]}" if key.endswith("[") else "}"
    quoted = text.replace("'", "''")
    with pytest.raises(ValueError, match=r"given\.yaml, line 1: .* on the command line") as error:
        load_config(write(f"{key}'{quoted}'{close}"))
    assert SECRET not in str(error.value) and "\n" not in str(error.value)


def test_a_file_refers_to_its_own_keys(write: Callable[[str], str]) -> None:
    config = load_config(
        write(
            "run: {name: 'seed-${run.seed}', seed: 7}\nsleep: {batch: 16}\nbase: {batch: '${sleep.batch}'}\n"
            "wake: {batch: '${.checkpoint_every}', checkpoint_every: 16}\ntracking: {experiment: 'a\\${b}'}\n"
        ),
        ["run.seed=8"],
    )
    assert (config.run.name, config.base.batch, config.wake.batch) == ("seed-8", 16, 16)
    assert config.tracking.experiment == "a${b}"


def test_who_types_an_override_may_use_the_environment(write: Callable[[str], str]) -> None:
    config = load_config(write("stream: {text_field: '${run.name}'}"), ["run.name=${oc.env:CIRCADIAN_SECRET}"])
    assert config.run.name == config.stream.text_field == SECRET


@settings(max_examples=500, deadline=None)
@given(
    st.lists(
        st.sampled_from(["\\", "$", "{", "}", "${", "${boom:1}", "${run.seed}", "a", ".", " ", "'", '"', "[", "]"])
    )
)
def test_no_text_that_is_let_through_calls_a_resolver(parts: List[str]) -> None:
    quoted = "".join(parts).replace("'", "''")
    try:
        tree = read_tree(compose(f"run: {{name: '{quoted}'}}", "given.yaml"), Config, "", "given.yaml")
    except ValueError:
        return
    called: List[str] = []
    OmegaConf.register_resolver("boom", called.append, replace=True)
    try:
        OmegaConf.to_container(OmegaConf.create({"run": {"seed": 1, **tree["run"]}}), resolve=True)
    except (OmegaConfBaseException, RecursionError):
        return
    finally:
        OmegaConf.clear_resolver("boom")
        assert not called
