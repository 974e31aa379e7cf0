"""Values of a resolved configuration for people: units, and no brackets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tessera.core.config.memory import gib

NOTHING = "-"
FEW = 4  # sizes of a row that are told
BYTES = ("weight_bytes", "page_bytes", "slot_bytes", "budget", "available", "max_body_size")
SECONDS = (
    "meet_within", "ahead", "drain_timeout", "watchdog_timeout", "restart_window", "start_timeout", "bootstrap_timeout",
    "waiting_timeout", "decode_bootstrap_timeout", "silence", "heartbeat_interval",
)  # fmt: skip


def shown(name: str, value: object) -> str:
    """The value of the field of that name."""
    if value in (None, "", ()):
        return NOTHING
    return FORMS.get(name, _plain)(value)


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or NOTHING
    return str(value)


def _graphs(sizes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]) -> str:
    rows, ranges, tokens = sizes
    if not any(sizes):
        return NOTHING
    return f"decode of {_row(rows, 'rows')}; other steps of {_row(tokens, 'tokens')} in {_row(ranges, 'ranges')}"


def _row(sizes: Sequence[int], of: str) -> str:
    """Sizes in their order, the middle of many left out."""
    if len(sizes) <= FEW:
        return f"{', '.join(map(str, sizes)) or NOTHING} {of}"
    return f"{', '.join(map(str, sizes[: FEW - 1]))} ... {sizes[-1]} {of} ({len(sizes)} sizes)"


def _quantization(found: Mapping[str, Any]) -> str:
    rows, columns = found["block"]
    rest = {name: value for name, value in found.items() if name != "block"}
    return ", ".join([f"block {rows}x{columns}", *(f"{name} {shown(name, value)}" for name, value in rest.items())])


def _wide(found: Mapping[str, bool]) -> str:
    return ", ".join(name for name, kept in found.items() if kept) or NOTHING


FORMS: Mapping[str, Callable[[Any], str]] = {
    "graphs": _graphs,
    "quantization": _quantization,
    "wide": _wide,
    **dict.fromkeys(BYTES, gib),
    **dict.fromkeys(SECONDS, lambda value: f"{value:g} s"),
}
