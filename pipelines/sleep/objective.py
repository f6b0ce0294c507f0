"""The objective of a round: true tokens, guides of recent and of old text, the student's own continuations.

Shapes: B sequences, S stored tokens, T = S - 1 predicted tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Callable, Dict, Mapping, Optional, Tuple

from torch import Tensor

from nl_model.distillation import Guide
from nl_model.model import NestedLM
from pipelines.config.sleep import SleepConfig
from pipelines.sleep.guides import StoredGuides
from pipelines.sleep.losses import guide_logits, sleep_loss
from pipelines.sleep.on_policy import (
    GUIDE,
    STUDENT,
    Continuation,
    continue_text,
    imitation_reward,
    on_policy_loss,
    prompt_length,
    uniforms,
)
from pipelines.sleep.schedule import mixing
from pipelines.sleep.training import Batch, Keys

Forward = Callable[[Tensor], Tensor]
Loss = Tuple[Tensor, Dict[str, Tensor]]


class GuidedObjective:
    """The loss of every step of a round: a function of (models, seed, step, batch).

    Args:
        cfg: how a round trains.
        steps: steps of the round.
        seed: the plan's.
        student: what continues text in on-policy steps; its weights are those being trained.
        teacher: guide of recent experience, or None.
        anchor: guide of old experience, or None.
        stored: guides of the teacher by key, or None to compute them at every step.
    """

    def __init__(
        self,
        cfg: SleepConfig,
        steps: int,
        seed: int,
        student: NestedLM,
        teacher: Optional[NestedLM] = None,
        anchor: Optional[NestedLM] = None,
        stored: Optional[StoredGuides] = None,
    ) -> None:
        self.cfg, self.steps, self.seed = cfg, steps, seed
        self.student, self.stored = student, stored
        self.models = {name: model for name, model in (("teacher", teacher), ("anchor", anchor)) if model is not None}
        self.trained_tokens = 0
        """Tokens that the student was trained on."""
        self.forward_tokens = 0
        """Tokens of forward passes beside them: guides that read, student and guides that continued text."""

    def loss(self, step: int, forward: Forward, batch: Batch) -> Loss:
        """Loss of one pass in nats per token and its parts.

        Args:
            forward: the student's logits (B, T, V), with gradient.
        """
        tokens_BS = batch.tokens_BS
        prompt = prompt_length(self.cfg, tokens_BS.size(1), self.seed, step) if self.models else 0
        factor = mixing(self.cfg.mixing, step, self.steps)
        if prompt:
            return self._on_policy(step, forward, prompt, batch, factor)
        self.trained_tokens += tokens_BS[:, 1:].numel()
        guides = self._guides(batch)
        return sleep_loss(forward(tokens_BS[:, :-1]), tokens_BS, batch.recent_B, guides, self.cfg, factor)

    def _guides(self, batch: Batch) -> Mapping[str, Guide]:
        """Guides of stored text; the teacher's from storage where it is there."""
        recent_keys = batch.keys_B[batch.recent_B.cpu().numpy()]
        held = self.stored if self.stored is not None and len(recent_keys) and self.stored.covers(recent_keys) else None
        teacher = self.models.get("teacher") if held is None else None
        guides: Dict[str, Guide] = dict(self._read(teacher, self.models.get("anchor"), batch.tokens_BS, batch.recent_B))
        if held is not None:
            guides["teacher"] = held.lookup(recent_keys, batch.tokens_BS.device)
        return guides

    def _read(
        self, teacher: Optional[NestedLM], anchor: Optional[NestedLM], tokens_BS: Tensor, recent_B: Tensor
    ) -> Dict[str, Tensor]:
        guides = guide_logits(teacher, anchor, tokens_BS, recent_B)
        self.forward_tokens += sum(logits_BTV.size(0) * logits_BTV.size(1) for logits_BTV in guides.values())
        return guides

    def _on_policy(self, step: int, forward: Forward, prompt: int, batch: Batch, factor: float) -> Loss:
        prompt_BP, recent_B = batch.tokens_BS[:, :prompt], batch.recent_B
        own = self._continue(self.student, prompt_BP, step, batch.keys_B, STUDENT)
        tokens_BS = own.sequences_BS
        self.trained_tokens += tokens_BS[:, 1:].numel()
        guides = self._read(self.models.get("teacher"), self.models.get("anchor"), tokens_BS, recent_B)
        rewards = {}
        if self.cfg.imitation.weight:
            for name, guide_BTV in guides.items():
                rows_B = recent_B if name == "teacher" else ~recent_B
                keys = batch.keys_B[rows_B.cpu().numpy()]
                theirs = self._continue(self.models[name], prompt_BP[rows_B], step, keys, GUIDE)
                mine = Continuation(tokens_BS[rows_B], own.prompt, own.log_p_Bn[rows_B])
                rewards[name] = imitation_reward(mine, guide_BTV, theirs, self.cfg.imitation)
        return on_policy_loss(forward(tokens_BS[:, :-1]), own, recent_B, guides, rewards, self.cfg, factor)

    def _continue(self, model: NestedLM, prompt_BP: Tensor, step: int, keys: Keys, whose: int) -> Continuation:
        found = continue_text(model, prompt_BP, uniforms(self.seed, step, keys, self.cfg.continuation, whose))
        self.forward_tokens += found.sequences_BS[:, 1:].numel()
        return found
