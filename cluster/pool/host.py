"""A rank of the pool as the host of a round: DeepSpeed engines, dreams and guides through files, states to resume
from."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Optional, Tuple

import numpy as np
import torch

from cluster.pool.dreaming import dream_together
from cluster.pool.engine import DeepSpeedEngine
from cluster.pool.worker import TRAINER
from cluster.storage.training_state import RoundStates, write_state
from nl_model.config import OptimizerConfig
from nl_model.model import NestedLM
from pipelines.config.schema import Config
from pipelines.data.tokens import Tokenizer
from pipelines.experience import Snapshot
from pipelines.sleep.engine import Engine, HeldState, TrainingState
from pipelines.sleep.guides import StoredGuides, write_guides
from pipelines.sleep.plan import RoundPlan
from pipelines.sleep.round import DreamShare, Pinned, Resume, Task
from pipelines.sleep.training import Place, Progress


class RankHost:
    """Where a rank's part of a round runs.

    Args:
        directory: the candidate's, seen by all ranks.
        states: where an attempt leaves its training states, given the training's name.
        show: told (steps done, steps, last loss).
    """

    def __init__(
        self,
        cfg: Config,
        place: Place,
        device: torch.device,
        tokenizer: Tokenizer,
        directory: Path,
        states: Callable[[Dict[str, Any]], RoundStates],
        show: Callable[[int, int, float], None],
    ) -> None:
        self.cfg, self.place, self.device = cfg, place, device
        self.tokenizer, self.directory, self.show = tokenizer, directory, show
        self._states_of = states
        self.states: Optional[RoundStates] = None

    def build_model(self) -> NestedLM:
        """A model of the run's shape on the device."""
        return NestedLM(self.cfg.model, self.cfg.levels, self.tokenizer.vocab_size).to(self.device)

    def build_engine(
        self,
        model: NestedLM,
        optimizer: OptimizerConfig,
        batch: int,
        frozen: Iterable[str],
        state: Optional[TrainingState],
    ) -> Engine:
        """A DeepSpeed engine as pool.* says."""
        return DeepSpeedEngine(model, optimizer, self.cfg.pool, batch // self.place.world, frozen, state)

    def dream(self, pinned: Pinned, awake: NestedLM) -> DreamShare:
        """Rank 0 dreams; the others read the file that it leaves beside the candidate."""
        if not self.cfg.dreams.share or not pinned.plan.steps:
            return DreamShare()
        assert isinstance(pinned.experience, Snapshot)
        place = (self.place.rank, self.place.world)
        return dream_together(self.cfg, pinned.plan, pinned.experience, awake, self.directory, self.tokenizer, place)

    def store_guides(self, pinned: Pinned, rows: np.ndarray, teacher: NestedLM) -> Tuple[StoredGuides, int]:
        """Write this rank's share of the teacher's guides; returns those of all ranks, and the tokens read for it."""
        assert isinstance(pinned.experience, Snapshot)
        rank, world = self.place.rank, self.place.world
        paths = [self.directory / f"guides-{rank:05d}.arrow" for rank in range(world)]
        settings = (self.cfg.sleep.top_k, self.cfg.compute.precision)
        tokens = write_guides(paths[rank], teacher, pinned.experience, rows[rank::world], *settings)
        torch.distributed.barrier()
        stored = StoredGuides(paths)
        torch.distributed.barrier()
        paths[rank].unlink()  # what is mapped stays readable; the candidate keeps nothing of it
        return stored, tokens

    def resume(self, plan: RoundPlan) -> Optional[Resume]:
        """The newest whole state of this training."""
        return self.resume_training(plan.to_json())

    def resume_training(self, key: Dict[str, Any]) -> Optional[Resume]:
        """The newest whole state of a training of this name; its states go on there."""
        self.states = self._states_of(key)
        state = self.states.newest()
        if state is None:
            return None
        kept = state.progress_of(self.place.rank, self.place.world)
        progress = Progress(state.step, kept["sums"])
        return Resume(state, progress, kept["trained_tokens"], kept["forward_tokens"], state.average())

    def after_step(self, engine: Engine, task: Task, progress: Progress, loss: float) -> None:
        """Show the step, and leave a state where one is due."""
        average = task.average.weights if task.average is not None else None
        counts = {"trained_tokens": task.objective.trained_tokens, "forward_tokens": task.objective.forward_tokens}
        self.after_any_step(engine, task.schedule.steps, progress, loss, counts, average)

    def after_any_step(
        self,
        engine: Engine,
        steps: int,
        progress: Progress,
        loss: float,
        counts: Dict[str, int],
        average: Optional[Dict[str, torch.Tensor]] = None,
    ) -> None:
        """The same for any training of `steps` steps."""
        self.show(progress.step, steps, loss)
        if self.states is not None:
            so_far = {**counts, "sums": asdict(progress)["sums"]}
            self.states.after(engine, progress.step, steps, so_far, average)

    def keep(self, engine: Engine, steps: int) -> Optional[HeldState]:
        """Leave what the next round carries on beside the candidate."""
        with_weights = self.cfg.sleep.carry == "trainer"
        write_state(self.directory / TRAINER, engine, {"steps": steps}, steps, weights=with_weights)
        return None

    def finish(self) -> None:
        """The shard is on disk. Should another rank fail yet, the repeated attempt begins anew."""
        if self.states is not None and not self.place.rank:
            self.states.clear()
