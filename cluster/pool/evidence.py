"""A candidate as files: what its writers claim, what others read back, and who it says it is."""

from __future__ import annotations

import hashlib
import json
from typing import Sequence

from cluster.storage.releases import Releases, Shard, layout
from pipelines.gate.evidence import ShardFacts, Storage
from pipelines.sleep.plan import RoundPlan


def candidate_identity(plan: RoundPlan, anchor: str) -> str:
    """Hash of what a candidate is made of; `anchor` is its anchor's fingerprint. The store's version is left out: it
    counts how often the store was opened."""
    parts = {key: value for key, value in plan.to_json().items() if key != "snapshot"}
    return hashlib.sha256(json.dumps([parts, anchor], sort_keys=True).encode()).hexdigest()


def gather_storage(
    releases: Releases, plan: RoundPlan, shards: Sequence[Shard], found: Sequence[ShardFacts]
) -> Storage:
    """A candidate as files: what its writers say, what was read back, and what a release of this run holds."""
    past = [releases.read(number) for number in releases.numbers()]
    return Storage(
        identity=candidate_identity(plan, releases.read(plan.anchor).fingerprint),
        claims=shards,
        found=found,
        wanted=layout(releases.directory(plan.anchor)),
        releases={release.weights: release.number for release in reversed(past) if release.shards[0].digests},
    )
