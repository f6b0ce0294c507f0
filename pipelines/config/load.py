"""YAML and key=value overrides into a checked `Config`, and back into YAML."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import typing
from dataclasses import asdict, fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Sequence, Tuple

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nl_model.config import LevelConfig
from pipelines.config.keys import split_key
from pipelines.config.schema import Config
from pipelines.config.usual_names import usual
from pipelines.config.values import COMMAND_LINE, read_overrides, read_tree
from pipelines.config.yaml_reader import compose, read_text

SHIPPED = "pipelines.config.shipped"
PRESETS = "pipelines.config.sizes"
STRATEGIES = "pipelines.config.strategies"
# Keys that say where and how fast a run computes, not what it computes: they may differ when a run is continued.
FREE_ON_RESUME = (
    *("run.root", "ray", "failures", "tracking", "control"),
    *("pool.timeout", "pool.start_timeout", "pool.release_after_round", "pool.backend", "pool.checkpoint_every"),
    # A pool of another size computes the same but for rounding: rounds, and what they left, know nothing of ranks.
    *("pool.ranks", "pool.zero_stage", "pool.micro_batch", "pool.activation_checkpointing"),
)


def shipped_configs() -> List[str]:
    """Names of the configurations that come with the package, without .yaml."""
    return _names(SHIPPED)


def presets() -> List[str]:
    """Names of the shipped presets: sizes of a model and its stream, to be laid over any configuration."""
    return _names(PRESETS)


def strategies() -> List[str]:
    """Names of the shipped strategies: what a run does (`strategy=NAME`), valid for runs and comparisons alike."""
    return _names(STRATEGIES)


def shipped_files() -> Iterator[Tuple[str, Dict[str, Any]]]:
    """(what it is, its keys) of every shipped file: configurations, presets, strategies."""
    for package, what in ((SHIPPED, "configuration {}"), (PRESETS, "--preset {}"), (STRATEGIES, "strategy={}")):
        for name in _names(package):
            yield what.format(name), _named(package, name)


def _names(package: str) -> List[str]:
    return sorted(Path(p.name).stem for p in resources.files(package).iterdir() if p.name.endswith(".yaml"))


def read_yaml(name: str) -> Dict[str, Any]:
    """A file, or the shipped configuration of that name, as a tree; values have the types of their keys."""
    if Path(name).is_file():
        return _read(read_text(Path(name)), name)
    if name not in shipped_configs():
        raise ValueError(f"no configuration file {name!r}; give a path, or one of {', '.join(shipped_configs())}")
    return _named(SHIPPED, name)


def _read_preset(name: str) -> Dict[str, Any]:
    if name not in presets():
        raise ValueError(f"--preset {name!r} is unknown; use one of {', '.join(presets())}, or none")
    return _named(PRESETS, name)


def _named(package: str, name: str) -> Dict[str, Any]:
    return _read((resources.files(package) / f"{name}.yaml").read_text(encoding="utf-8"), name)


def _read(text: str, name: str) -> Dict[str, Any]:
    tree = read_tree(compose(text, name), Config, "", name)
    assert isinstance(tree, dict)
    return tree


def load_config(name: str = "default", overrides: Sequence[str] = (), preset: str = "") -> Config:
    """What is shipped, then the strategy, then what a user gives; everything checked.

    In order, later ones win: defaults, the file, a preset of sizes, the strategy, the overrides. A strategy changes no
    key that a user's own file names. A file that names levels has these and no others; one that is called as a default
    level is that level with what the file changes. ValueError names the key and the remedy.
    """
    tree = read_yaml(name)
    _check_keys(tree, Config, "", name)
    given = read_overrides(overrides)
    _check_keys(given, Config, "", COMMAND_LINE)
    try:
        base = OmegaConf.structured(Config)
        _make_writable(base)
        strategy = _strategy_of(name, tree, given.get("strategy"))
        sizes = _read_preset(preset) if preset else {}
        overlay = _without(_named(STRATEGIES, strategy), tree if Path(name).is_file() else {})
        # Whoever names levels names all of them, else those of two would be mixed; but a level that has the name of a
        # shipped one starts from its settings, so that a file says what it changes and loses nothing unsaid.
        named = sizes.get("levels") or tree.get("levels")
        layers = [_without(layer, {"levels": None}) for layer in (tree, sizes, overlay)]
        if named is not None:
            shipped = Config().levels
            base.levels = {level: shipped.get(level, LevelConfig()) for level in named}
            _make_writable(base.levels)
            layers.append({"levels": named})
        _check_levels_named(given.get("levels") or {}, [*base.levels, *(named or {})])
        config = _build(OmegaConf.merge(base, *layers, given, {"strategy": strategy}))
    except OmegaConfBaseException as error:
        raise ValueError(_plain(error)) from None
    for other in config.control.strategies if config.trains_controls else ():
        try:
            _strategy_of("the configuration", {}, other)
        except ValueError as error:
            raise ValueError(f"control.strategies: {error}") from None
    return config


def with_strategy(config: Config, name: str, changes: Mapping[str, Any]) -> Config:
    """A resolved configuration under another strategy, with some keys changed on top; checked like any other.

    What its present strategy has set goes back to defaults first; else the new one would be a mixture of both.

    Args:
        changes: values by dotted key, for instance {"sleep.epochs": 2.0}.

    Raises:
        ValueError: the strategy or a key is unknown, or what comes out is no configuration.
    """
    strategy = _strategy_of("the configuration", {}, name)
    tree, defaults = _resolved(asdict(config)), asdict(Config())
    plain, old = flatten(tree), flatten(_named(STRATEGIES, config.strategy))
    unset = {key: flatten(defaults)[key] for key, value in old.items() if plain[key] == value}
    levels = tree.pop("levels")
    try:
        base = OmegaConf.structured(Config)
        _make_writable(base)
        base.levels = {}
        layers = [tree, _nested(unset), _named(STRATEGIES, strategy), {"levels": levels}, _nested(changes)]
        for layer in layers:
            _check_keys(layer, Config, "", f"strategy {name}")
        return _build(OmegaConf.merge(base, *layers, {"strategy": strategy}))
    except OmegaConfBaseException as error:
        raise ValueError(_plain(error)) from None


def _build(merged: Any) -> Config:
    """The value objects; what the model's say of their own keys is given the full name, which they do not know."""
    parts = [(f"levels.{name}.", merged.levels[name]) for name in merged.levels]
    for prefix, node in [*parts, ("sleep.", merged.sleep.optimizer), ("model.", merged.model.memory)]:
        try:
            OmegaConf.to_object(node)
        except OmegaConfBaseException:
            raise
        except ValueError as error:
            raise ValueError(f"{prefix}{error}") from None
    config = OmegaConf.to_object(merged)
    assert isinstance(config, Config)
    return config


def _nested(flat: Mapping[str, Any]) -> Dict[str, Any]:
    """What `flatten` makes flat, nested again."""
    tree: Dict[str, Any] = {}
    for key, value in flat.items():
        *sections, last = key.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return tree


def _without(tree: Mapping[str, Any], named: Mapping[str, Any]) -> Dict[str, Any]:
    """A tree without the keys that another one names."""
    found: Dict[str, Any] = {}
    for key, value in tree.items():
        other = named.get(key)
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            found[key] = _without(value, other)
        elif key not in named:
            found[key] = value
    return found


def _strategy_of(name: str, tree: Mapping[str, Any], asked: Any) -> str:
    """The strategy that the command line asks for, else the file, else the default. ValueError where the two differ."""
    in_file = tree.get("strategy")
    if asked is not None and in_file is not None and asked != in_file:
        raise ValueError(
            f"strategy={asked} on the command line, but {name} says strategy: {in_file}, and its keys lie over those "
            "of a strategy; take the key out of the file, and what belongs to that strategy with it"
        )
    found = str(asked if asked is not None else in_file if in_file is not None else Config.strategy)
    if found not in strategies():
        near = difflib.get_close_matches(found, strategies(), n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"strategy={found!r} is unknown; {hint}use one of {', '.join(strategies())}")
    return found


def _plain(error: OmegaConfBaseException) -> str:
    key = getattr(error, "full_key", None)
    message = str(error).splitlines()[0]
    return f"{key}: {message}" if key else message


def _make_writable(node: Any) -> None:
    """OmegaConf makes frozen dataclasses read-only; overrides have to reach them before they are built."""
    OmegaConf.set_readonly(node, False)
    if OmegaConf.is_dict(node):
        for key in node:
            if OmegaConf.is_config(node[key]):
                _make_writable(node[key])


def _check_keys(tree: Any, kind: Any, prefix: str, where: str) -> None:
    """Raise ValueError for the first key that the dataclass `kind` does not have, with the nearest one that it has."""
    if not isinstance(tree, Mapping):
        if is_dataclass(kind) or typing.get_origin(kind) is dict:
            raise ValueError(f"{where}: {prefix.rstrip('.')}={tree!r} must be a section with keys of its own")
        return
    if typing.get_origin(kind) is dict:
        for key, value in tree.items():
            _check_keys(value, typing.get_args(kind)[1], f"{prefix}{key}.", where)
        return
    if not is_dataclass(kind):
        raise ValueError(f"{where}: {prefix.rstrip('.')} is a single value, it has no keys of its own")
    hints = typing.get_type_hints(kind)
    known = [f.name for f in fields(kind)]
    for key, value in tree.items():
        if key not in known:
            hint = usual(str(key)) or _nearest(str(key), known, prefix)
            raise ValueError(f"{where}: unknown key {_joined(prefix, str(key))!r}; {hint}")
        _check_keys(value, hints[key], f"{prefix}{key}.", where)


def _nearest(key: str, known: Sequence[str], prefix: str) -> str:
    near = difflib.get_close_matches(key, known, n=1) or _elsewhere(key)
    return f"did you mean {_joined(prefix, near[0])!r}?" if near else f"known here: {', '.join(known)}"


def check_key(name: str, where: str) -> None:
    """ValueError, with the nearest key or what stands for a usual name, unless there is a key of this name."""
    tree: Any = ""
    for part in reversed(split_key(name)):
        tree = {part: tree}
    _check_keys(tree, Config, "", where)


def _check_levels_named(given: Mapping[str, Any], known: Sequence[str]) -> None:
    """A level on the command line that is not in the file is a new one, unless it looks like a slip of the pen."""
    for name in given:
        near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.75) if name not in known else []
        if near:
            raise ValueError(f"the command line: unknown level 'levels.{name}'; did you mean 'levels.{near[0]}'?")


def _joined(prefix: str, key: str) -> str:
    return key if "." in key else f"{prefix}{key}"


def _elsewhere(key: str) -> List[str]:
    """Full names of keys of any section that look like `key`."""
    names: Dict[str, str] = {}
    for section, kind in typing.get_type_hints(Config).items():
        if is_dataclass(kind):
            names.update({f.name: f"{section}.{f.name}" for f in fields(kind)})
    return [names[near] for near in difflib.get_close_matches(key, names, n=1)]


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML, which `load_config` reads back to an equal one."""
    return yaml.safe_dump(_resolved(asdict(config)), sort_keys=False)


def _resolved(value: Any) -> Any:
    """A tree whose text is no interpolation any more, though it may look like one: it is not worked out again."""
    if isinstance(value, Mapping):
        return {key: _resolved(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_resolved(inner) for inner in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Dict[str, Any]:
    """Nested mappings to one mapping with dotted keys."""
    flat: Dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def differences(old: Config, new: Config) -> List[Tuple[str, Any, Any]]:
    """Keys (key, old, new) that differ and decide what a run computes."""
    a, b = flatten(asdict(old)), flatten(asdict(new))
    keys = [k for k in sorted(set(a) | set(b)) if a.get(k) != b.get(k)]
    return [(k, a.get(k), b.get(k)) for k in keys if not any(k == f or k.startswith(f + ".") for f in FREE_ON_RESUME)]


def config_hash(*parts: Any) -> str:
    """Short stable hash of JSON-able parts or dataclasses."""
    plain = [asdict(p) if is_dataclass(p) and not isinstance(p, type) else p for p in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()[:16]
