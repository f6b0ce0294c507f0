"""A round's lesson: who guides the student at a step, on whose text, and what that costs beside its own pass.

Shapes: B sequences, S stored tokens, T = S - 1 predicted tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Callable, Dict, Mapping, Optional, Tuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from nl_model.distillation import Guide
from nl_model.model import NestedLM
from pipelines.config.sleep import SleepConfig
from pipelines.sleep.guides import StoredGuides
from pipelines.sleep.losses import guide_logits, sleep_loss
from pipelines.sleep.on_policy import (
    GUIDE,
    STUDENT,
    Said,
    imitation_reward,
    on_policy_loss,
    prompt_length,
    speak,
    uniforms,
)
from pipelines.sleep.schedule import mixing

Keys = npt.NDArray[np.int64]
Forward = Callable[[Tensor], Tensor]
Loss = Tuple[Tensor, Dict[str, Tensor]]


class Lesson:
    """The loss of every step of a round: a function of (models, seed, step, batch).

    Args:
        cfg: how a round trains.
        steps: steps of the round.
        seed: the plan's.
        student: what speaks in on-policy steps; its weights are those being trained.
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
        self.trained = 0
        """Tokens that the student was trained on."""
        self.passed = 0
        """Tokens of forward passes beside them: guides that read, student and guides that spoke."""

    def loss(self, step: int, forward: Forward, sequences_BS: Tensor, recent_B: Tensor, keys: Keys) -> Loss:
        """Loss of one step and its parts.

        Args:
            forward: the student's logits (B, T, V), with gradient.
            sequences_BS: int64 tokens.
            recent_B: which sequences are recent.
            keys: theirs, (B,); what is sampled depends on them.
        """
        prompt = prompt_length(self.cfg, sequences_BS.size(1), self.seed, step) if self.models else 0
        factor = mixing(self.cfg.mixing, step, self.steps)
        if prompt:
            return self._on_policy(step, forward, sequences_BS[:, :prompt], recent_B, keys, factor)
        self.trained += sequences_BS[:, 1:].numel()
        guides = self._guides(sequences_BS, recent_B, keys)
        return sleep_loss(forward(sequences_BS[:, :-1]), sequences_BS, recent_B, guides, self.cfg, factor)

    def _guides(self, sequences_BS: Tensor, recent_B: Tensor, keys: Keys) -> Mapping[str, Guide]:
        """Guides of stored text; the teacher's from storage where it is there."""
        recent_keys = keys[recent_B.cpu().numpy()]
        held = self.stored if self.stored is not None and len(recent_keys) and self.stored.covers(recent_keys) else None
        teacher = self.models.get("teacher") if held is None else None
        guides: Dict[str, Guide] = dict(self._read(teacher, self.models.get("anchor"), sequences_BS, recent_B))
        if held is not None:
            guides["teacher"] = held.lookup(recent_keys, sequences_BS.device)
        return guides

    def _read(
        self, teacher: Optional[NestedLM], anchor: Optional[NestedLM], sequences_BS: Tensor, recent_B: Tensor
    ) -> Dict[str, Tensor]:
        guides = guide_logits(teacher, anchor, sequences_BS, recent_B)
        self.passed += sum(logits_BTV.size(0) * logits_BTV.size(1) for logits_BTV in guides.values())
        return guides

    def _on_policy(
        self, step: int, forward: Forward, prompt_BP: Tensor, recent_B: Tensor, keys: Keys, factor: float
    ) -> Loss:
        said = self._speak(self.student, prompt_BP, step, keys, STUDENT)
        sequences_BS = said.sequences_BS
        self.trained += sequences_BS[:, 1:].numel()
        guides = self._read(self.models.get("teacher"), self.models.get("anchor"), sequences_BS, recent_B)
        rewards = {}
        if self.cfg.imitation.weight:
            for name, guide_BTV in guides.items():
                rows_B = recent_B if name == "teacher" else ~recent_B
                own = self._speak(self.models[name], prompt_BP[rows_B], step, keys[rows_B.cpu().numpy()], GUIDE)
                mine = Said(sequences_BS[rows_B], said.prompt, said.log_p_Bn[rows_B])
                rewards[name] = imitation_reward(mine, guide_BTV, own, self.cfg.imitation)
        return on_policy_loss(forward(sequences_BS[:, :-1]), said, recent_B, guides, rewards, self.cfg, factor)

    def _speak(self, model: NestedLM, prompt_BP: Tensor, step: int, keys: Keys, speaker: int) -> Said:
        said = speak(model, prompt_BP, uniforms(self.seed, step, keys, self.cfg.continuation, speaker))
        self.passed += said.sequences_BS[:, 1:].numel()
        return said
