"""How dreams are made, judged and used: part of the configuration of a run."""

from __future__ import annotations

from dataclasses import dataclass

from nl_model.checks import above, at_least, inside, one_of, share, within

SCORES = ("gradient", "progress")


@dataclass(frozen=True)
class DreamConfig:
    """Dreams: synthetic sequences that the awake model makes from recent experience at the start of a round."""

    share: float = 0.0
    """Most of a sleep batch that is dreamt, in place of replayed experience; 0: nothing is dreamt. Dreams stand in for
    text that is not held; with all text at hand they cost more than they bring."""
    repeats: int = 4
    """Most times that a round trains on one dream: with few dreams, what is dreamt stays below the share."""
    cap: float = 0.05
    """Most dreams in the store, per row of real experience."""
    candidates: int = 8
    """Sequences generated per round, before any is judged."""
    keep_top: int = 3
    """Candidates kept for their score; 0: none."""
    keep_random: int = 1
    """Candidates kept at random from the rest; 0: none."""
    prompt: float = 0.8
    """Share of a dream that is taken from its parents; the model goes on from there, which is what costs time."""
    combine: float = 0.5
    """Share of candidates whose prompt joins two experiences instead of continuing one."""
    fire: float = 0.5
    """Share of candidates for which one random level of one random block fires stronger than it was trained to."""
    gain: float = 1.5
    """How much stronger: the factor on that level's output; 0 silences it."""
    temperature: float = 0.8
    """Divides the logits when a token is drawn; 0 takes the most likely one."""
    top_p: float = 1.0
    """Draw from the fewest tokens that together have this probability."""
    score: str = "gradient"
    """gradient: norm of the last block's loss gradient. progress: loss taken off by one small step along it."""
    measure: int = 32
    """Recent experiences held out of prompts: the band of real text, and what the reward loop measures itself by."""
    band: float = 0.5
    """Margin of the band of real text that a dream must lie in, as a share of the band's width on either side; 0:
    none."""
    ngram: int = 16
    """Tokens of the n-grams by which a dream is compared with stored text."""
    max_copied: float = 0.25
    """Largest share of n-grams behind its prompt that a dream may have in common with stored text."""
    copy_rows: int = 8192
    """Newest experiences compared with; its parents always are. 0: all, at a cost that grows with the store."""
    reward_rounds: int = 0
    """Rounds of the reward loop: keep dreams that help on held-out experience, train the dreamer on them; 0: off."""
    reward_steps: int = 2
    """Steps on one dream after which its reward is measured."""
    reward_lr: float = 0.05
    """Length of one such step, as a share of the norm of the last block's weights."""

    def __post_init__(self) -> None:
        for key in ("share", "cap", "combine", "fire", "max_copied"):
            share(f"dreams.{key}", getattr(self, key))
        at_least("dreams.candidates", self.candidates, 1)
        for key in ("keep_top", "keep_random", "copy_rows", "reward_rounds", "band", "gain"):
            at_least(f"dreams.{key}", getattr(self, key), 0)
        for key in ("measure", "ngram", "reward_steps", "repeats"):
            at_least(f"dreams.{key}", getattr(self, key), 1)
        inside("dreams.prompt", self.prompt, 0, 1)
        at_least("dreams.temperature", self.temperature, 0)
        within("dreams.top_p", self.top_p, 0, 1, "(]")
        above("dreams.reward_lr", self.reward_lr, 0)
        one_of("dreams.score", self.score, SCORES)
        if self.share and not self.keep_top + self.keep_random:
            raise ValueError(
                "dreams.keep_top=0 and dreams.keep_random=0 keep no dream; raise one or set dreams.share=0"
            )

    @property
    def keep(self) -> int:
        """Most dreams of one round."""
        return self.keep_top + self.keep_random
