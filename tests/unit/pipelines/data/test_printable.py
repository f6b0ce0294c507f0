"""Text that comes from data, as a terminal gets to see it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.data.printable import printable, printable_values


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("plain name-1.txt", "plain name-1.txt"),
        ("Größe 語 🌙 [b]", "Größe 語 🌙 [b]"),
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("\x1b]8;;http://x\x07link", r"\x1b]8;;http://x\x07link"),
        ("two\nlines\r\tand more", r"two\nlines\r\tand more"),
        ("abc\u202etxt.exe", r"abc\u202etxt.exe"),
        ("zero\u200bwidth\ufeff", r"zero\u200bwidth\ufeff"),
        ("\x9b31m\x7f", r"\x9b31m\x7f"),
        ("line\u2028end", r"line\u2028end"),
        ("half \udcff", r"half \udcff"),
        ("tag \U000e0041", r"tag \U000e0041"),
    ],
)
def test_only_signs_of_their_own_are_left(name: str, shown: str) -> None:
    assert printable(name) == shown


@given(st.text())
def test_any_text_can_be_shown_and_shown_again(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable() and printable(shown) == shown
    shown.encode("utf-8")


def test_messages_keep_their_lines() -> None:
    assert printable("first\nsecond\x1b", keep="\n") == "first\nsecond\\x1b"


def test_every_text_of_an_event_is_made_printable() -> None:
    event = {
        "t": 1.5,
        "sources": ["\x1b[31m", "plain"],
        "steps": [{"bpb": {"a\nb": 2.0, "c": None}}],
        "n": 3,
        "on": True,
    }
    assert printable_values(event) == {
        "t": 1.5,
        "sources": [r"\x1b[31m", "plain"],
        "steps": [{"bpb": {r"a\nb": 2.0, "c": None}}],
        "n": 3,
        "on": True,
    }
