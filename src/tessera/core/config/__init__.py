"""Configuration: the table of flags, `resolve`, and what it yields."""

from tessera.core.config.ask import BY_KEY, FLAGS, Asked, canonical, layered, read, suggestion
from tessera.core.config.environment import VARIABLES, Environment, Variable, current, read_environment
from tessera.core.config.flag import Flag, Ignored, Unbuilt
from tessera.core.config.resolve import resolve
from tessera.core.config.types import (
    Config,
    Decision,
    Hardware,
    KernelConfig,
    LoggingConfig,
    MemoryConfig,
    MeshConfig,
    ModelConfig,
    Notes,
    Resolved,
    SchedulingConfig,
    ServingConfig,
)

__all__ = [
    "BY_KEY",
    "FLAGS",
    "VARIABLES",
    "Asked",
    "Config",
    "Decision",
    "Environment",
    "Flag",
    "Hardware",
    "Ignored",
    "KernelConfig",
    "LoggingConfig",
    "MemoryConfig",
    "MeshConfig",
    "ModelConfig",
    "Notes",
    "Resolved",
    "SchedulingConfig",
    "ServingConfig",
    "Unbuilt",
    "Variable",
    "canonical",
    "current",
    "layered",
    "read",
    "read_environment",
    "resolve",
    "suggestion",
]
