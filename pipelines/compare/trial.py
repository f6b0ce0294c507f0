"""One trial: a method with its settings on one order of the stream, from the base to the last score.

A trial is a pure function of its key; a result that is on disk already is read, not computed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional

import torch
from torch import Tensor

from nl_model.model import NestedLM, resolve_device
from nl_model.optim.levelwise import build_optimizer
from nl_model.weights import load_tensors, save_tensors, write_durably
from pipelines.compare.circadian import CircadianTrainer
from pipelines.compare.config import REGIMES, Method
from pipelines.compare.handover import PLENTY, HandoverTrainer
from pipelines.compare.material import Material
from pipelines.compare.meter import Meter
from pipelines.compare.plain import JointTrainer, PlainTrainer
from pipelines.config.load import config_hash
from pipelines.config.schema import Config
from pipelines.sleep.base import BaseBatches
from pipelines.sleep.schedule import learning_rate

RULES = {"plain": 4, "joint": 1, "circadian": 5}
"""By family; raised whenever trials of the same settings come out differently than before. Older ones are not read."""
FEW = 1
"""Added to Circadian's where FLOPs are few: raised when only those come out differently."""
WAIT = 2.0
"""Seconds between two looks at what another process is doing."""
SHARED, AWAKE = ("model", "levels", "tokenizer", "stream", "base", "sleep"), ("wake", "gate")
"""Sections of the configuration that decide every trial, and those that decide Circadian's alone."""


@dataclass(frozen=True)
class Key:
    """What decides a trial, beside configuration and data."""

    name: str
    method: Method
    lr: float
    regime: str
    order: str
    seed: int
    epochs: float
    scratch: bool
    data: str = ""
    """Fingerprint of the text (`Material.fingerprint`)."""

    def digest(self, cfg: Config) -> str:
        """Name of the trial's file: a hash over everything that decides its result (the method's name does not)."""
        parts = {k: v for k, v in asdict(self).items() if k != "name"}
        sections = [*SHARED, *AWAKE]
        if self.method.family != "circadian":
            parts["method"] = {k: v for k, v in parts["method"].items() if k != "night"}  # of no concern to others
            sections = [*SHARED]
        settings = asdict(cfg)
        few = self.epochs < PLENTY or REGIMES[self.regime].asleep > 0
        rules = RULES[self.method.family] + FEW * (few and self.method.family == "circadian")
        return config_hash(rules, parts, [settings[k] for k in sections])


class Workshop:
    """Where trials are done and kept: trials/, bases/ below a folder. Several processes may share it.

    Args:
        path: the folder.
        cfg: model, stream, base, and settings of wake and sleep.
    """

    def __init__(self, path: Path, cfg: Config) -> None:
        self.path, self.cfg = path, cfg
        self.device = resolve_device(cfg.compute.device)
        for name in ("trials", "bases"):
            (path / name).mkdir(parents=True, exist_ok=True)

    def read(self, key: Key) -> Optional[Dict[str, Any]]:
        """The result of a trial that is done; None where it is not."""
        path = self.path / "trials" / f"{key.digest(self.cfg)}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def claim(self, key: Key) -> bool:
        """Take a trial on; False where a living process of this host has it."""
        return _claim(self.path / "trials" / f"{key.digest(self.cfg)}.claim")

    def run(self, key: Key, material: Material) -> Dict[str, Any]:
        """Do a trial and keep its result."""
        start = time.perf_counter()
        weights = self.base(material, key.seed, key.scratch)
        regime, meter = REGIMES[key.regime], Meter.of(self.cfg, material.vocab_size)
        epochs = regime.epochs(key.epochs, meter.wake / meter.full)
        capacity = regime.stored * material.stream_bytes
        torch.manual_seed(key.seed)
        shared = (material, key.lr, epochs, capacity, key.seed, weights, self.device)
        result = _trainer(key.method, *shared).run().result()
        result.update(key={**asdict(key), "method": asdict(key.method)}, seconds=time.perf_counter() - start)
        path = self.path / "trials" / f"{key.digest(self.cfg)}.json"
        write_durably(path, json.dumps(result).encode())
        path.with_suffix(".claim").unlink(missing_ok=True)
        return result

    def base(self, material: Material, seed: int, scratch: bool) -> Dict[str, Tensor]:
        """Weights that every method of a seed starts from; pretrained once on the base mixture and cached."""
        cfg = self.cfg
        model = NestedLM(cfg.model, cfg.levels, material.vocab_size).reset_parameters(seed)
        if scratch or not material.has_base:
            return {n: p.detach() for n, p in model.named_parameters()}
        text = hashlib.sha256(material.base.tokens_NS.tobytes()).hexdigest()
        shape = [asdict(cfg)[k] for k in ("model", "levels", "base")] + [asdict(cfg.sleep.optimizer)]
        path = self.path / "bases" / f"{config_hash(shape, text, seed)}.safetensors"
        while not path.exists():
            if _claim(path.with_suffix(".claim")):
                self._pretrain(model.to(self.device), material, seed)
                save_tensors(path, dict(model.named_parameters()))
                path.with_suffix(".claim").unlink()
            else:
                time.sleep(WAIT)
        return load_tensors(path)[0]

    def _pretrain(self, model: NestedLM, material: Material, seed: int) -> None:
        """All levels but the learner's, which stay neutral, on the mixture."""
        cfg = self.cfg
        model.train_only("pool")
        optimizer = build_optimizer([p for p in model.parameters() if p.requires_grad], cfg.sleep.optimizer, model)
        steps = cfg.base.tokens // (cfg.base.batch * cfg.model.context)
        rows: List[Any] = list(material.base.tokens_NS)
        order = BaseBatches([_Row(r) for r in rows], cfg.base.batch, seed)  # type: ignore[misc]
        for step in range(steps):
            tokens_BS = order.batch(step)[0].to(self.device)
            model.nll(tokens_BS).mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.sleep.optimizer.clip or float("inf"))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(cfg.base.lr, step, steps)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


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


@dataclass(frozen=True)
class _Row:
    tokens: Any


def _trainer(
    method: Method,
    material: Material,
    lr: float,
    epochs: float,
    capacity: float,
    seed: int,
    weights: Dict[str, Tensor],
    device: torch.device,
) -> PlainTrainer | CircadianTrainer:
    if method.family == "circadian":
        ours = HandoverTrainer if method.night.handover else CircadianTrainer
        return ours(material, method.night, lr, epochs, capacity, seed, weights, device)
    kind = JointTrainer if method.family == "joint" else PlainTrainer
    return kind(material, method, lr, epochs, capacity, seed, weights, device)
