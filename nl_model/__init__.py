"""The mathematics of nested learning: models whose parameters belong to levels with update periods of their own.

    from nl_model import LevelConfig, ModelConfig, NestedLM, OnlineLevels

A **level** is a named group of parameters that stays constant over its period and is then written once, with the
gradients of all tokens in between (Behrouz et al., Eq. 71). `NestedLM` is a decoder with one MLP per level and block;
`OnlineLevels` writes the levels of a stream that a batch shares, `StreamingModel` gives every sequence fast levels of
its own in fixed memory. Optimizers are found by name (`nl_model.optim`), mixers are attention or self-modifying
memories (`nl_model.memory`), Hugging Face models become levelled ones in `nl_model.hf`. Imports torch and nothing of
ours.
"""

from typing import TYPE_CHECKING

from nl_model.lazy import face

if TYPE_CHECKING:
    from nl_model.config import LevelConfig, ModelConfig, OptimizerConfig
    from nl_model.generate import SamplingConfig, complete
    from nl_model.levelled import Levelled
    from nl_model.model import NestedLM
    from nl_model.online import OnlineLevels
    from nl_model.recall import Recall
    from nl_model.streaming import StreamingModel

__all__ = [
    "LevelConfig",
    "Levelled",
    "ModelConfig",
    "NestedLM",
    "OnlineLevels",
    "OptimizerConfig",
    "Recall",
    "SamplingConfig",
    "StreamingModel",
    "complete",
]
__getattr__ = face(
    __name__,
    {
        "LevelConfig": "config",
        "Levelled": "levelled",
        "ModelConfig": "config",
        "NestedLM": "model",
        "OnlineLevels": "online",
        "OptimizerConfig": "config",
        "Recall": "recall",
        "SamplingConfig": "generate",
        "StreamingModel": "streaming",
        "complete": "generate",
    },
)
