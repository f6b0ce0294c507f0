"""Actor `OnlineLearner`: the learner as a process. The pool never delays it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import ray
from torch import Tensor

from cluster.actors.start import configure_torch
from cluster.storage.releases import Releases, load_release
from nl_model.weights import load_tensors, save_tensors, split
from pipelines.config.schema import Config
from pipelines.data.module import open_data
from pipelines.experience import Record, Snapshot
from pipelines.wake.learner import Checkpoint, Learner
from pipelines.wake.report import LearnerReport

KEPT_CHECKPOINTS = 2


class OnlineLearner:
    """Awake phase as a process. Calls run one after the other; `stop` alone may overtake them."""

    def __init__(self, cfg: Config, run_dir: str, tokenizer_state: Dict[str, Any]) -> None:
        configure_torch(cfg)
        self.cfg = cfg
        self.host = DiskHost(cfg, Path(run_dir))
        self.learner = Learner(cfg, open_data(cfg, tokenizer_state), self.host)

    def restore(self, service: Any) -> LearnerReport:
        """Begin at the newest checkpoint, or at the base; the stream is replayed from there."""
        self.host.service = service
        return self.learner.restore()

    def advance(self, max_steps: int, until: Optional[int] = None) -> LearnerReport:
        """Take up to `max_steps` wake steps."""
        return self.learner.advance(max_steps, until)

    def finish(self) -> LearnerReport:
        """After the end of the stream: pin what came since the last boundary."""
        return self.learner.finish()

    def adopt(self, release: int, not_before: int = 0, at_once: bool = False) -> LearnerReport:
        """Adopt a release at the next boundary that is not before a stream position, or at once."""
        return self.learner.adopt(release, not_before, at_once)

    @ray.method(concurrency_group="control")
    def stop(self) -> None:
        """Make the running and all later calls of `advance` finish their step, checkpoint and return."""
        self.learner.stopping = True


class DiskHost:
    """Keeps a learner's things in its run directory, and experience with the service that commits it."""

    def __init__(self, cfg: Config, run_dir: Path) -> None:
        self.cfg, self.run_dir = cfg, run_dir
        self.releases, self.checkpoints = Releases(run_dir / "releases"), run_dir / "checkpoints"
        self.service: Any = None
        self.snapshot: Optional[Snapshot] = None

    def append(self, records: List[Record], cursor: Dict[str, Any]) -> Callable[[], int]:
        """Hand records to the experience service."""
        reference = self.service.append.remote(records, cursor)

        def wait() -> int:
            return int(ray.get(reference, timeout=self.cfg.failures.call_timeout))

        return wait

    def experience(self) -> Snapshot:
        """The newest version of the store; what was open already is extended, not read again."""
        self.snapshot = Snapshot.open(self.run_dir / "store") if self.snapshot is None else self.snapshot.extend()
        return self.snapshot

    def pin(self, file: str, tensors: Dict[str, Tensor]) -> None:
        """Write what a mark pins, once."""
        if not (self.run_dir / file).exists():
            save_tensors(self.run_dir / file, tensors)

    def release(self, number: int) -> Tuple[Dict[str, Tensor], Dict[str, Tensor]]:
        """(weights, offsets) of a published release."""
        tensors = load_release(self.releases.directory(number))
        return split(tensors, "weight"), split(tensors, "offset")

    def save(self, tokens: int, checkpoint: Checkpoint) -> None:
        """Write a checkpoint, durably; the newest two are kept."""
        save_tensors(self.checkpoints / f"learner-{tokens:015d}.safetensors", *checkpoint)
        for old in sorted(self.checkpoints.glob("learner-*.safetensors"))[:-KEPT_CHECKPOINTS]:
            old.unlink()

    def newest(self) -> Optional[Checkpoint]:
        """The newest checkpoint."""
        found = sorted(self.checkpoints.glob("learner-*.safetensors"))
        return load_tensors(found[-1]) if found else None
