"""The experience store: one writer appends and commits, any number of readers open snapshots and draw from them."""

from pipelines.experience.disk import ConflictError, StoreFullError, SyncError
from pipelines.experience.sampler import Recency, Sampler, Surprise, Uniform, build_sampler
from pipelines.experience.schema import DREAM_KEY, DREAM_SOURCE, KINDS, Record, dream_key, make_schema, records_to_batch
from pipelines.experience.snapshot import Snapshot
from pipelines.experience.store import ExperienceStore
from pipelines.experience.verify import SegmentInfo, VerifyReport, list_store, verify, verify_recent

__all__ = [
    "DREAM_KEY",
    "DREAM_SOURCE",
    "KINDS",
    "ConflictError",
    "ExperienceStore",
    "Recency",
    "Record",
    "Sampler",
    "SegmentInfo",
    "Snapshot",
    "StoreFullError",
    "Surprise",
    "SyncError",
    "Uniform",
    "VerifyReport",
    "build_sampler",
    "dream_key",
    "list_store",
    "make_schema",
    "records_to_batch",
    "verify",
    "verify_recent",
]
