"""The driver: from a configuration to a finished run directory, or back to where it was interrupted."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, Optional

import psutil
import ray
from rich.console import Console

from cluster.actors.tracking_arguments import tracking_arguments
from cluster.actors.tracking_client import TrackingClient
from cluster.data_view import show_data
from cluster.driver.checkpoint import check_checkpoint
from cluster.driver.coordinator import Coordinator
from cluster.driver.failures import RunFailed, Stopped
from cluster.driver.finished import keep_data, keep_finished, read_finished, tell_finished
from cluster.driver.history import hold_lock
from cluster.live import LiveView
from cluster.storage.export import keep_tokenizer
from nl_model.model import resolve_device
from nl_model.weights import write_durably
from pipelines.config.load import differences, load_config, to_yaml
from pipelines.config.schema import Config
from pipelines.data.facts import data_facts
from pipelines.data.module import DataModule, open_data
from pipelines.data.printable import printable_values
from pipelines.experience import verify_recent
from pipelines.report.events import EventLog

logger = logging.getLogger(__name__)


GRACE = 2.2
"""Seconds that an orderly stop may take; then the process leaves as it is (what is committed is safe at any moment)."""


NO_CONTROLS = "the text is yours, and each of them costs as much as the run; control.enabled=true trains them"


class Signals:
    """SIGTERM and SIGINT ask for an orderly stop; the second one exits at once.

    The stop is an exception, raised wherever the main thread is. Compiled code and finalizers may lose it, and while
    Ray connects the handler is Ray's. So a thread hears of signals too, through the wake-up descriptor, whoever the
    handler is.
    """

    def __init__(self) -> None:
        self.coordinator: Optional[Coordinator] = None
        self.asked = self.heard = False
        self.leave: Callable[[], None] = lambda: os._exit(0)
        """Says goodbye and exits."""
        receiver, sender = socket.socketpair()
        sender.setblocking(False)
        signal.set_wakeup_fd(sender.detach(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(receiver,), daemon=True, name="signals").start()
        self.report_lost, sys.unraisablehook = sys.unraisablehook, self._lose
        self.install()

    def install(self) -> None:
        """Take the signals over (again: Ray puts handlers of its own in place)."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _watch(self, receiver: socket.socket) -> None:
        while not {signal.SIGTERM, signal.SIGINT} & set(receiver.recv(64)):
            pass
        self.asked = True
        time.sleep(GRACE)
        # In a thread of its own: a lock whose release was interrupted would hold it up for ever.
        threading.Thread(target=self.leave, daemon=True).start()
        time.sleep(0.4)
        _leave_at_once()

    def _lose(self, lost: sys.UnraisableHookArgs) -> None:
        """What a finalizer raised. A stop is no error that the user should see printed: the thread sees to it."""
        if not issubclass(lost.exc_type, (Stopped, SystemExit, KeyboardInterrupt)):
            self.report_lost(lost)

    def _handle(self, number: int, frame: Any) -> None:
        if self.heard:
            os._exit(128 + number)
        self.heard = self.asked = True
        if self.coordinator is not None:
            self.coordinator.stop_requested = True
            if self.coordinator.deferring:
                return
        raise Stopped


def run(cfg: Config, console: Console) -> int:
    """Run or continue a run; returns the exit status. ValueError before anything is written where the input is bad."""
    signals = Signals()
    try:
        if cfg.ray.address is None:
            resolve_device(cfg.compute.device)
        run_dir = Path(cfg.run.root).resolve() / cfg.run.name
        resumed = check_run_dir(run_dir, cfg)
        if resumed and (finished := read_finished(run_dir)) is not None:
            tell_finished(console, cfg, run_dir, finished)
            return 0
        setting = open_data(cfg)
        setting.probes()
        check_checkpoint(cfg, run_dir, setting.tokenizer)
        facts = data_facts(setting)
        show_data(console, facts)
        with create_run_dir(run_dir, cfg), LiveView(cfg.run.name, console) as view:
            keep_tokenizer(run_dir, setting.tokenizer)
            keep_data(run_dir, facts)
            log, guard = EventLog(run_dir / "events.jsonl"), threading.Lock()

            def emit(event: str, **fields: Any) -> Any:
                with guard:
                    entry = log.emit(event, **fields)
                    view.handle(printable_values(entry))
                return entry

            return _drive(cfg, run_dir, setting, emit, signals, resumed, console)
    except Stopped:
        console.print("stopped; nothing was under way")
        return 0


def _drive(
    cfg: Config,
    run_dir: Path,
    setting: DataModule,
    emit: Callable[..., Any],
    signals: Signals,
    resumed: bool,
    console: Console,
) -> int:
    start = time.perf_counter()

    def leave() -> None:
        emit("stopped", reason="asked to stop", tokens=_position(signals))
        console.print(f"stopped; everything is committed. The same command continues {run_dir}", markup=False)
        _leave_at_once()

    try:
        signals.leave = leave
        emit("run_started", resumed=resumed, **_announce(cfg, setting))
        if cfg.control.enabled == "auto" and not cfg.trains_controls:
            emit("no_controls", reason=NO_CONTROLS)
        start_ray(cfg)
        signals.install()
        cfg = place(cfg)
        tracking = TrackingClient(tracking_arguments(cfg, run_dir), cfg.failures.services)
        coordinator = Coordinator(cfg, run_dir, setting, emit, tracking)
        signals.coordinator = coordinator
        try:
            summary = coordinator.run()
        finally:
            coordinator.shut_down()
        from pipelines.report.page import render_summary_table, write_report  # noqa: PLC0415 (plots load slowly)

        write_durably(run_dir / "summary.json", json.dumps(summary, indent=1).encode())
        report = write_report(run_dir)
        emit("finished", seconds=time.perf_counter() - start)
        artifacts = [run_dir / "config.yaml", run_dir / "summary.json", report, *sorted(run_dir.glob("*.png"))]
        tracking.log_metrics(_headline(summary), int(summary["tokens_streamed"]))
        if tracking.finish("FINISHED", artifacts, cfg.failures.call_timeout):
            keep_finished(run_dir, coordinator.state)
    except (Stopped, SystemExit):  # the latter from the handler that Ray has in place while it starts
        leave()
    except Exception as error:  # what Ray raises when its processes end under it, once a stop was asked for
        if not signals.asked:
            raise
        logger.warning("while stopping: %s: %s", type(error).__name__, error)
        logger.debug("where it came from", exc_info=True)
        leave()
    ray.shutdown()
    console.print(render_summary_table(summary))
    console.print(f"report: {report}", markup=False)
    return 0


def _leave_at_once() -> None:
    """Exit without Ray's slow farewell. A cluster started here goes too, its agents included: they would linger."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    os._exit(0)


def _position(signals: Signals) -> int:
    return signals.coordinator.state.tokens if signals.coordinator is not None else 0


def _announce(cfg: Config, setting: DataModule) -> Dict[str, Any]:
    return {
        "run": cfg.run.name,
        "sources": setting.sources,
        "base_sources": setting.base_sources,
        "stream_tokens": setting.stream().estimate_tokens(),
        "levels": {name: {"period": level.period, "owner": level.owner} for name, level in cfg.levels.items()},
    }


def _headline(summary: Dict[str, Any]) -> Dict[str, float]:
    keys = (
        "mean_final_bpb",
        "learning",
        "forgetting",
        "backward_transfer",
        "system_overhead",
        "wake_tokens_per_second",
    )
    metrics = {key: float(summary[key]) for key in keys}
    if summary["control"]:
        metrics.update({f"control/{key}": float(summary["control"][key]) for key in keys[:4]})
    for name, figures in summary["controls"].items():
        metrics.update({f"control_{name}/{key}": float(figures[key]) for key in keys[:4]})
    return metrics


def check_run_dir(run_dir: Path, cfg: Config) -> bool:
    """Whether the run exists. ValueError where it belongs to another configuration, or its store is damaged."""
    config = run_dir / "config.yaml"
    if not config.exists():
        return False
    other = differences(load_config(str(config)), cfg)
    if other:
        key, old, new = other[0]
        raise ValueError(
            f"{run_dir} belongs to a run with {key}={old!r}, this one has {key}={new!r}"
            f"{f' (and {len(other) - 1} more differences)' if len(other) > 1 else ''}; "
            "choose another run.name or give the old values"
        )
    if (run_dir / "store").is_dir():
        verify_recent(run_dir / "store", cfg.store.verify_bytes)
    return True


def create_run_dir(run_dir: Path, cfg: Config) -> Any:
    """Create the run directory and hold its lock; ValueError where another process runs it."""
    (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    lock = hold_lock(run_dir)
    write_durably(run_dir / "config.yaml", to_yaml(cfg).encode())
    return lock


def start_ray(cfg: Config) -> None:
    """Connect to the configured cluster, to the one this process is a job of, or start one on this machine."""
    threads = str(cfg.compute.threads)
    variables = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # this cluster is ours; Ray would run its workers at nice 15
    address = cfg.ray.address or os.environ.get("RAY_ADDRESS")
    common: Dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": False, "namespace": "circadian"}
    if address:
        ray.init(address=address, runtime_env={"env_vars": variables}, **common)
        return
    os.environ.update(variables)
    common.update(address="local", num_cpus=max(os.cpu_count() or 1, 2), include_dashboard=False)
    common.update(object_store_memory=cfg.ray.object_store_mb << 20)
    for attempts_left in (2, 1, 0):
        try:
            ray.init(**common)
            return
        except Exception as error:  # Ray raises a bare Exception when a busy machine takes longer than its 30 s
            ray.shutdown()
            if "timed out during startup" not in str(error) or not attempts_left:
                raise RunFailed(f"Ray did not start on this machine: {error}") from error
            logger.warning("Ray was slow to start; trying again")


def place(cfg: Config) -> Config:
    """Decide compute.device=auto for the whole cluster: Ray hides GPUs from actors that do not ask for one."""
    if cfg.compute.device != "auto":
        return cfg
    wanted = cfg.ray.gpus * (cfg.pool.ranks + 1)
    device = "cuda" if ray.cluster_resources().get("GPU", 0.0) >= wanted else "cpu"
    return replace(cfg, compute=replace(cfg.compute, device=device))
