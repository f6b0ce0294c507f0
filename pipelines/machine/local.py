"""The parts of a run in one process, without files: the learner, rounds, releases and the store that a simulated run
drives.

It is the code that a run executes (pipelines/wake/learner.py, pipelines/sleep/round.py) on hosts that keep everything
in memory. `circadian compare`, controls and tests of the run's machine train here.
"""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor

from nl_model.config import OptimizerConfig
from nl_model.flops import forward_flops
from nl_model.model import NestedLM, resolve_device
from nl_model.weights import join, load_into, tensor_digest
from pipelines.config.schema import Config
from pipelines.data.module import DataModule
from pipelines.dreams.dream import dream, to_records
from pipelines.dreams.report import night_record
from pipelines.experience import Record
from pipelines.experience.memory import MemorySnapshot, MemoryStore
from pipelines.gate.decision import decide
from pipelines.gate.evidence import ShardFacts, Storage, TensorFacts, weights_fingerprint
from pipelines.gate.judge import Judge, gather_evidence
from pipelines.gate.probe import score
from pipelines.machine import actions as do
from pipelines.machine import events as on
from pipelines.machine.records import ReleaseFact, RoundRecord
from pipelines.machine.rules import Rules
from pipelines.sleep.base import Pretraining, TrueTokens, base_records, base_sequences
from pipelines.sleep.engine import Engine, HeldState, LocalEngine, TrainingState
from pipelines.sleep.guides import StoredGuides, write_guides
from pipelines.sleep.judged import judge_candidate
from pipelines.sleep.plan import RoundPlan
from pipelines.sleep.round import Candidate, DreamShare, Pinned, Resume, Task, Weights, run_round
from pipelines.sleep.training import ALONE, Place, Progress, train
from pipelines.wake.hooks import Hook, HookCosts
from pipelines.wake.learner import Checkpoint, Learner
from pipelines.wake.report import LearnerReport
from pipelines.wake.writes import no_offset, wake_flops


@dataclass(frozen=True)
class HeldRelease:
    """A release in memory."""

    weights: Weights
    offset: Weights
    fact: ReleaseFact
    trainer: Optional[HeldState] = None
    """What the round that made it left behind."""
    dreams: Tuple[Record, ...] = ()


class MemoryHost:
    """Keeps a learner's things in memory (`pipelines.wake.learner.LearnerHost`)."""

    def __init__(self, store: MemoryStore, releases: Dict[int, HeldRelease]) -> None:
        self.store, self.releases = store, releases
        self.pins: Dict[str, Weights] = {}
        self.kept: Optional[Checkpoint] = None

    def append(self, records: List[Record], cursor: Dict[str, Any]) -> Callable[[], int]:
        """Store records; in memory they are there at once."""
        version = self.store.append(records)
        return lambda: version

    def experience(self) -> MemorySnapshot:
        """The newest version of the store."""
        return self.store.at()

    def pin(self, file: str, tensors: Dict[str, Tensor]) -> None:
        """Keep what a mark pins, once."""
        self.pins.setdefault(file, {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()})

    def release(self, number: int) -> Tuple[Weights, Weights]:
        """(weights, offsets) of a release."""
        found = self.releases[number]
        return found.weights, found.offset

    def save(self, tokens: int, checkpoint: Checkpoint) -> None:
        """Keep the newest checkpoint."""
        tensors, meta = checkpoint
        kept = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
        self.kept = kept, copy.deepcopy(meta)

    def newest(self) -> Optional[Checkpoint]:
        """A copy of the newest checkpoint: a learner that begins there writes in place, and may die again."""
        if self.kept is None:
            return None
        tensors, meta = self.kept
        return {name: tensor.clone() for name, tensor in tensors.items()}, copy.deepcopy(meta)


class LocalHost:
    """Where a round runs in one process (`pipelines.sleep.round.Host`).

    Args:
        folder: for what is read by memory map while a round lasts (stored guides).
    """

    def __init__(self, cfg: Config, data: DataModule, folder: Path, device: Optional[torch.device] = None) -> None:
        self.cfg, self.data, self.folder = cfg, data, folder
        self.place, self.device = Place(), device or resolve_device(cfg.compute.device)
        self.dreamt: Tuple[Record, ...] = ()
        """Dreams of the last round."""

    def build_model(self) -> NestedLM:
        """A model of the run's shape on the device."""
        return NestedLM(self.cfg.model, self.cfg.levels, self.data.tokenizer.vocab_size).to(self.device)

    def build_engine(
        self,
        model: NestedLM,
        optimizer: OptimizerConfig,
        batch: int,
        frozen: Iterable[str],
        state: Optional[TrainingState],
    ) -> Engine:
        """An engine in this process."""
        return LocalEngine(model, optimizer, self.cfg.pool.passes(batch), frozen, state)

    def dream(self, pinned: Pinned, awake: NestedLM) -> DreamShare:
        """This round's dreams."""
        self.dreamt = ()
        if not self.cfg.dreams.share or not pinned.plan.steps:
            return DreamShare()
        plan, found = pinned.plan, pinned.experience
        night = dream(awake, found, plan, self.cfg.dreams, self.cfg.compute.precision)
        self.dreamt = tuple(to_records(night, found, plan))
        record = night_record(night, found, plan.dreams_stored, self.data.tokenizer.decode)
        return DreamShare(night.tokens(found.context), record, night.passes)

    def store_guides(self, pinned: Pinned, rows: np.ndarray, teacher: NestedLM) -> Tuple[StoredGuides, int]:
        """The teacher's guides of some rows, read by memory map."""
        path = self.folder / "guides.arrow"
        settings = (self.cfg.sleep.top_k, self.cfg.compute.precision)
        tokens = write_guides(path, teacher, pinned.experience, rows, *settings)
        stored = StoredGuides([path])
        path.unlink()  # what is mapped stays readable
        return stored, tokens

    def resume(self, plan: RoundPlan) -> Optional[Resume]:
        """A process alone repeats a round from its start."""
        return None

    def after_step(self, engine: Engine, task: Task, progress: Progress, loss: float) -> None:
        """Nobody looks."""

    def keep(self, engine: Engine, steps: int) -> HeldState:
        """What the next round carries on."""
        return HeldState.of(engine, weights=self.cfg.sleep.carry == "trainer")


@dataclass
class _Made:
    """A candidate that was judged, before it is published or discarded."""

    candidate: Candidate
    dreams: Tuple[Record, ...] = ()


@dataclass
class LocalParts:
    """What a simulated run drives (`pipelines.machine.simulated.Parts`).

    Weights of release 0 are given, or pretrained here at the first start.
    """

    cfg: Config
    """With its budget spread (pipelines/wake/writes.py)."""
    data: DataModule
    base: Optional[Weights] = None
    """Weights of release 0 by parameter name; None: pretrain them."""
    hook: Optional[Hook] = None
    """What an opponent adds to training, where the learner trains every level."""
    releases: Dict[int, HeldRelease] = field(default_factory=dict)
    made: Dict[int, _Made] = field(default_factory=dict)
    """Candidates by the attempt that made them."""

    def __post_init__(self) -> None:
        self.store = MemoryStore(self.cfg.model.context, self.data.tokenizer.dtype)
        self.memory = MemoryHost(self.store, self.releases)
        self._folder = tempfile.TemporaryDirectory(prefix="circadian-")
        self.host = LocalHost(self.cfg, self.data, Path(self._folder.name))
        self.judge = Judge(self.data.probes(), self.cfg)
        self.sequences = base_sequences(self.data.corpus, self.data.tokenizer, self.cfg, self.data.base_sources)
        self.learner: Optional[Learner] = None

    @property
    def rules(self) -> Rules:
        """What the machine that drives these parts knows of the configuration."""
        cfg, data, vocab = self.cfg, self.data, self.data.tokenizer.vocab_size
        costs = self.hook.costs(cfg, vocab) if self.hook is not None else HookCosts()
        return Rules.of(cfg, tuple(data.sources), tuple(data.base_sources), wake_flops(cfg, vocab, costs))

    # Release 0 and the store.

    def newest(self) -> Optional[ReleaseFact]:
        """The newest release."""
        return self.releases[max(self.releases)].fact if self.releases else None

    def prepare_base(self) -> Tuple[int, float]:
        """Release 0: as given, or pretrained now. Sequences of the base mixture, and FLOPs spent."""
        if 0 not in self.releases:
            model = self.host.build_model()
            weights = self.base if self.base is not None else pretrain(self.cfg, self.host, self.sequences)
            self.releases[0] = HeldRelease(weights, no_offset(model, self.cfg, weights), ReleaseFact(0, -1, 0))
        return len(self.sequences), 0.0

    def score_base(self) -> Dict[str, float]:
        """Bits per byte of release 0 by source."""
        model = self.host.build_model()
        load_into(model, self.releases[0].weights)
        return score(model, self.judge.reported, self.data.sources, self.cfg.compute.precision)

    def start_service(self) -> None:
        """The store is there."""

    def store_base(self) -> None:
        """Store the base mixture, once."""
        self.store.append(base_records(self.sequences))

    def store_dreams(self, release: int) -> None:
        """Store a release's dreams, each once."""
        self.store.append(self.releases[release].dreams)

    # The learner.

    def restore(self) -> LearnerReport:
        """A new learner at its newest checkpoint."""
        self.learner = Learner(self.cfg, self.data, self.memory, self.hook)
        return self.learner.restore()

    def advance(self, steps: int, until: Optional[int]) -> LearnerReport:
        """Let the learner take steps."""
        return self._learner().advance(steps, until)

    def finish(self) -> LearnerReport:
        """Pin what came since the last mark, and checkpoint."""
        return self._learner().finish()

    def adopt(self, release: int, not_before: int, at_once: bool) -> LearnerReport:
        """Tell the learner of a release."""
        return self._learner().adopt(release, not_before, at_once)

    def stop(self) -> LearnerReport:
        """Have the learner checkpoint and end."""
        learner = self._learner()
        learner.stopping = True
        return learner.advance(0)

    def _learner(self) -> Learner:
        assert self.learner is not None, "the machine starts a learner before it asks one"
        return self.learner

    # Rounds.

    def run_round(self, start: do.StartRound) -> RoundRecord:
        """Train and judge a candidate."""
        plan, live = start.plan, self.releases[start.plan.anchor]
        carried = live.trainer if self.cfg.sleep.carry != "nothing" else None
        pins = self.memory.pins[plan.fast]
        pinned = Pinned(plan, self.store.at(plan.snapshot), live.weights, live.offset, pins, carried)
        found = run_round(pinned, self.host, self.host.keep)
        probed = list(start.best)
        verdict = judge_candidate(self.judge, found, plan.anchor, probed, self.host)
        storage = _storage(found, {n: release.weights for n, release in self.releases.items()})
        evidence = gather_evidence([verdict], storage, start.seen, start.best, self.cfg.run.seed)
        decision = decide(evidence, self.cfg.gate)
        self.made[start.attempt] = _Made(found, self.host.dreamt)
        forward = forward_flops(self.cfg.model, self.cfg.levels, self.data.tokenizer.vocab_size)
        return replace(
            RoundRecord.judged(plan, decision),
            fingerprint=_fingerprint(found.weights),
            row=verdict.row,
            loss=found.loss,
            flops=found.flops + verdict.tokens * forward,
            optimizer_bytes=(found.optimizer_bytes,),
            backend="local",
            trainer=found.trainer,
            dreams=found.dreams,
        )

    def publish(self, attempt: int, record: RoundRecord) -> None:
        """Make a candidate the release that its record names."""
        assert record.release is not None
        made = self.made.pop(attempt)
        candidate, number = made.candidate, record.release
        fact = ReleaseFact(number, self._last_key(record), record.tokens, record.fingerprint, record)
        self.releases[number] = HeldRelease(candidate.weights, candidate.offset, fact, candidate.left, made.dreams)
        for old in [n for n in self.releases if n < number - 1]:  # nobody goes back further than a learner's checkpoint
            if old != 0 and (self.memory.kept is None or old < int(self.memory.kept[1]["release"])):
                self.releases[old] = replace(self.releases[old], trainer=None)

    def _last_key(self, record: RoundRecord) -> int:
        return record.tokens // self.cfg.model.context - 1

    def discard(self, attempt: int, release: int) -> None:
        """Remove a candidate."""
        self.made.pop(attempt, None)

    def unpin(self, tokens: int, keep: Sequence[str]) -> None:
        """Remove pinned weights that no round waits for."""
        for file in list(self.memory.pins):
            if file not in keep and int(Path(file).name.split("-")[1]) <= tokens:
                del self.memory.pins[file]

    def train_controls(self, flops_per_token: float) -> List[on.ControlTrained]:
        """A simulated run has no controls: a control is a simulated run."""
        return []

    def lose(self, part: str) -> None:
        """A part died: what it had in memory is gone."""
        if part == on.LEARNER:
            self.learner = None
        if part == on.POOL:
            self.made.clear()
            self.judge.known.clear()


def pretrain(cfg: Config, host: LocalHost, sequences: Sequence[Any]) -> Weights:
    """A base from scratch, as the pool pretrains one."""
    model = host.build_model().reset_parameters(cfg.run.seed)
    base = Pretraining.of(cfg, list(sequences), model)
    engine = host.build_engine(model, base.optimizer, base.batch, base.frozen, None)
    precision = cfg.compute.precision
    train(engine, TrueTokens(), base.batches, base.schedule, host.device, precision=precision, place=ALONE)
    return dict(engine.weights())


def _fingerprint(weights: Weights) -> str:
    return weights_fingerprint(join(weight={name: tensor_digest(tensor) for name, tensor in weights.items()}))


@dataclass(frozen=True)
class _Claim:
    file: str
    sha256: str
    tensors: List[str]


def _storage(found: Candidate, releases: Dict[int, Weights]) -> Storage:
    """A candidate in memory as the gate sees one on disk: whole, and compared with the releases before it."""
    tensors = join(weight=found.weights, offset=found.offset)
    facts = {name: TensorFacts.of(tensor) for name, tensor in tensors.items()}
    wanted = {name: TensorFacts(fact.shape, fact.dtype) for name, fact in facts.items()}
    newest = max(releases)
    same = {_fingerprint(releases[newest]): newest}
    return Storage(
        "",
        [_Claim("memory", "memory", sorted(tensors))],
        [ShardFacts("memory", "memory", 0, 1, "", facts)],
        wanted,
        same,
    )
