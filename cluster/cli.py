"""The command line: `circadian`."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import List, NoReturn, Optional, Tuple

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipelines.config.load import load_config, to_yaml
from pipelines.config.schema import Config
from pipelines.data.printable import printable

app = typer.Typer(
    name="circadian",
    help="Continual pretraining that does not forget: fast levels learn awake, slow levels learn asleep.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
store_app = typer.Typer(help="Look into an experience store.", no_args_is_help=True)
app.add_typer(store_app, name="store")
audit_app = typer.Typer(help="Look into a run's audit log.", no_args_is_help=True)
app.add_typer(audit_app, name="audit")
ARGUMENTS = typer.Argument(
    None, metavar="[CONFIG] [KEY=VALUE]...", help="A YAML file or a shipped name, then overrides."
)


def split_arguments(arguments: Optional[List[str]]) -> Tuple[str, List[str]]:
    """CONFIG (or "default") and the overrides."""
    words = list(arguments or [])
    name = words.pop(0) if words and "=" not in words[0] else "default"
    return name, words


def read_config(arguments: Optional[List[str]]) -> Config:
    """The checked configuration that the command line asks for."""
    name, overrides = split_arguments(arguments)
    return load_config(name, overrides)


@app.command()
def run(arguments: Optional[List[str]] = ARGUMENTS) -> None:
    """Run a stream: wake, sleep, gate, release. The same command again continues an existing run directory."""
    cfg = read_config(arguments)
    from cluster.driver.run import run as drive  # noqa: PLC0415 (torch and ray load only once the arguments are right)

    raise typer.Exit(drive(cfg, Console()))


@app.command()
def validate(arguments: Optional[List[str]] = ARGUMENTS) -> None:
    """Check a configuration and its data, forecast the memory, write nothing."""
    cfg = read_config(arguments)
    from cluster.data_view import show_data  # noqa: PLC0415
    from cluster.driver.checkpoint import check_checkpoint  # noqa: PLC0415
    from cluster.driver.forecast import forecast  # noqa: PLC0415
    from pipelines.data.facts import data_facts  # noqa: PLC0415
    from pipelines.data.module import open_data  # noqa: PLC0415

    setting = open_data(cfg)
    setting.probes()
    check_checkpoint(cfg, Path(cfg.run.root) / cfg.run.name, setting.tokenizer)
    console = Console()
    console.print(to_yaml(cfg), markup=False, highlight=False)
    show_data(console, data_facts(setting))
    console.print(f"stream tokens   about {setting.stream().estimate_tokens():,}")
    console.print(forecast(cfg, setting.tokenizer.vocab_size))
    console.print("configuration and data are fine")


@app.command()
def submit(
    arguments: Optional[List[str]] = ARGUMENTS,
    address: str = typer.Option(..., "--address", help="Dashboard of a Ray cluster, http://host:8265."),
) -> None:
    """Run on a Ray cluster through Ray Jobs: follows the log, exits with the job's status."""
    name, overrides = split_arguments(arguments)
    cfg = load_config(name, overrides)
    from cluster.submit import submit_run  # noqa: PLC0415

    raise typer.Exit(submit_run(cfg, address, Console()))


@app.command()
def report(run_dir: Path = typer.Argument(..., help="A run directory.")) -> None:
    """Write report.html and its plots anew and print the figures."""
    from pipelines.report.page import render_summary_table, write_report  # noqa: PLC0415

    page = write_report(run_dir)
    console = Console()
    console.print(render_summary_table(json.loads((run_dir / "summary.json").read_text())))
    console.print(f"report: {page}", markup=False)


@app.command()
def compare(
    arguments: Optional[List[str]] = ARGUMENTS,
    methods: str = typer.Option(
        "circadian,replay,naive,joint",
        help="Names, families_*, all; NAME:KEY=VALUE:... changes keys of the configuration, hook.KEY of the hook.",
    ),
    seeds: str = typer.Option("0,1,2", help="Seeds of base, batches and replay."),
    orders: str = typer.Option("A,reverse", help="A (as configured), reverse, random-N."),
    regimes: str = typer.Option("whole", help="What replay may hold: whole; cap5, cap1 (% of the stream's bytes)."),
    preset: str = typer.Option("micro", help="Sizes: micro (hours on two cores), small or base (GPU), none."),
    grid: str = typer.Option("1e-3,2e-3,4e-3", help="Step sizes that every method is tuned over; widened at an edge."),
    tuned_in: str = typer.Option("whole", help="The regime that methods are tuned in."),
    settings: Optional[Path] = typer.Option(None, help="An earlier outcome whose tuning counts here as well."),
    epochs: float = typer.Option(2.0, help="FLOPs in full training steps per token of the stream (sleep.epochs)."),
    clock: str = typer.Option(
        "fixed", help="fixed: releases come one period late. speeds: when simulated time has it."
    ),
    work: Path = typer.Option(Path("runs/compare"), help="Where finished trials are kept; they are not run again."),
    out: Path = typer.Option(Path("compare.json"), help="The outcome; its page and pictures go beside it."),
) -> None:
    """Compare strategies and opponents on what `run` executes, at equal FLOPs. The same command continues."""
    name, overrides = split_arguments(arguments)
    sizes = "" if preset == "none" else preset
    load_config(name, overrides, sizes)
    from cluster.compare import compare as run_comparison  # noqa: PLC0415 (torch takes seconds to load)
    from cluster.compare import numbers  # noqa: PLC0415
    from pipelines.compare.data import stream_of_folder  # noqa: PLC0415
    from pipelines.compare.methods import names  # noqa: PLC0415
    from pipelines.compare.options import Options  # noqa: PLC0415

    given = stream_of_folder(overrides)
    options = Options(
        methods=tuple(dict.fromkeys(names(methods))),
        seeds=tuple(int(n) for n in numbers(seeds, "--seeds")),
        orders=tuple(orders.split(",")),
        regimes=tuple(regimes.split(",")),
        tuned_in=tuned_in,
        grid=numbers(grid, "--grid"),
        epochs=epochs,
        clock=clock,
    )
    run_comparison(lambda more: load_config(name, [*given, *more], sizes), options, work, out, Console(), settings)


@app.command()
def rollback(
    run_dir: Path = typer.Argument(..., metavar="RUN_DIR", help="A run directory that nobody runs right now."),
    to: int = typer.Option(..., "--to", metavar="RELEASE", help="Number of an earlier release."),
) -> None:
    """Make an earlier release live again, as a new release with the same weights; `run` goes on from there."""
    from cluster.driver.history import announce  # noqa: PLC0415
    from cluster.driver.history import rollback as restore  # noqa: PLC0415

    done = restore(run_dir, to)
    typer.echo(
        f"release {done.release.number} has the weights of release {to} and is live instead of {done.replaced} "
        f"({done.seconds:.1f} s, fingerprint {done.release.fingerprint})"
    )
    announce(run_dir, done.release)


@app.command("import")
def import_(
    source: Path = typer.Argument(..., metavar="HF_DIR", help="A transformers checkpoint with safetensors weights."),
    out: Path = typer.Argument(..., metavar="OUT", help="A new folder."),
    levels: str = typer.Option("512,2048,8192", "--levels", help="Periods of the adaptive levels in tokens."),
    adaptive: str = typer.Option("last_quarter", "--adaptive", help="last_quarter, last_half or all of the blocks."),
) -> None:
    """Give the MLPs of a Llama, Qwen2, Qwen3, Mistral, GPT-2 or GPT-NeoX checkpoint to levels; adds no parameter."""
    from nl_model import hf  # noqa: PLC0415 (transformers takes seconds to load)

    hf.import_checkpoint(source, out, hf.RetrofitConfig(hf.parse_periods(levels), adaptive))
    typer.echo(f"imported {source} as {out}")


@app.command()
def export(
    source: Path = typer.Argument(..., metavar="RUN_OR_DIR", help="A run directory, or one made by `import`."),
    out: Path = typer.Argument(..., metavar="OUT", help="A new folder."),
) -> None:
    """Write a run's champion, or an imported model, as a directory that transformers loads."""
    from cluster.storage.export import export as write  # noqa: PLC0415

    typer.echo(f"exported {write(source, out)}")


@store_app.command("ls")
def store_ls(path: Path = typer.Argument(..., metavar="DIR", help="An experience store, runs/NAME/store.")) -> None:
    """List segments, rows and sources."""
    from pipelines.experience import list_store  # noqa: PLC0415

    table = Table("segment", "rows", "bytes", "sealed", "keys", "sources")
    for entry in list_store(path):
        sources = ", ".join(f"{printable(name)} {rows:,}" for name, rows in sorted(entry.sources.items()))
        keys = f"{entry.min_key} .. {entry.max_key}"
        table.add_row(
            f"{entry.segment:08d}",
            f"{entry.rows:,}",
            f"{entry.bytes:,}",
            "yes" if entry.sealed else "no",
            keys,
            Text(sources),
        )
    Console().print(table)


@store_app.command("verify")
def store_verify(path: Path = typer.Argument(..., metavar="DIR", help="An experience store, runs/NAME/store.")) -> None:
    """Check every checksum, the chain of manifests and the keys; exits non-zero where anything is wrong."""
    from pipelines.experience import verify  # noqa: PLC0415

    found = verify(path)
    console = Console()
    console.print(
        f"versions {found.versions:,}  segments {found.segments:,}  rows {found.rows:,}  "
        f"committed {found.committed:,}  duplicates {found.duplicates:,}  missing {found.missing_keys:,}  "
        f"orphan bytes {found.orphan_bytes:,}"
    )
    for error in found.errors:
        console.print(Text(printable(error), style="red"))
    raise typer.Exit(0 if found.ok else 1)


@audit_app.command("verify")
def audit_verify(run_dir: Path = typer.Argument(..., metavar="RUN_DIR", help="A run directory.")) -> None:
    """Check that no decision was edited, removed, moved or cut off; exits non-zero where anything is wrong."""
    from cluster.driver.history import verify_audit  # noqa: PLC0415

    found = verify_audit(run_dir)
    typer.echo(f"entries {found.entries:,}  head {found.head}")
    for error in found.errors:
        typer.echo(f"error: {error}", err=True)
    raise typer.Exit(0 if found.ok else 1)


@app.command()
def version() -> None:
    """Print the versions of Circadian and of what it stands on."""
    from pipelines.report.versions import versions  # noqa: PLC0415

    for name, number in versions().items():
        typer.echo(f"{name} {number}")


def _refuse(error: Exception, status: int) -> NoReturn:
    """Say what is wrong, and exit. Names in it may come from data; new lines are those of the message."""
    print(f"error: {printable(error, keep=chr(10))}", file=sys.stderr)
    sys.exit(status)


def main() -> None:
    """Entry point: errors of users become one line and exit status 2, a run that failed exit status 1."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        app()
    except (ValueError, OSError) as error:
        _refuse(error, 2)
    except RuntimeError as error:
        if type(error).__name__ not in ("RunFailed", "PoolError"):
            raise
        _refuse(error, 1)


if __name__ == "__main__":
    main()
