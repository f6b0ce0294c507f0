"""Versions of what computes."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Dict

PACKAGES = ("circadian", "torch", "deepspeed", "ray", "pyarrow", "mlflow", "omegaconf")


def versions() -> Dict[str, str]:
    """Python's version and those of the packages that decide what a run computes."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
