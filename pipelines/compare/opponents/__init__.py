"""Opponents: what the literature adds to online training, one hook with a file and a citation each.

They train with the learner's own step (wake.writes=all) and are told of marks, never of source boundaries.
"""

from __future__ import annotations

import difflib
from dataclasses import fields, replace
from typing import Any, Dict, Mapping

from pipelines.compare.opponents.der import Der
from pipelines.compare.opponents.ewc import Ewc
from pipelines.compare.opponents.lora import Lora
from pipelines.compare.opponents.lwf import Lwf
from pipelines.compare.opponents.mer import Mer
from pipelines.wake.hooks import Hook, NoHook

OPPONENTS: Dict[str, type] = {"none": NoHook, "der": Der, "ewc": Ewc, "lora": Lora, "lwf": Lwf, "mer": Mer}
"""Hooks by name."""


def hook_settings(name: str) -> Dict[str, Any]:
    """Settings of a hook and their defaults."""
    made = OPPONENTS[name]()
    return {field.name: getattr(made, field.name) for field in fields(made) if field.init} if name != "none" else {}


def build_hook(name: str, settings: Mapping[str, str]) -> Hook:
    """A hook with some settings changed. ValueError names what is unknown or out of bounds."""
    known, typed = hook_settings(name), {}
    for key, value in settings.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean hook.{near[0]}?" if near else f"{name} has {', '.join(known) or 'no settings'}"
            raise ValueError(f"hook.{key} is unknown; {hint}")
        try:
            typed[key] = type(known[key])(value)
        except ValueError:
            raise ValueError(f"hook.{key}={value!r} must be a number, such as {known[key]}") from None
    hook: Hook = replace(OPPONENTS[name](), **typed) if typed else OPPONENTS[name]()
    return hook
