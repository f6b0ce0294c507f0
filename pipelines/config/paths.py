"""Paths that people give: `~` is their home folder wherever a path may stand, in a file as on the command line."""

from __future__ import annotations

import os
from typing import Optional

DATABASE = "sqlite:///"


def from_home(key: str, path: Optional[str]) -> Optional[str]:
    """A path with `~` or `~user` at its start written out; everything else as it is.

    It is done where a configuration is built, so that run, validate, submit and compare mean the same folder, and the
    file that a run keeps says which.

    Raises:
        ValueError: nobody of that name has a home here.
    """
    if not path or not path.startswith("~"):
        return path
    found = os.path.expanduser(path)
    if found.startswith("~"):
        raise ValueError(
            f"{key}={path!r} begins with the home of a user that is not known here; give the whole path, or ./{path} "
            "for a folder of that name"
        )
    return found


def uri_from_home(key: str, uri: Optional[str]) -> Optional[str]:
    """The same for a tracking URI: a bare path, or a SQLite database given by one."""
    if uri and uri.startswith(f"{DATABASE}~"):
        return f"{DATABASE}{from_home(key, uri.removeprefix(DATABASE))}"
    return from_home(key, uri)
