"""Dreams for people: the record of a round's dreams, their part of summary.json, and their part of the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pipelines.dreams.dream import Night
from pipelines.experience.replay import Experience

SHOWN = 3
"""Dreams of a round whose text is kept in its record."""
_IN_REPORT = 12


def night_record(
    night: Night, snapshot: Experience, stored: int, decode: Callable[[np.ndarray], str]
) -> dict[str, Any]:
    """A round's dreams as its record keeps them.

    Args:
        stored: dreams that earlier rounds left in the store.
        decode: tokens to text.
    """
    samples = []
    for one in night.dreams[:SHOWN]:
        rows = np.concatenate([snapshot.rows_between(key, key) for key in one.parents])
        sources = [snapshot.sources[code] for code in snapshot.source_ids[rows]]
        samples.append(
            {
                "prompt": decode(one.tokens[: one.prompt]),
                "text": decode(one.tokens[one.prompt :]),
                "parents": [{"key": key, "source": name} for key, name in zip(one.parents, sources, strict=True)],
                "way": one.way,
                "surprise": one.surprise,
                "score": one.score,
                "reward": one.reward,
            }
        )
    return {
        "generated": night.generated,
        "kept": len(night.dreams),
        "rejected": night.rejected,
        "stored": stored + len(night.dreams),
        "seconds": night.seconds,
        "samples": samples,
    }


def dream_summary(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """`dreams` of summary.json: counts over all rounds, and the samples of each; None where no round dreamt."""
    nights = [(item["id"], item["dreams"]) for item in rounds if item.get("dreams")]
    if not nights:
        return None
    rejected: Counter[str] = Counter()
    for _, night in nights:
        rejected.update(night["rejected"])
    return {
        "generated": sum(night["generated"] for _, night in nights),
        "kept": sum(night["kept"] for _, night in nights),
        "rejected": dict(sorted(rejected.items())),
        "seconds": sum(night["seconds"] for _, night in nights),
        "samples": [{"round": number, **sample} for number, night in nights for sample in night["samples"]],
    }


def dream_section(summary: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the report's page shows of dreams; None where there were none.

    facts: (figure, what it says). dreams: some of them, spread over the rounds.
    """
    dreams = summary.get("dreams")
    if not dreams:
        return None
    facts = [(f"{dreams['generated']:,}", "dreams generated"), (f"{dreams['kept']:,}", "kept and trained on")]
    facts += [(f"{count:,}", f"sorted out: {reason}") for reason, count in dreams["rejected"].items()]
    samples = dreams["samples"]
    shown = (
        [samples[i * len(samples) // _IN_REPORT] for i in range(_IN_REPORT)] if len(samples) > _IN_REPORT else samples
    )
    return {"facts": facts, "dreams": [_shown(sample) for sample in shown]}


def _shown(sample: Mapping[str, Any]) -> dict[str, Any]:
    figures = f"loss {sample['surprise']:.2f}, score {sample['score']:.3g}"
    if sample.get("reward") is not None:
        figures += f", reward {sample['reward']:.2g}"
    return {
        "round": sample["round"],
        "prompt": sample["prompt"],
        "text": sample["text"],
        "parents": ", ".join(f"{parent['source']} {parent['key']}" for parent in sample["parents"]),
        "way": sample["way"],
        "figures": figures,
    }
