"""The tracking URI of a folder leads to a database in that very folder, whatever it is called."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy.engine import make_url

from pipelines.report.tracking_uri import database_of, default_uri

NAMES = [
    "plain",
    "a b",
    "a?b 50%25",
    "a#b",
    "100%",
    "a&b=c",
    "ä",
    "a:b@c",
    "a+b",
    "[x]",
    "a;b",
    "~",
    "'q'",
    '"q"',
    "a\\b",
]


@pytest.mark.parametrize("name", NAMES)
def test_the_database_lies_in_the_folder(name: str, tmp_path: Path) -> None:
    uri, wanted = default_uri(tmp_path / name), tmp_path / name / "mlflow.db"
    assert database_of(uri) == wanted
    parsed = make_url(uri)
    assert parsed.database == str(wanted) and not parsed.query and not parsed.host
    assert parsed.get_dialect().name == "sqlite"


def test_a_plain_folder_has_a_plain_uri(tmp_path: Path) -> None:
    assert default_uri(tmp_path / "a b") == f"sqlite:///{tmp_path}/a b/mlflow.db"


@pytest.mark.parametrize("uri", ["http://host:5000", "https://host/x", "file:///x", "postgresql://a@b/c", "x/y"])
def test_other_uris_name_no_database_here(uri: str) -> None:
    assert database_of(uri) is None
