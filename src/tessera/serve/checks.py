"""How the fields of a JSON body are checked: one small function per kind of value, and a table of fields per endpoint.

A field is *honoured* (its check gives the value), *passed over* (it cannot change the answer; the table says why) or
*refused* by name when its value asks for something this build does not do. Anything else is refused as unknown.
`null` means "not given" everywhere.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from tessera.core.errors import RequestError

Check = Callable[[Any, str], Any]
SHOWN = 60  # characters of a bad value that an error repeats

TYPES = {bool: "a boolean", int: "an integer", float: "a number", str: "a string", list: "a list", dict: "an object"}


def shown(value: object) -> str:
    """A value as errors show it: short, and by kind where it is large."""
    if isinstance(value, list | dict):
        return f"{TYPES[type(value)]} of {len(value)}"
    text = repr(value)
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."


def bad(field: str, found: object, allowed: str) -> RequestError:
    """The error for a value that is not allowed: field, found, allowed."""
    return RequestError(f"{field}: found {shown(found)}, allowed is {allowed}", field)


def boolean(value: Any, field: str) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise bad(field, value, "true or false")
    return value


def string(value: Any, field: str) -> str:
    """Any string."""
    if not isinstance(value, str):
        raise bad(field, value, "a string")
    return value


def mapping(value: Any, field: str) -> dict[str, Any]:
    """Any object."""
    if not isinstance(value, dict):
        raise bad(field, value, "an object")
    return value


def integer(low: int, high: int, also: str = "") -> Check:
    """A whole number in low..high. `also` explains a special value in the error."""

    def check(value: Any, field: str) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise bad(field, value, f"an integer from {low} to {high}{also}")
        return value

    return check


def number(low: float, high: float, above: bool = False) -> Check:
    """A finite number in low..high, or in (low, high] when `above`."""

    def check(value: Any, field: str) -> float:
        good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not good or not low <= value <= high or (above and value == low):
            lower = f"above {low:g} and at most {high:g}" if above else f"from {low:g} to {high:g}"
            raise bad(field, value, f"a number {lower}")
        return float(value)

    return check


def listed(item: Check, most: int, single: bool = False) -> Check:
    """A list of at most `most` items; with `single` also one item alone. Gives a tuple."""

    def check(value: Any, field: str) -> tuple[Any, ...]:
        if single and not isinstance(value, list):
            return (item(value, field),)
        if not isinstance(value, list):
            raise bad(field, value, "a list")
        if len(value) > most:
            raise RequestError(f"{field}: found a list of {len(value)}, allowed are at most {most}", field)
        return tuple(item(one, f"{field}[{i}]") for i, one in enumerate(value))

    return check


def stop_string(value: Any, field: str) -> str:
    """A stop string: 1 to 1024 characters."""
    if not isinstance(value, str) or not 1 <= len(value) <= 1024:
        raise bad(field, value, "a string of 1 to 1024 characters")
    return value


def logit_bias(value: Any, field: str) -> dict[int, float]:
    """Token id (as text or number) -> bias from -100 to 100."""
    bias = number(-100, 100)
    found = {}
    for key, amount in mapping(value, field).items():
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise bad(f"{field}.{key[:SHOWN]}", key, "a token id")
        found[int(key)] = bias(amount, f"{field}.{key}")
    return found


def one_of(*values: object) -> Check:
    """One of some values."""

    def check(value: Any, field: str) -> Any:
        if not any(value is v or (type(value) is type(v) and value == v) for v in values):
            raise bad(field, value, "one of " + ", ".join(repr(v) for v in values))
        return value

    return check


def each(item: Check, most: int) -> Check:
    """One value for all prompts of a batch, or a list with one each."""
    many = listed(item, most)

    def check(value: Any, field: str) -> Any:
        return many(value, field) if isinstance(value, list) else item(value, field)

    return check


def pick(value: Any, index: int, count: int, field: str) -> Any:
    """A value for one prompt of a batch: its own of a list (`each`), or the one for all."""
    if not isinstance(value, tuple):
        return value
    if len(value) != count:
        raise RequestError(f"{field}: found {len(value)} values, allowed are one or {count} (one per prompt)", field)
    return value[index]


@dataclass(frozen=True, slots=True)
class Refused:
    """A field that is known and not done. `neutral`: values that ask for nothing; `remedy`: what to do instead."""

    remedy: str
    neutral: Sequence[object] = ()

    def check(self, value: Any, field: str) -> None:
        """Raises unless the value asks for nothing."""
        if not any(type(value) is type(v) and value == v for v in self.neutral):
            accepted = ["null", *(msgspec.json.encode(v).decode() for v in self.neutral)]
            ask = f" (accepted: {', '.join(accepted)})" if self.neutral else ""
            raise RequestError(f"{field} is not supported by this server{ask}: {self.remedy}", field)


@dataclass(frozen=True, slots=True)
class Fields:
    """Every field that an endpoint knows."""

    honoured: Mapping[str, Check]
    passed: Mapping[str, str]
    refused: Mapping[str, Refused]

    @property
    def known(self) -> set[str]:
        """All names."""
        return {*self.honoured, *self.passed, *self.refused}

    def read(self, body: Any, within: str = "") -> dict[str, Any]:
        """The honoured fields of a body that are given, checked. `within`: path of the object, for errors."""
        if not isinstance(body, dict):
            raise bad(within or "body", body, "an object")
        values = {}
        for name, value in body.items():
            field = f"{within}.{name}" if within else name
            if name in self.honoured:
                if value is not None:
                    values[name] = self.honoured[name](value, field)
            elif name in self.refused:
                if value is not None:
                    self.refused[name].check(value, field)
            elif name not in self.passed:
                raise self._unknown(name, field)
        return values

    def _unknown(self, name: object, field: str) -> RequestError:
        near = difflib.get_close_matches(str(name)[:SHOWN], sorted(self.known), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return RequestError(f"unknown field {field[: 2 * SHOWN]!r}{hint}", field[: 2 * SHOWN])


def is_batch(value: Any) -> bool:
    """A list of prompts, not one list of token ids."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], str | list)
