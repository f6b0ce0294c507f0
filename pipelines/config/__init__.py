"""The typed configuration of a run: a frozen dataclass per section, YAML and `key=value` into it.

`load_config` lays files over defaults: shipped configurations (`shipped/`), sizes (`sizes/`), strategies
(`strategies/`), the user's own file, the command line. To add a key: a field with a line of documentation in its
section, its bound in `__post_init__`, and nowhere a second default.
"""

from typing import TYPE_CHECKING

from nl_model.lazy import face

if TYPE_CHECKING:
    from pipelines.config.dreams import DreamConfig
    from pipelines.config.gate import GateConfig
    from pipelines.config.load import load_config, to_yaml
    from pipelines.config.pool import PoolConfig
    from pipelines.config.schema import Config, WakeConfig
    from pipelines.config.sleep import SleepConfig
    from pipelines.config.when import WhenConfig

__all__ = [
    "Config",
    "DreamConfig",
    "GateConfig",
    "PoolConfig",
    "SleepConfig",
    "WakeConfig",
    "WhenConfig",
    "load_config",
    "to_yaml",
]
__getattr__ = face(
    __name__,
    {
        "Config": "schema",
        "DreamConfig": "dreams",
        "GateConfig": "gate",
        "PoolConfig": "pool",
        "SleepConfig": "sleep",
        "WakeConfig": "schema",
        "WhenConfig": "when",
        "load_config": "load",
        "to_yaml": "load",
    },
)
