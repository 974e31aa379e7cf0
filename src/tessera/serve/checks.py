"""How the fields of a JSON body are checked: one small function per kind of value, and a table of fields per endpoint.

A field is *honoured* (its check gives the value), *passed over* (it cannot change the answer; the table says why) or
*refused* by name when its value asks for something this build does not do. Anything else is refused as unknown.
`null` means "not given" everywhere.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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


def checked(good: Callable[[Any], bool], allowed: str) -> Check:
    """A value as it is, where it is `good`."""

    def check(value: Any, field: str) -> Any:
        if not good(value):
            raise bad(field, value, allowed)
        return value

    return check


boolean = checked(lambda value: isinstance(value, bool), "true or false")
string = checked(lambda value: isinstance(value, str), "a string")
mapping = checked(lambda value: isinstance(value, dict), "an object")
anything = checked(lambda value: True, "")  # for what is read elsewhere


def text(low: int, high: int) -> Check:
    """A string of so many characters."""
    return checked(
        lambda value: isinstance(value, str) and low <= len(value) <= high, f"a string of {low} to {high} characters"
    )


def integer(low: int, high: int, also: str = "") -> Check:
    """A whole number in low..high. `also` explains a special value in the error."""
    return checked(
        lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high,
        f"an integer from {low} to {high}{also}",
    )


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
    return checked(lambda value: _among(value, values), "one of " + ", ".join(map(repr, values)))


def _among(value: object, values: Sequence[object]) -> bool:
    """Equal, and of one type: 1 is not True."""
    return any(type(value) is type(one) and value == one for one in values)


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
        if not _among(value, self.neutral):
            accepted = ["null", *(msgspec.json.encode(v).decode() for v in self.neutral)]
            ask = f" (accepted: {', '.join(accepted)})" if self.neutral else ""
            raise RequestError(f"{field} is not supported by this server{ask}: {self.remedy}", field)


@dataclass(frozen=True, slots=True)
class Fields:
    """Every field that an endpoint knows."""

    honoured: Mapping[str, Check]
    passed: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, Refused] = field(default_factory=dict)

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
