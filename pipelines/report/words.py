"""Figures as people read them: bits per byte, operations, durations."""

from __future__ import annotations

import math
from typing import Optional

from pipelines.report.events import short_number

NOTHING = "\N{EN DASH}"


def bits(value: Optional[float]) -> str:
    """Bits per byte with three decimals; a dash for what is missing."""
    return NOTHING if _missing(value) else f"{value:.3f}".replace("-", "\N{MINUS SIGN}")


def flop(value: Optional[float]) -> str:
    """Floating-point operations with a suffix: 1.23 PFLOP."""
    if value is None or _missing(value):
        return NOTHING
    text = short_number(value)
    return f"{text[:-1]} {text[-1]}FLOP" if text[-1].isalpha() else f"{text} FLOP"


def duration(seconds: Optional[float]) -> str:
    """Seconds as people say them: 42.0 s, 3 min 5 s, 2 h 14 min."""
    if seconds is None or _missing(seconds):
        return NOTHING
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _missing(value: Optional[float]) -> bool:
    return value is None or not math.isfinite(value)
