"""Dreams in a round: rank 0 dreams and leaves a file beside the candidate, every rank trains on it.

A promoted candidate's file becomes part of its release; the experience service copies it into the store before the
coordinator notes the round as settled. So a crash at any point repeats what it must: the same plan gives the same
dreams, and their keys depend on round and number alone, so that none comes twice.
"""

from __future__ import annotations

from pathlib import Path
from typing import Tuple

import numpy as np
import torch

from nl_model.model import NestedLM
from pipelines.config.schema import Config
from pipelines.data.tokens import Tokenizer
from pipelines.dreams.dream import dream, to_records
from pipelines.dreams.file import read_dreams, write_dreams
from pipelines.dreams.report import night_record
from pipelines.experience import Snapshot
from pipelines.sleep.plan import RoundPlan
from pipelines.sleep.round import DreamShare


def dream_together(
    cfg: Config,
    plan: RoundPlan,
    snapshot: Snapshot,
    awake: NestedLM,
    directory: Path,
    tokenizer: Tokenizer,
    place: Tuple[int, int],
) -> DreamShare:
    """Dream on rank 0, and give every rank the dreams. All ranks must call it.

    Args:
        directory: the candidate's, seen by all ranks.
        place: (rank, number of ranks).
    """
    rank, world = place
    record, passes = None, 0.0
    if rank == 0:
        night = dream(awake, snapshot, plan, cfg.dreams, cfg.compute.precision)
        write_dreams(directory, to_records(night, snapshot, plan), snapshot.context, tokenizer.dtype)
        record, passes = night_record(night, snapshot, plan.dreams_stored, tokenizer.decode), night.passes
    if world > 1:
        torch.distributed.barrier()
    rows = [one.tokens for one in read_dreams(directory)]
    tokens = np.stack(rows) if rows else np.empty((0, snapshot.context + 1), np.int64)
    return DreamShare(tokens, record, passes)
