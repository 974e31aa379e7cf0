"""The optional libraries of transfer engines, imported when one of them is asked for."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from tessera.core.errors import ConfigError, Conflict


def library(kind: str, modules: tuple[str, ...], remedy: str) -> ModuleType:
    """The library behind an engine: the first of `modules` that is installed.

    Raises `ConfigError` with the remedy when there is none, or it does not load.
    """
    reasons = []
    for module in modules:
        try:
            return import_module(module)
        except ImportError as error:
            reasons.append(f"{module} cannot be imported ({error})")
    raise ConfigError([Conflict((f"--disaggregation-transfer-backend {kind}",), ", ".join(reasons), remedy)])
