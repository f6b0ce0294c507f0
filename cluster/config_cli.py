"""`circadian config`: what keys there are, for people, for editors and for the documentation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer

from nl_model.weights import write_durably

config_app = typer.Typer(help="Look up keys of the configuration.", no_args_is_help=True)
PAGE = Path("docs/reference/configuration.md")


@config_app.command()
def explain(
    key: Annotated[str, typer.Argument(metavar="KEY", help="A key such as wake.batch, or a section such as wake.")],
) -> None:
    """Say what a key is: meaning, type, default, bound, and which shipped files set it; a section lists its keys."""
    from pipelines.config.reference import explain as say  # noqa: PLC0415

    typer.echo(say(key))


@config_app.command()
def schema(
    out: Annotated[Optional[Path], typer.Option("--out", help="A file; without it the schema is printed.")] = None,
) -> None:
    """Write a JSON Schema (draft 2020-12) by which editors complete and check configuration files."""
    from pipelines.config.json_schema import json_schema  # noqa: PLC0415

    _write(json.dumps(json_schema(), indent=1) + "\n", out)


@config_app.command()
def reference(
    out: Annotated[Path, typer.Option("--out", help="The page.")] = PAGE,
) -> None:
    """Write the page of all keys anew, from the code."""
    from pipelines.config.reference import page  # noqa: PLC0415

    _write(page(), out)


def _write(text: str, out: Optional[Path]) -> None:
    if out is None:
        typer.echo(text, nl=False)
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    write_durably(out, text.encode("utf-8"))
    typer.echo(f"wrote {out}")
