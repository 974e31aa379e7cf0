"""What a flag is: its spellings, how its value is read, and whether this build honours it.

A flag is *built*, *unbuilt* (refused by name unless it has a neutral value, with what can be done instead) or *ignored*
(accepted because it cannot change the answer; listed once at start-up with the reason). The same holds for one value of
a flag. What is built later is said here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Parse = Callable[[object], object]


@dataclass(frozen=True, slots=True)
class Unbuilt:
    """Known by name, not built yet. `instead`: what can be done now."""

    instead: str


@dataclass(frozen=True, slots=True)
class Ignored:
    """Accepted; cannot change the answer in this build. `reason` is printed at start-up."""

    reason: str


@dataclass(frozen=True, slots=True)
class Flag:
    """One row of the table of flags.

    `name` is the key everywhere (Python, YAML, `Config`); `--name` with dashes and `also` are its spellings. `default`
    None: `resolve` chooses and says why. `choices`: the values that are honoured; `unbuilt`: values known but refused;
    `instead` says what can be done. `neutral`: values that ask for nothing, besides the default.
    """

    name: str
    parse: Parse
    default: object
    help: str
    group: str = ""
    also: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    unbuilt: tuple[str, ...] = ()
    instead: str = ""
    state: Unbuilt | Ignored | None = None
    neutral: tuple[object, ...] = ()

    @property
    def spellings(self) -> tuple[str, ...]:
        """All spellings on the command line, the plain one first."""
        return ("--" + self.name.replace("_", "-"), *self.also)

    @property
    def keys(self) -> tuple[str, ...]:
        """Names under which a value may come in a mapping: the spellings without dashes."""
        return tuple(s.removeprefix("--").replace("-", "_") for s in self.spellings)

    @property
    def is_secret(self) -> bool:
        """True when its value is shown to nobody."""
        return self.name.endswith("api_key")

    @property
    def is_switch(self) -> bool:
        """True when the flag takes no value on the command line."""
        return self.parse is switch

    @property
    def takes_many(self) -> bool:
        """True when the flag takes several values."""
        return self.parse in (words, wholes)

    def neutral_value(self, value: object) -> bool:
        """True when `value` asks for nothing that is not there anyway."""
        return value == self.default or value in self.neutral

    def refused(self, value: object) -> bool:
        """True when `value` asks for something that is not built."""
        return str(value) in self.unbuilt or (isinstance(self.state, Unbuilt) and not self.neutral_value(value))

    def describe(self) -> str:
        """The help line: what it means, its default, and its standing where that is not plain."""
        text = self.help
        if self.choices:
            text += f" One of: {', '.join(self.choices)}."
        if isinstance(self.state, Unbuilt):
            return f"{text} (not built yet)"
        if isinstance(self.state, Ignored):
            return f"{text} (ignored: {self.state.reason})"
        return text if self.default in (None, ()) or self.default is False else f"{text} Default: {self._default()}."

    def _default(self) -> str:
        """The default as it would be written."""
        if self.parse is size and isinstance(self.default, int):
            return f"{self.default >> 20}M"
        return f"{self.default:g}" if isinstance(self.default, float) else str(self.default)


def switch(value: object) -> bool:
    """True or False, also as written in YAML or an environment variable."""
    if isinstance(value, bool):
        return value
    known = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
    text = str(value).lower()
    if text not in known:
        raise ValueError("expected true or false")
    return known[text]


def text(value: object) -> str:
    """Any text that is not empty."""
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        raise ValueError("expected a text that is not empty")
    return str(value)


def words(value: object) -> tuple[str, ...]:
    """Several texts: a list, or one text with commas."""
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, list | tuple):
        raise ValueError("expected a list of texts")
    return tuple(text(item) for item in items)


def wholes(value: object) -> tuple[int, ...]:
    """Several whole numbers >= 1: a list, or one text with commas."""
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, list | tuple):
        raise ValueError("expected a list of whole numbers")
    return tuple(_whole(item, 1, None) for item in items)


def whole(low: int, high: int | None = None, also: tuple[int, ...] = ()) -> Parse:
    """A whole number from `low` to `high`, or one of `also`."""
    return lambda value: _whole(value, low, high, also)


def _whole(value: object, low: int, high: int | None, also: tuple[int, ...] = ()) -> int:
    allowed = f"a whole number from {low}" + (f" to {high}" if high is not None else "")
    allowed += "".join(f", or {n}" for n in also)
    try:
        number = int(value) if isinstance(value, int | str) and not isinstance(value, bool) else None
    except ValueError:
        number = None
    if number is None or not (number in also or (low <= number and (high is None or number <= high))):
        raise ValueError(f"expected {allowed}")
    return number


def real(low: float, high: float = 1e18) -> Parse:
    """A number from `low` to `high`."""
    return lambda value: _real(value, low, high, f"a number from {low:g}")


def positive(high: float = 1e18) -> Parse:
    """A number above 0 and up to `high`."""
    return lambda value: _real(value, 5e-324, high, "a number above 0")


def _real(value: object, low: float, high: float, allowed: str) -> float:
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else None
    except ValueError:
        number = None
    if number is None or not low <= number <= high:
        raise ValueError(f"expected {allowed}" + (f" to {high:g}" if high < 1e18 else ""))
    return number


UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


def size(value: object) -> int:
    """Bytes, as a number or with K, M or G (powers of 1024; `64M`, `64MiB` and `64MB` are the same)."""
    digits = str(value).strip().lower().removesuffix("ib").removesuffix("b")
    unit = digits[-1:] if digits[-1:] in UNITS else ""
    try:
        number = float(digits.removesuffix(unit)) * UNITS[unit]
    except ValueError:
        number = 0
    if isinstance(value, bool) or not 1 <= number < 1 << 62:
        raise ValueError("expected bytes, as a number or like 64M or 2G")
    return int(number)
