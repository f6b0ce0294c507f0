"""Where trials are done and kept: a result that is on disk is read, not computed again. Several processes may share it.

A trial is a pure function of what its file's name is a hash of.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Dict, Optional

from torch import Tensor

from nl_model.weights import load_tensors, save_tensors, write_durably
from pipelines.compare.data import TrialData
from pipelines.compare.trial import Trial, run_trial
from pipelines.config.load import FREE_ON_RESUME, config_hash, flatten
from pipelines.config.schema import Config
from pipelines.machine.local import LocalHost, pretrain
from pipelines.sleep.base import base_hash

RULES = 3
"""Raised whenever trials of the same settings come out differently than before. Older ones are not read."""
WAIT = 2.0
"""Seconds between two looks at what another process is doing."""
UNDECIDING = (*FREE_ON_RESUME, "run.name", "strategy", "report", "store", "tokenizer.path", "compute.threads")
"""Keys that change no trial: strategies and names stand for keys of their own."""


class Trials:
    """trials/ and bases/ below a folder.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        for name in ("trials", "bases"):
            (path / name).mkdir(parents=True, exist_ok=True)

    def read(self, trial: Trial) -> Optional[Dict[str, Any]]:
        """The result of a trial that is done; None where it is not."""
        path = self._file(trial)
        return json.loads(path.read_text()) if path.exists() else None

    def claim(self, trial: Trial) -> bool:
        """Take a trial on; False where a living process of this host has it."""
        return _claim(self._file(trial).with_suffix(".claim"))

    def run(self, trial: Trial, about: Dict[str, Any]) -> Dict[str, Any]:
        """Do a trial and keep its result.

        Args:
            about: what people call it, kept with the result.
        """
        payload = json.dumps({**run_trial(trial, self.base(trial.cfg, trial.data)), "key": about})
        path = self._file(trial)
        write_durably(path, payload.encode())
        path.with_suffix(".claim").unlink(missing_ok=True)
        result: Dict[str, Any] = json.loads(payload)  # as whoever reads the file finds it
        return result

    def base(self, cfg: Config, data: TrialData) -> Dict[str, Tensor]:
        """Weights that all methods of a seed start from: pretrained once per seed, model and text, and cached."""
        setting, sequences = data.of(cfg), data.base(cfg)
        path = self.path / "bases" / f"{base_hash(cfg, setting.base_sources, sequences)}.safetensors"
        while not path.exists():
            if _claim(path.with_suffix(".claim")):
                with tempfile.TemporaryDirectory() as folder:
                    save_tensors(path, pretrain(cfg, LocalHost(setting.cfg, setting, Path(folder)), sequences))
                path.with_suffix(".claim").unlink()
            else:
                time.sleep(WAIT)
        return load_tensors(path)[0]

    def _file(self, trial: Trial) -> Path:
        return self.path / "trials" / f"{digest(trial)}.json"


def digest(trial: Trial) -> str:
    """A hash over everything that decides a trial's result; what its method is called does not."""
    settings = {key: value for key, value in flatten(asdict(trial.cfg)).items() if not _is_undeciding(key)}
    method = {"hook": trial.method.hook, "settings": dict(trial.method.settings), "joint": trial.method.joint}
    return config_hash(RULES, settings, method, trial.clock, trial.looks, trial.data.fingerprint)


def _is_undeciding(key: str) -> bool:
    return any(key == part or key.startswith(part + ".") for part in UNDECIDING)


def _claim(path: Path) -> bool:
    """Make a file that names this process; False where it names another living one."""
    try:
        with open(path, "x", encoding="ascii") as file:
            file.write(str(os.getpid()))
        return True
    except FileExistsError:
        holder = path.read_text() or "0"
        if Path(f"/proc/{holder}").exists() and int(holder) != os.getpid():
            return False
        path.write_text(str(os.getpid()))
        return True
