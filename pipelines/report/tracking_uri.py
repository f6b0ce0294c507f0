"""Where MLflow's database lies, as the URI that MLflow wants and back."""

from __future__ import annotations

from pathlib import Path
from typing import Optional
from urllib.parse import quote, unquote

DATABASE = "sqlite:///"
QUOTED_DATABASE = "sqlite+pysqlite:///"


def default_uri(root: Path) -> str:
    """The SQLite database beside the runs, as a tracking URI. Artifacts belong beside it, in root/mlartifacts.

    What would end or change a path in a URI (?, #, %) is quoted. The driver is then named as well: for `sqlite:///`
    MLflow makes the folder of the quoted path, a second one that nobody asked for.
    """
    path = str(Path(root).resolve() / "mlflow.db")
    quoted = quote(path, safe="/ ~!$&'()*+,;=:@")
    return f"{DATABASE}{path}" if quoted == path else f"{QUOTED_DATABASE}{quoted}"


def database_of(uri: str) -> Optional[Path]:
    """The file of a SQLite database, None for any other tracking URI."""
    for prefix in (DATABASE, QUOTED_DATABASE):
        if uri.startswith(prefix):
            return Path(unquote(uri.removeprefix(prefix).partition("?")[0]))
    return None
