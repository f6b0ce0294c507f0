"""Bounds of single settings, said in the same words everywhere (they lie in nl_model/checks.py)."""

from __future__ import annotations

from nl_model.checks import above, at_least, inside, must, one_of, share, within

__all__ = ["above", "at_least", "inside", "must", "one_of", "share", "within"]
