"""Dark experience replay (DER++): replayed text is learned with what the model said when it read it first.

Buzzega et al., 2020 (arXiv 2004.07211). Beside a stored token stand the log-probabilities of its most likely
successors, as float16 with int16 ids; the loss of replayed text is (1 - weight) nll + weight KL(stored || new), all
other tokens being one bucket. Text of the base was read before there was anyone to store that: it is replayed plainly.

Shapes: T predicted tokens, K log-probabilities.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Callable, Dict, Mapping, Tuple

import numpy as np
import torch
from torch import Tensor

from nl_model.checks import at_least, share
from nl_model.distillation import TopK, distillation, forward_kl, top_k
from nl_model.model import NestedLM
from pipelines.config.schema import Config
from pipelines.experience.replay import Experience, held_rows
from pipelines.sleep.engine import LocalEngine
from pipelines.sleep.training import Batch
from pipelines.wake.hooks import HookCosts, NoHook

BYTES = 4
"""Of one log-probability and its id."""


@dataclass
class Der(NoHook):
    """The hook. Its store goes with the replay's: what that holds is a function of keys, so is what stays here."""

    weight: float = 0.3
    """Share of the stored distribution in the loss of replayed text."""
    top: int = 8
    """Log-probabilities per token."""
    stored: Dict[int, Tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)
    """Ids int16 (T, K) and log-probabilities float16 (T, K) by key."""

    def __post_init__(self) -> None:
        share("hook.weight", self.weight)
        at_least("hook.top", self.top, 1)

    def costs(self, cfg: Config, vocab_size: int) -> HookCosts:
        """No pass of its own; bytes beside every token."""
        return HookCosts(stored=float(BYTES * min(self.top, vocab_size)))

    def attach(self, model: NestedLM, cfg: Config, experience: Callable[[], Experience]) -> float:
        """Nothing is stored yet."""
        assert model.vocab_size <= 1 << 16, "ids take two bytes"
        self.stored = {}
        self.seed = cfg.run.seed
        self.most = cfg.sleep.replay_bytes // cfg.model.context if cfg.sleep.replay_bytes else None
        return 0.0

    def scored(self, batch: Batch, logits_BTV: Tensor) -> None:
        """Store what the model says of new text."""
        found = top_k(logits_BTV, self.top)
        # int16 holds 65536 ids: what lies above 32767 comes back from below zero.
        ids, logs = found.ids_TK.to(torch.int16).cpu(), found.log_p_TK.half().cpu()
        self.stored.update({int(key): (ids[i], logs[i]) for i, key in enumerate(batch.keys_B)})

    def loss(self, nll_BT: Tensor, logits_BTV: Tensor, batch: Batch) -> Tensor:
        """Truth; on replayed text that was read in the stream also what was said of it."""
        old = (~batch.recent_B).cpu().numpy()
        rows = [i for i, key in enumerate(batch.keys_B.tolist()) if old[i] and key in self.stored]
        if not rows:
            return nll_BT
        device, parts = logits_BTV.device, [self.stored[int(batch.keys_B[i])] for i in rows]
        ids_BTK = torch.stack([ids for ids, _ in parts]).long().to(device) % (1 << 16)
        # To float32 first: autocast on the CPU stacks no halves.
        logs_BTK = torch.stack([logs.float() for _, logs in parts]).to(device)
        tail_BT = torch.log1p(-logs_BTK.exp().sum(-1).clamp_max(1.0 - 1e-6))
        pull_BT = forward_kl(logits_BTV[rows], TopK(ids_BTK, logs_BTK, tail_BT))
        loss_BT = nll_BT.clone()
        loss_BT[rows] = distillation(nll_BT[rows], pull_BT, self.weight)
        return loss_BT

    def boundary(self, engine: LocalEngine) -> float:
        """Forget what replay does not hold any more; the base's text has a share in its bound."""
        if self.most is not None and len(self.stored) > self.most:
            keys = np.array(sorted(self.stored), np.int64)
            held = held_rows(np.arange(len(keys)), keys, self.most, self.seed)
            self.stored = {key: self.stored[key] for key in keys[held].tolist()}
        return 0.0

    def state(self) -> Dict[str, Tensor]:
        """Keys, ids and log-probabilities."""
        keys = sorted(self.stored)
        if not keys:
            return {}
        ids, logs = zip(*(self.stored[key] for key in keys), strict=True)
        return {"keys": torch.tensor(keys), "ids": torch.stack(ids), "logs": torch.stack(logs)}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take them over."""
        self.stored = {}
        if tensors:
            parts = zip(tensors["keys"].tolist(), tensors["ids"].cpu(), tensors["logs"].cpu(), strict=True)
            self.stored = {key: (ids, logs) for key, ids, logs in parts}
