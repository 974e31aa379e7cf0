"""Typed access to a Hugging Face `config.json`, and its rope in both spellings.

v5 writes `rope_parameters`; v4 wrote `rope_theta` and `rope_scaling`. Every refusal names field, found and allowed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from tessera.core.errors import ModelError
from tessera.core.spec import RopeKind, RopeSpec

DTYPES = ("float16", "bfloat16", "float32", "float64")


class Fields:
    """A config with typed access. Every error names the field, what was found and what is allowed."""

    def __init__(self, values: Mapping[str, Any], where: str = "config.json") -> None:
        self.values = values
        self.where = where

    def get(self, name: str, default: Any = None) -> Any:
        """The field; `default` where it is absent or null."""
        value = self.values.get(name)
        return default if value is None else value

    def count(self, name: str, default: int | None = None, least: int = 1) -> int:
        """A whole number of at least `least`."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.error(name, value, f"a whole number >= {least}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.error(name, value, "a number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, value, "true or false")
        return value

    def choice(self, name: str, allowed: Sequence[Any], default: Any = None) -> Any:
        """One of `allowed`."""
        value = self.get(name, default)
        if value not in allowed:
            raise self.error(name, value, ", ".join(str(a) for a in allowed))
        return value

    def error(self, name: str, found: object, allowed: str) -> ModelError:
        """A refusal of field `name`."""
        return ModelError(f"{self.where}: field '{name}' is {found!r}; this build serves: {allowed}")


def read_rope(fields: Fields, head_dim: int, interleaved: bool = False, partial: float = 1.0) -> tuple[RopeSpec, float]:
    """The rope of a head of `head_dim`, and yarn's factor on the scores (1 elsewhere; DeepSeek multiplies by it)."""
    old = fields.get("rope_scaling", {})
    rope = Fields(fields.get("rope_parameters", old), "config.json rope_parameters")
    if any(isinstance(value, Mapping) for value in rope.values.values()):
        raise rope.error("rope_parameters", rope.values, "one set of parameters for all layers")
    theta = rope.number("rope_theta", fields.number("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    kind = "default" if kind == "mrope" else kind  # with text alone the three positions are equal: plain rope
    dim = int(head_dim * rope.number("partial_rotary_factor", fields.number("partial_rotary_factor", partial)))
    if kind == "default":
        return RopeSpec(dim, theta, interleaved=interleaved), 1.0
    if kind not in ("linear", "llama3", "yarn"):
        raise rope.error("rope_type", kind, "default, linear, llama3, yarn")
    factor = rope.number("factor")
    scaled = RopeSpec(dim, theta, cast(RopeKind, kind), interleaved, factor=factor)
    if kind == "linear":
        return scaled, 1.0
    original = rope.count("original_max_position_embeddings", fields.get("original_max_position_embeddings"))
    scaled = replace(scaled, original_max_positions=original)
    if kind == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        return replace(scaled, low_freq_factor=low, high_freq_factor=high), 1.0
    all_dim, mscale = rope.number("mscale_all_dim", 0.0), rope.number("mscale", 0.0)
    table = _mscale(factor, mscale) / _mscale(factor, all_dim) if mscale and all_dim else _mscale(factor, 1.0)
    yarn = replace(
        scaled,
        table_scale=rope.number("attention_factor", table),
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        truncate=rope.flag("truncate", True),
    )
    return yarn, _mscale(factor, all_dim) ** 2 if all_dim else 1.0


def _mscale(factor: float, mscale: float) -> float:
    """`0.1 * mscale * ln(factor) + 1`, and 1 where nothing is stretched (YaRN, arXiv 2309.00071, and DeepSeek-V2)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
