"""Bad input, damaged data, full disks: a clear error and an exit status, nothing written, nothing lost."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Callable, Dict

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.cli import main
from tests.harness import TIMEOUT, Run, circadian, environment

MICRO = ("control.enabled=false", "pool.ranks=1")
TEXT = "".join(f"line {i} of an ordinary text, which says nothing, {i * i} times over.\n" for i in range(600))


def digest(folder: Path) -> Dict[str, str]:
    """Checksum of every file of a folder, with its time of change."""
    return {
        str(path.relative_to(folder)): f"{hashlib.sha256(path.read_bytes()).hexdigest()} {path.stat().st_mtime_ns}"
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


Refuse = Callable[..., str]


@pytest.fixture
def refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Runs the command line, in this process, with bad overrides; returns its error, nothing having been written."""

    def run(*overrides: str) -> str:
        root = tmp_path / "runs"
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["circadian", "run", "smoke", f"run.root={root}", *MICRO, *overrides])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        assert not root.exists(), sorted(root.rglob("*"))
        said = capsys.readouterr().err
        assert said.startswith("error: ") and "Traceback" not in said
        return said

    return run


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("alpha", "beta", "gamma"):
        (folder / f"{name}.txt").write_text(name + TEXT)
    return folder


def sources(data: Path) -> tuple[str, ...]:
    return (f"stream.path={data}", "stream.sources=[beta,gamma]", "base.sources=[alpha]")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sleep.tokens_per_tokn=1", r"unknown key 'sleep.tokens_per_tokn'.*'sleep.tokens_per_token'"),
        ("sleep.batch=many", r"sleep\.batch.*many"),
        ("levels.medium.period=1280", r"levels\.medium\.period=1280 is not a multiple of levels\.fast\.period=512"),
        ("pool.ranks=3", r"sleep\.batch=8 must be a multiple of pool\.ranks=3"),
        ("stream.path=/nowhere/at/all", r"stream\.path='/nowhere/at/all' does not exist"),
        ("stream.sources=[unicod]", r"stream\.sources.*unicod.*unicode"),
    ],
)
def test_a_wrong_setting_is_named_and_nothing_written(refuse: Refuse, override: str, said: str) -> None:
    assert re.search(said, refuse(override), re.DOTALL)


def test_an_empty_source_is_named(refuse: Refuse, data: Path) -> None:
    (data / "gamma.txt").write_text("")
    message = refuse(*sources(data))
    assert "'gamma' has no usable document" in message and str(data / "gamma.txt") in message


def test_bytes_that_are_no_text_are_located(refuse: Refuse, data: Path) -> None:
    (data / "gamma.txt").write_bytes(b"fine so far\n" + b"\xff\xfe\n" + TEXT.encode())
    message = refuse(*sources(data))
    assert f"{data / 'gamma.txt'}: the bytes at offset 12 are not UTF-8" in message


def test_a_parquet_file_without_the_text_column_is_named(refuse: Refuse, data: Path) -> None:
    pq.write_table(pa.table({"body": ["a", "b"]}), data / "delta.parquet")
    message = refuse(*sources(data))
    assert str(data / "delta.parquet") in message and "'text'" in message and "body" in message


@pytest.fixture(scope="module")
def finished(runs: Path) -> Run:
    """A small finished run, to be copied. One document of its stream has no end, and its fast level explodes."""
    folder = runs / "endless-data"
    folder.mkdir()
    for name in ("alpha", "beta", "gamma"):
        (folder / f"{name}.txt").write_text(name + TEXT)
    (folder / "gamma.txt").write_text(TEXT + "x" * 10_000_000 + "\n" + TEXT)
    # Decay by 1 - 1e40: the first write turns zeros into NaN, whatever the gradients were.
    explosive = ("levels.fast.optimizer.lr=1e30", "levels.fast.optimizer.weight_decay=1e10")
    run = Run(runs, "endless", (*MICRO, *sources(folder), *explosive, "stream.max_source_bytes=16384"))
    assert run.finish() == 0, run.tail()
    return run


@pytest.fixture
def copy(finished: Run, tmp_path: Path) -> Run:
    shutil.copytree(finished.directory, tmp_path / finished.name)
    return Run(tmp_path, finished.name, finished.overrides)


def test_a_run_directory_of_another_configuration_stays_as_it_is(copy: Run, tmp_path: Path) -> None:
    before = digest(copy.directory)
    done = circadian(*copy.arguments(), "sleep.batch=4", cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "sleep.batch=8" in done.stderr and "sleep.batch=4" not in done.stderr.split("this one has")[0]
    assert "choose another run.name" in done.stderr
    assert digest(copy.directory) == before


def test_a_damaged_segment_stops_the_run_before_it_begins(copy: Run, tmp_path: Path) -> None:
    segment = sorted((copy.directory / "store" / "segments").iterdir())[0]
    content = bytearray(segment.read_bytes())
    content[len(content) // 2] ^= 0x10
    segment.write_bytes(content)
    before = digest(copy.directory / "store")
    done = circadian(*copy.arguments(), cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert str(segment) in done.stderr and "Traceback" not in done.stderr
    assert digest(copy.directory / "store") == before
    verified = circadian("store", "verify", str(copy.directory / "store"), cwd=tmp_path)
    assert verified.returncode == 1 and segment.name in verified.stdout.replace("\n", "")


def test_a_full_disk_ends_the_run_and_spares_what_was_committed(runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    size = 3 << 20
    overrides = ["wake.batch=1", "stream.max_source_bytes=262144", f"tracking.uri=sqlite:///{runs / 'mlflow.db'}"]
    base = [sys.executable, "-m", "cluster.cli"]
    run = [*base, "run", "smoke", f"run.root={folder}", "run.name=full", *MICRO, *overrides]
    verify = [*base, "store", "verify", str(folder / "full" / "store")]
    script = (
        f"mount -t tmpfs -o size={size} tmpfs {folder} || exit 77\n"
        '"$@"; echo "run $?"\n'
        f"{' '.join(verify)}; echo verify $?\n"
    )
    command = ["unshare", "-m", "sh", "-c", script, "sh", *run]
    done = limited(command, tmp_path)
    if done.returncode == 77 or "unshare failed" in done.stderr:
        # Without the right to mount, a limit on the size of files makes the same writes fail.
        limit = f'ulimit -f 100\n"$@"; echo "run $?"\n{" ".join(verify)}; echo verify $?\n'
        done = limited(["bash", "-c", limit, "bash", *run], tmp_path)
    assert "run 2" in done.stdout or "run 1" in done.stdout, done.stdout + done.stderr
    assert re.search(r"error: .*(No space left on device|File too large)", done.stderr), done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert "verify 0" in done.stdout, done.stdout + done.stderr


def limited(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=environment(), cwd=cwd, capture_output=True, text=True, timeout=TIMEOUT, check=False
    )


def test_a_document_without_end_is_quarantined_and_the_run_goes_on(finished: Run, runs: Path) -> None:
    summary = finished.summary()
    ((source, origin, reason),) = [entry for entry in summary["quarantined"] if "bytes" in entry[2]]
    assert source == "gamma" and str(runs / "endless-data" / "gamma.txt") in origin
    assert reason == "10000001 bytes are more than stream.max_document_bytes=1000000"
    assert summary["experiences"]["lost"] == 0 and summary["tokens_streamed"] == 2 * 16384


def test_losses_that_are_not_finite_are_quarantined_and_the_gate_decides(finished: Run) -> None:
    summary = finished.summary()
    reasons = [reason for *_, reason in summary["quarantined"] if "bytes" not in reason]
    assert reasons and set(reasons) == {"loss is not finite"}
    assert summary["experiences"]["quarantined"] == len(reasons) + 1
    assert summary["experiences"]["lost"] == summary["experiences"]["duplicates"] == 0
    assert {entry["decision"] for entry in summary["rounds"]} <= {"promoted", "rejected"}
