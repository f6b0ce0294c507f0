"""The configuration of a run: frozen dataclasses, a line of doc per field, cross-checks when built."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Dict, List, Optional

from nl_model.checks import above, at_least, one_of, share, within
from nl_model.config import LevelConfig, ModelConfig, OptimizerConfig, check_levels, in_tokens
from pipelines.config.dreams import DreamConfig
from pipelines.config.gate import GateConfig
from pipelines.config.paths import from_home
from pipelines.config.places import FailureConfig, RayConfig, TrackingConfig
from pipelines.config.pool import PoolConfig
from pipelines.config.sleep import SleepConfig
from pipelines.config.when import WhenConfig

SCHEDULES = ("sequential", "mixed", "soft")
WRITES = ("fast", "none", "all")
MOST_RECALL = 1 << 30
LARGEST_SEED = (1 << 31) - 1
"""What every generator of random numbers takes."""
SHIPPED_SOURCE_BYTES = 65536
"""Bytes of each source of the installation's own texts that are streamed where nothing is said."""
TOKENIZERS = ("byte", "bpe")


@dataclass(frozen=True)
class RunSection:
    """Which run this is."""

    name: str = "default"
    """Directory of the run below run.root; the same name again continues the run."""
    root: str = "runs"
    """Folder that holds run directories, cached bases and the MLflow database."""
    seed: int = 0
    """Seed of initial weights, schedules and samplers, from 0."""
    deterministic: bool = False
    """Adopt releases at fixed stream positions (the learner then waits for them), so that reruns are bit-equal."""
    lag: float = 1.0
    """Periods of the pool's fastest level between a mark and the adoption of its release, where deterministic. 1: the
    pool works beside the learner. 0: the learner waits for every round, and nothing is ever behind."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", from_home("run.root", self.root))
        within("run.seed", self.seed, 0, LARGEST_SEED)
        at_least("run.lag", self.lag, 0)
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise ValueError(f"run.name={self.name!r} must be a plain folder name")


@dataclass(frozen=True)
class TokenizerConfig:
    """How text becomes tokens."""

    kind: str = "byte"
    """byte: one token per UTF-8 byte. bpe: byte-pair encoding, loaded from path or trained on the first sources."""
    vocab_size: int = 4096
    """Vocabulary of a trained bpe (ignored by byte)."""
    path: Optional[str] = None
    """A tokenizer.json of the tokenizers library to load instead of training one (bpe only)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", from_home("tokenizer.path", self.path))
        one_of("tokenizer.kind", self.kind, TOKENIZERS)
        at_least("tokenizer.vocab_size", self.vocab_size, 257)


@dataclass(frozen=True)
class StreamConfig:
    """The stream: named sources, read once, in an order that a schedule decides."""

    path: Optional[str] = None
    """Directory or glob of .txt, .md, .jsonl, .parquet files; empty: texts that this installation brings along."""
    sources: List[str] = field(default_factory=list)
    """Names of the sources in stream order; empty: every source found, by name (base sources excepted)."""
    schedule: str = "sequential"
    """sequential: one source after the other. mixed: all at once. soft: neighbours overlap by stream.transition."""
    transition: int = 65536
    """Tokens over which a soft schedule moves from one source to the next."""
    max_source_bytes: int = -1
    """Most bytes streamed per source; 0: no limit. -1: 65536 of the installation's texts, all of your own."""
    probe_bytes: int = 8192
    """Held-out bytes per source used as its probe."""
    text_field: str = "text"
    """Column or key that holds the text in Parquet and JSONL."""
    source_field: str = "source"
    """Column or key that names the source in Parquet and JSONL; where absent, the file's name is the source."""
    max_document_bytes: int = 1_000_000
    """Documents longer than this are quarantined."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", from_home("stream.path", self.path))
        one_of("stream.schedule", self.schedule, SCHEDULES)
        at_least("stream.transition", self.transition, 1)
        at_least("stream.max_source_bytes", self.max_source_bytes, -1)
        at_least("stream.probe_bytes", self.probe_bytes, 1)
        at_least("stream.max_document_bytes", self.max_document_bytes, 1)

    @property
    def limit(self) -> int:
        """Most bytes streamed per source, decided; 0: no limit."""
        if self.max_source_bytes >= 0:
            return self.max_source_bytes
        return 0 if self.path else SHIPPED_SOURCE_BYTES


@dataclass(frozen=True)
class BaseConfig:
    """What the run starts from: a release directory, or a base it first pretrains itself and caches."""

    checkpoint: Optional[str] = None
    """A release directory to start from; empty: pretrain a base on base.sources."""
    sources: List[str] = field(default_factory=list)
    """Sources of the base mixture, which is pretrained on, probed, and replayed asleep; empty: the first two of the
    stream. With base.checkpoint: text of what the checkpoint knows, probed and replayed; empty: none of it is."""
    max_source_bytes: int = 0
    """Bytes of each base source that are read, all of them held in memory; 0: as many as of the stream's."""
    tokens: int = 393216
    """Tokens of base pretraining, over repeated passes of the mixture; 0: the base is not trained."""
    batch: int = 8
    """Sequences per step of base pretraining over all ranks together: a pool of another size makes the same base."""
    lr: float = 3e-3
    """Peak step size of base pretraining."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "checkpoint", from_home("base.checkpoint", self.checkpoint))
        at_least("base.max_source_bytes", self.max_source_bytes, 0)
        at_least("base.tokens", self.tokens, 0)
        at_least("base.batch", self.batch, 1)
        above("base.lr", self.lr, 0)


@dataclass(frozen=True)
class WakeConfig:
    """The awake phase."""

    batch: int = 16
    """Sequences per wake step. 0, where writes=all: as many as one write on sleep.batch sequences takes, so that the
    learner's writes are as large as the pool's, whatever the budget."""
    writes: str = "fast"
    """What the learner writes: fast (its own levels), none (it only reads, the pool learns), or all (every level, as
    one trainer on new and replayed text; the pool then trains nothing and publishes what the learner is)."""
    decay: float = 0.02
    """Share of what the learner's levels differ from the release's rest by that every write takes back
    (writes=fast)."""
    trained: float = 1.0
    """Tokens trained on per token streamed, replayed ones included (writes=all; decided by sleep.epochs where
    given); 0: none."""
    replay: float = 0.0
    """Share of replayed text in what is trained on (writes=all)."""
    checkpoint_every: int = 32
    """Wake steps between checkpoints of the learner (a resume replays at most this many)."""
    recall: int = 131072
    """Contexts of each of some lengths of which the learner remembers what followed, to read with (nl_model/recall.py):
    a power of two, 0 for none. The online loss is reported with and without; nothing is trained on it."""

    def __post_init__(self) -> None:
        one_of("wake.writes", self.writes, WRITES)
        at_least("wake.batch", self.batch, 0)
        if not self.batch and self.writes != "all":
            raise ValueError(
                f"wake.batch=0 follows sleep.batch only where wake.writes=all; wake.writes={self.writes} needs a number"
            )
        share("wake.decay", self.decay)
        at_least("wake.trained", self.trained, 0)
        share("wake.replay", self.replay)
        at_least("wake.recall", self.recall, 0)
        if self.recall > MOST_RECALL or self.recall & (self.recall - 1):
            fitting = min(MOST_RECALL, 1 << self.recall.bit_length() - 1)
            raise ValueError(
                f"wake.recall={self.recall} is no power of two up to {MOST_RECALL}; use {fitting}, or 0 for none"
            )
        at_least("wake.checkpoint_every", self.checkpoint_every, 1)


@dataclass(frozen=True)
class StoreConfig:
    """The experience store."""

    segment_rows: int = 2048
    """Rows after which a segment is sealed."""
    commit_bytes: int = 1 << 20
    """Bytes of queued rows that force a group commit at once."""
    checkpoint_every: int = 64
    """Commits between full checkpoints of the manifest (opening replays at most this many)."""
    verify_bytes: int = 256 << 20
    """Newest bytes of the store whose checksums are verified before a run is continued; 0: none."""

    def __post_init__(self) -> None:
        for key in ("segment_rows", "commit_bytes", "checkpoint_every"):
            at_least(f"store.{key}", getattr(self, key), 1)
        at_least("store.verify_bytes", self.verify_bytes, 0)


@dataclass(frozen=True)
class ControlConfig:
    """The controls: simulated runs of other strategies from the same base, on the same stream, for the same FLOPs."""

    enabled: str = "auto"
    """Train controls after the stream has ended: true, false, or auto (for shipped text only: every trial costs as much
    as the run itself)."""
    strategies: List[str] = field(default_factory=lambda: ["replay", "naive"])
    """Strategies that the run is held against (pipelines/config/strategies), each tuned over the step size."""
    learning_rates: List[float] = field(default_factory=list)
    """Step sizes that each of them tries; empty: half, once and twice base.lr. While the best one is at an edge of what
    was tried, another beyond it is."""
    most: int = 5
    """Most step sizes that each of them tries."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "enabled", str(self.enabled).lower())  # YAML's booleans come as such
        one_of("control.enabled", self.enabled, ("auto", "true", "false"))
        at_least("control.most", self.most, 1)
        if self.enabled == "true" and not self.strategies:
            raise ValueError("control.strategies is empty; name some to be held against, or give control.enabled=false")
        twice = [name for name in self.strategies if self.strategies.count(name) > 1]
        if twice:
            raise ValueError(f"control.strategies names {twice[0]!r} twice; name it once")
        wrong = [rate for rate in self.learning_rates if not 0 < rate < math.inf]
        if wrong:
            raise ValueError(f"control.learning_rates has {wrong[0]:g}; give step sizes above 0 that are finite")

    def grid(self, lr: float) -> List[float]:
        """Step sizes to begin with.

        Args:
            lr: base.lr.
        """
        return sorted(set(self.learning_rates)) or [lr / 2, lr, 2 * lr]


@dataclass(frozen=True)
class ReportConfig:
    """What a run measures of itself, for people alone: no decision sees it, and its FLOPs are not counted."""

    look_every: int = 0
    """Tokens between two looks: the served model (live release and fast levels as they stand) and the release alone are
    measured on all sources seen so far. 0: none."""
    sequences: int = 32
    """Held-out sequences per source that rows of the matrix and looks are made of, spread evenly; 0: all there are. The
    last look reads all of them in any case."""

    def __post_init__(self) -> None:
        at_least("report.look_every", self.look_every, 0)
        at_least("report.sequences", self.sequences, 0)


@dataclass(frozen=True)
class ComputeConfig:
    """Where and in which precision to compute."""

    device: str = "auto"
    """cpu, cuda, or auto (cuda where there is one)."""
    precision: str = "fp32"
    """fp32 or bf16 (autocast; slower than fp32 on a CPU without AVX512-BF16)."""
    threads: int = 1
    """CPU threads per process."""
    compile: bool = False
    """Run the model through torch.compile (pays for runs above a few minutes; needs a C++ compiler on a CPU)."""

    def __post_init__(self) -> None:
        one_of("compute.device", self.device, ("auto", "cpu", "cuda"))
        one_of("compute.precision", self.precision, ("fp32", "bf16"))
        at_least("compute.threads", self.threads, 1)


def _default_levels() -> Dict[str, LevelConfig]:
    return {
        "fast": LevelConfig(period=2048, width=192, optimizer=OptimizerConfig(lr=1e-3)),
        "medium": LevelConfig(period=4096, width=192, optimizer=OptimizerConfig(lr=1e-3)),
        "slow": LevelConfig(period=32768, width=384, blocks="all", owner="pool"),
    }


@dataclass(frozen=True)
class Config:
    """Everything a run is decided by. Built by pipelines.config.load.load_config from YAML and key=value overrides."""

    strategy: str = "circadian"
    """What the run does: the name of shipped keys (pipelines/config/strategies) that lie under those given here."""
    run: RunSection = field(default_factory=RunSection)
    model: ModelConfig = field(default_factory=ModelConfig)
    levels: Dict[str, LevelConfig] = field(default_factory=_default_levels)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    base: BaseConfig = field(default_factory=BaseConfig)
    wake: WakeConfig = field(default_factory=WakeConfig)
    when: WhenConfig = field(default_factory=WhenConfig)
    sleep: SleepConfig = field(default_factory=SleepConfig)
    dreams: DreamConfig = field(default_factory=DreamConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    pool: PoolConfig = field(default_factory=PoolConfig)
    control: ControlConfig = field(default_factory=ControlConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    failures: FailureConfig = field(default_factory=FailureConfig)
    ray: RayConfig = field(default_factory=RayConfig)

    def __post_init__(self) -> None:
        if self.trains_controls and len(self.control.grid(self.base.lr)) > self.control.most:
            raise ValueError(
                f"control.most={self.control.most} is less than the {len(self.control.grid(self.base.lr))} step sizes "
                "to begin with; raise it, or give fewer control.learning_rates"
            )
        if self.run.deterministic:
            self.when.check_deterministic()
        # Decided here, not in its section: a default that was built before it knew its path must not pass for a choice.
        object.__setattr__(self, "stream", replace(self.stream, max_source_bytes=self.stream.limit))
        if not self.wake.batch:
            object.__setattr__(self, "wake", replace(self.wake, batch=self._read_per_write()))
        step_tokens = self.wake.batch * self.model.context
        # From here on every period counts tokens.
        object.__setattr__(self, "levels", in_tokens(self.levels, step_tokens))
        check_levels(self.levels, self.model.blocks)
        for name, level in self.levels.items():
            if level.period % step_tokens:
                raise ValueError(
                    f"levels.{name}.period={level.period} is not a multiple of one wake step "
                    f"(wake.batch={self.wake.batch} x model.context={self.model.context} = {step_tokens} tokens)"
                )
        self.pool.check(self.sleep.batch, self.base.batch, self.compute.precision)
        self.pool.check_optimizer(self.sleep.optimizer.name)
        self.sleep.check_on_policy(self.model.context, self.pool.zero_stage)
        if self.base.checkpoint is None and self.base.tokens == 0 and self.base.sources:
            raise ValueError("base.tokens=0 leaves base.sources unused; drop them or give base.tokens")

    @property
    def base_source_bytes(self) -> int:
        """Most bytes read of each base source, decided; 0: no limit."""
        return self.base.max_source_bytes or self.stream.limit

    @property
    def pool_period(self) -> int:
        """Tokens of the stream between two rounds: the period of the pool's fastest level."""
        return min(level.period for level in self.levels.values() if level.owner == "pool")

    @property
    def trains_controls(self) -> bool:
        """Whether controls are trained once the stream has ended."""
        control = self.control
        shipped = control.enabled == "auto" and not self.stream.path
        return bool(control.strategies) and (control.enabled == "true" or shipped)

    def _read_per_write(self) -> int:
        """Sequences that are read while `sleep.batch` are trained on: no more than that, and periods are multiples."""
        trained = max(1.0, self.sleep.epochs or self.wake.trained)
        most = max(1, int(self.sleep.batch / trained))
        periods = [level.period for level in self.levels.values() if level.unit == "tokens"]
        fits = [n for n in range(1, most + 1) if not any(period % (n * self.model.context) for period in periods)]
        return max(fits, default=1)
