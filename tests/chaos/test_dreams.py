"""The driver dies between publishing a release and settling its round: no dream is lost, none comes twice."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from cluster.storage.releases import Releases
from pipelines.dreams.file import read_dreams
from pipelines.experience import KINDS, Snapshot
from tests.harness import TIMEOUT, Run, environment

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]
OVERRIDES = ("dreams.share=0.0625", "control.enabled=false", "pool.ranks=1", "stream.max_source_bytes=16384")
# The command line, but the driver kills itself at one exact moment of its first promoted round.
DRIVER = """
import os, signal
from cluster.cli import main
from cluster.driver.coordinator import Coordinator

tell = Coordinator._tell

def dies(self, event):
    if type(event).__name__ == ("Published" if "{moment}" == "published" else "DreamsStored"):
        os.kill(os.getpid(), signal.SIGKILL)
    tell(self, event)

Coordinator._tell = dies
main()
"""


@pytest.mark.parametrize("moment", ["published", "stored"])
def test_dreams_of_a_published_release_are_stored_once(runs: Path, moment: str) -> None:
    run = Run(runs, f"dreams-{moment}", OVERRIDES)
    command = [sys.executable, "-c", DRIVER.format(moment=moment), *run.arguments()]
    with run.log.open("ab") as log:
        died = subprocess.run(
            command,
            env=environment(),
            cwd=run.cwd,
            stdout=log,
            stderr=subprocess.STDOUT,
            timeout=TIMEOUT,
            start_new_session=True,
            check=False,
        )
    assert died.returncode == -9, run.tail()
    for left in run.processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            left.kill()
    releases = Releases(run.directory / "releases")
    torn = max(releases.numbers())
    dreamt = {record.key for record in read_dreams(releases.directory(torn))}
    assert torn > 0 and dreamt, "the round that was cut off has no dreams: nothing is tested"
    held = Snapshot.open(run.directory / "store")
    assert (dreamt <= set(held.keys.tolist())) == (moment == "stored")

    assert run.finish() == 0, run.tail()
    snapshot = Snapshot.open(run.directory / "store")
    keys = snapshot.keys[snapshot.kinds == KINDS.index("dream")]
    live = [entry["release"] for entry in run.summary()["rounds"] if entry["release"]]
    wanted = [record.key for number in live for record in read_dreams(releases.directory(number))]
    assert torn in live and sorted(keys.tolist()) == sorted(wanted) and len(np.unique(keys)) == len(keys)
    assert run.summary()["experiences"]["lost"] == run.summary()["experiences"]["duplicates"] == 0
