"""What was asked, read against the table of flags: names, types, choices, and what is not built yet.

Values come as text from a command line or as Python values from `Engine(**flags)` and YAML; all pass here.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from types import NoneType
from typing import TypeVar

from tessera.core.config.flag import Flag, Ignored, Unbuilt
from tessera.core.config.flags_engine import KERNELS, MEMORY, MESH, MODEL, SCHEDULING
from tessera.core.config.flags_server import HANDOVER, LOGGING, SERVING, SPECULATION
from tessera.core.config.flags_sglang import SGLANG
from tessera.core.config.types import Notes
from tessera.core.errors import Conflict

T = TypeVar("T")
FLAGS: tuple[Flag, ...] = (
    *MODEL,
    *MESH,
    *MEMORY,
    *SCHEDULING,
    *KERNELS,
    *SPECULATION,
    *HANDOVER,
    *SERVING,
    *LOGGING,
    *SGLANG,
)
BY_KEY: Mapping[str, Flag] = {key: flag for flag in FLAGS for key in flag.keys}


class Asked:
    """Typed values by flag name; the default where nothing valid was asked."""

    def __init__(self, given: Mapping[str, object]) -> None:
        self._given = dict(given)
        self._all = {flag.name: flag.default for flag in FLAGS} | self._given

    def gave(self, name: str) -> bool:
        """True when the user asked for a value."""
        return name in self._given

    def without(self, names: Iterable[str]) -> Asked:
        """The same, as if nobody had asked for these."""
        left = self._given.keys() - set(names)
        return Asked({name: value for name, value in self._given.items() if name in left})

    def text(self, name: str) -> str | None:
        """A text, or None where there is none."""
        return self._of(name, str, NoneType)

    def word(self, name: str) -> str:
        """A text that always has a value."""
        return self._of(name, str)

    def whole(self, name: str) -> int | None:
        """A whole number, or None where there is none."""
        return self._of(name, int, NoneType)

    def number(self, name: str) -> int:
        """A whole number that always has a value."""
        return self._of(name, int)

    def wholes(self, name: str) -> tuple[int, ...]:
        """Several whole numbers."""
        return self._of(name, tuple)

    def real(self, name: str) -> float | None:
        """A number, or None where there is none."""
        return self._of(name, float, NoneType)

    def amount(self, name: str) -> float:
        """A number that always has a value."""
        return self._of(name, float)

    def on(self, name: str) -> bool:
        """A switch."""
        return self._of(name, bool)

    def _of(self, name: str, *kinds: type[T]) -> T:
        value = self._all[name]
        assert isinstance(value, kinds), f"{name} is {value!r}"
        return value


def read(asked: Mapping[str, object], notes: Notes) -> Asked:
    """Reads `asked` (any spelling of a flag, with - or _; None asks for nothing). What is wrong goes to `notes`.

    The value of a flag that is not built is kept beside its refusal, so that its combinations are checked too.
    """
    given: dict[str, object] = {}
    for key, raw in asked.items():
        flag = BY_KEY.get(key.removeprefix("--").replace("-", "_"))
        if flag is None:
            meant = [BY_KEY[name] for name in _near(key, BY_KEY)]
            notes.unread(Conflict((key,), "there is no such flag", suggestion(key, BY_KEY)), meant)
        elif raw is not None:
            _take(flag, raw, given, notes)
    return Asked(given)


def _take(flag: Flag, raw: object, given: dict[str, object], notes: Notes) -> None:
    name = flag.spellings[0]
    try:
        value = flag.parse(raw)
    except ValueError as error:
        notes.unread(Conflict((name,), f"found {raw!r}", f"{_sentence(str(error))}."), (flag,))
        return
    if flag.name in given and given[flag.name] != value:
        both = "" if flag.is_secret else f", as {given[flag.name]!r} and as {value!r}"
        notes.refuse((name,), f"asked twice{both}", "Give it once.")
    elif flag.choices and str(value) not in (*flag.choices, *flag.unbuilt) and not flag.neutral_value(value):
        _refuse_unknown(flag, str(value), notes)
    elif str(value) in flag.unbuilt:
        remedy = f"{_sentence(flag.instead)} (allowed: {', '.join(flag.choices)})."
        notes.unread(Conflict((f"{name} {value}",), "not built yet", remedy), (flag,))
    else:
        given[flag.name] = value
        if isinstance(flag.state, Unbuilt) and flag.refused(value):
            shown = "" if flag.is_switch or flag.is_secret else f" {_shown(value)}"
            notes.refuse((name + shown,), "not built yet", f"{_sentence(flag.state.instead)}.")
        if isinstance(flag.state, Ignored) and value not in (False, ()):
            notes.decide(f"{name} {_shown(value)}".removesuffix(" True"), "ignored", flag.state.reason)


def _refuse_unknown(flag: Flag, value: str, notes: Notes) -> None:
    near = difflib.get_close_matches(value, flag.choices, 1)
    hint = f"Did you mean {near[0]}? " if near else ""
    remedy = f"{hint}Allowed: {', '.join(flag.choices)}."
    notes.unread(Conflict((flag.spellings[0],), f"found {value!r}", remedy), (flag,))


def layered(*layers: Mapping[str, object]) -> dict[str, object]:
    """Several mappings of flags as one; a later one wins, whatever the spellings. None asks for nothing."""
    merged: dict[str, object] = {}
    for layer in layers:
        asked = {key: value for key, value in layer.items() if value is not None}
        names = {canonical(key) for key in asked}
        merged = {key: value for key, value in merged.items() if canonical(key) not in names} | asked
    return merged


def canonical(key: str) -> str:
    """The flag's name, whatever its spelling; what is no flag stays as it is."""
    flag = BY_KEY.get(key.removeprefix("--").replace("-", "_"))
    return flag.name if flag else key


def suggestion(key: str, known: Iterable[str], command: str = "tessera serve") -> str:
    """A remedy for an unknown name: the nearest known ones, or the help of `command`."""
    near = _near(key, known)
    if not near:
        return f"See `{command} --help` for all of them."
    return f"Did you mean {' or '.join('--' + n.replace('_', '-') for n in near)}?"


def _near(key: str, known: Iterable[str]) -> list[str]:
    """The known names that may have been meant, as they are known."""
    return difflib.get_close_matches(key.removeprefix("--").replace("-", "_"), list(known), 2, 0.6)


def _shown(value: object) -> str:
    return ",".join(str(v) for v in value) if isinstance(value, tuple) else str(value)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
