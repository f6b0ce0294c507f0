"""Public faces of packages whose modules load torch: names are imported when somebody asks for them.

The command line reads configurations, which need value objects of `nl_model` and nothing else; seconds of torch would
come before every typing error that it finds.
"""

from __future__ import annotations

import importlib
from typing import Any, Callable, Mapping


def face(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """A module `__getattr__` (PEP 562) for a package.

    Args:
        package: its name.
        homes: module below the package by the public name that it defines.
    """

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{homes[name]}"), name)

    return find
