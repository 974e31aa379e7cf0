"""Tessera serves large language models. One promise sets it apart: the layout never changes the answer."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tessera.serve.engine import Engine

__version__ = "0.1.0"
__all__ = ["Engine", "__version__"]

LAZY = {"Engine": "tessera.serve.engine"}  # so that `import tessera` does not load torch


def __getattr__(name: str) -> Any:
    if name not in LAZY:
        raise AttributeError(f"module 'tessera' has no attribute '{name}'")
    return getattr(importlib.import_module(LAZY[name]), name)
