"""Elastic weight consolidation: a quadratic pull to earlier weights, each as strong as that weight mattered.

Kirkpatrick et al., 2017 (arXiv 1612.00796); summed over the past as online EWC does (Schwarz et al., 2018, arXiv
1805.06370). The loss gains strength / 2 * sum_i F_i (w_i - w*_i)^2, F the diagonal of the empirical Fisher information:
the mean square of the gradient over sequences, summed over marks, in multiples of its own mean so that a strength means
the same anywhere. The base counts as the first stretch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Callable, Dict, Mapping, Optional

import numpy as np
import torch
from torch import Tensor

from nl_model.checks import at_least
from nl_model.flops import full_step_flops
from nl_model.model import NestedLM
from pipelines.config.schema import Config
from pipelines.experience.replay import Experience, priorities
from pipelines.sleep.engine import LocalEngine
from pipelines.sleep.training import Batch
from pipelines.wake.hooks import HookCosts, NoHook

SHARE = 1 / 16
"""Of a period's text, what the Fisher information is estimated on: its FLOPs are a sixteenth of a plain epoch."""


def sample_size(cfg: Config) -> int:
    """Sequences that one estimate takes."""
    return max(1, round(SHARE * cfg.pool_period / cfg.model.context))


@dataclass
class Ewc(NoHook):
    """The hook. What text an estimate takes is a function of keys: those of the period with the lowest priority."""

    strength: float = 0.1
    """Of the pull."""
    fisher: Dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    centre: Dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    """w*, by parameter name."""
    keys: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64), init=False, repr=False)
    """Of the text that the next estimate takes."""
    tokens: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.int64), init=False, repr=False)

    def __post_init__(self) -> None:
        at_least("hook.strength", self.strength, 0)

    def costs(self, cfg: Config, vocab_size: int) -> HookCosts:
        """A forward and a backward pass over a share of the stream."""
        share = sample_size(cfg) * cfg.model.context / cfg.pool_period
        return HookCosts(streamed=share * full_step_flops(cfg.model, cfg.levels, vocab_size))

    def attach(self, model: NestedLM, cfg: Config, experience: Callable[[], Experience]) -> float:
        """Weigh the base's weights on the base's text."""
        self.model, self.seed, self.most = model, cfg.run.seed, sample_size(cfg)
        self.full = float(full_step_flops(cfg.model, cfg.levels, model.vocab_size))
        self.fisher, self.centre = {}, {}
        self._drop()
        found = experience()
        base = np.flatnonzero(found.keys < 0)
        if not len(base):
            return 0.0
        self._take(found.keys[base], torch.from_numpy(found.tokens(base).astype(np.int64)))
        return self._weigh()

    def scored(self, batch: Batch, logits_BTV: Tensor) -> None:
        """Keep the text if it is among those of the period that the estimate takes."""
        self._take(batch.keys_B, batch.tokens_BS.cpu())

    def penalty(self) -> Optional[Tensor]:
        """The pull, once something was weighed."""
        if not self.fisher:
            return None
        named = self.model.named_parameters()
        pulls = [(self.fisher[name] * (p - self.centre[name]).square()).sum() for name, p in named]
        return 0.5 * self.strength * torch.stack(pulls).sum()

    def boundary(self, engine: LocalEngine) -> float:
        """Weigh the present weights on the period's text."""
        return self._weigh()

    def _take(self, keys_N: np.ndarray, tokens_NS: Tensor) -> None:
        keys = np.concatenate([self.keys, keys_N])
        tokens = torch.cat([self.tokens, tokens_NS]) if len(self.keys) else tokens_NS
        chosen = np.sort(np.argsort(priorities(keys, self.seed), kind="stable")[: self.most])
        self.keys, self.tokens = keys[chosen], tokens[torch.from_numpy(chosen)]

    def _drop(self) -> None:
        self.keys, self.tokens = np.empty(0, np.int64), torch.empty(0, 0, dtype=torch.int64)

    def _weigh(self) -> float:
        """Add the Fisher diagonal at the present weights; returns its FLOPs."""
        named = dict(self.model.named_parameters())
        total = {name: torch.zeros_like(p) for name, p in named.items()}
        for tokens_S in self.tokens:
            loss = self.model.nll(tokens_S[None].to(next(iter(named.values())).device)).mean()
            for name, gradient in zip(named, torch.autograd.grad(loss, list(named.values())), strict=True):
                total[name] += gradient.square()
        mean = sum(float(t.sum()) for t in total.values()) / sum(t.numel() for t in total.values())
        for name, parameter in named.items():
            before = self.fisher.get(name, torch.zeros_like(parameter))
            self.fisher[name] = before + total[name] / max(mean, 1e-30)
            self.centre[name] = parameter.detach().clone()
        passed = self.tokens[:, 1:].numel()
        self._drop()
        return passed * self.full

    def state(self) -> Dict[str, Tensor]:
        """Both diagonals, and the text that waits for the next estimate."""
        found = {f"fisher/{name}": t for name, t in self.fisher.items()}
        found.update({f"centre/{name}": t for name, t in self.centre.items()})
        return {**found, "keys": torch.from_numpy(self.keys), "tokens": self.tokens}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take it over."""
        device = next(self.model.parameters()).device
        for kind, held in (("fisher/", self.fisher), ("centre/", self.centre)):
            held.clear()
            found = {n.removeprefix(kind): t.to(device).clone() for n, t in tensors.items() if n.startswith(kind)}
            held.update(found)
        self.keys, self.tokens = tensors["keys"].cpu().numpy(), tensors["tokens"].cpu()
