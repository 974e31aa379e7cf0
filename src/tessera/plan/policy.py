"""Who goes first and who waits. Choices are rows of a table."""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from tessera.plan.request import Sequence

Key = tuple[int, ...]
MOST_REORDERED = 128  # a longer queue keeps first-come order: a match per waiting request is too dear


@dataclass(frozen=True, slots=True)
class Policy:
    """Order of a queue: `key(sequence, cached tokens)`, smallest first. `matches`: it depends on the prefix tree."""

    key: Callable[[Sequence, int], Key]
    matches: bool = False


def standing(sequence: Sequence, cached: int = 0) -> Key:
    """Place among all: higher priority first, then first come. Who stands last is preempted first."""
    return (-sequence.priority, sequence.arrival)


def _longest_prefix(sequence: Sequence, cached: int) -> Key:
    # what was preempted has waited once already, and goes before the rest
    return (-sequence.priority, not sequence.entered, -cached, sequence.arrival)


POLICIES = {
    "fcfs": Policy(standing),
    "priority": Policy(standing),
    "lpm": Policy(_longest_prefix, matches=True),
}


class Queue:
    """Sequences that wait for a row, best first. Who ends while waiting stays until it is next, or until most have."""

    def __init__(self, policy: str) -> None:
        self._key, self._matches = POLICIES[policy].key, POLICIES[policy].matches
        self._entries: deque[tuple[Key, Sequence]] = deque()  # sorted; most come at one end and all leave at the other
        self._sorted_at = -1
        self.num_waiting = 0

    def push(self, sequence: Sequence) -> None:
        """Adds a sequence."""
        key, entries = self._key(sequence, 0), self._entries
        if not entries or entries[-1][0] < key:
            entries.append((key, sequence))
        else:
            insort(entries, (key, sequence))
        self.num_waiting += 1
        self._sorted_at = -1

    def discard(self, sequence: Sequence) -> None:
        """Takes out a sequence that is no longer live."""
        assert not sequence.live
        self.num_waiting -= 1
        if len(self._entries) > 2 * self.num_waiting + MOST_REORDERED:
            self._entries = deque(entry for entry in self._entries if entry[1].live)

    def head(self) -> Sequence | None:
        """Who goes next."""
        entries = self._entries
        while entries and not entries[0][1].live:
            entries.popleft()
        return entries[0][1] if entries else None

    def pop(self) -> None:
        """Takes out the head."""
        self._entries.popleft()
        self.num_waiting -= 1

    def reorder(self, match: Callable[[Sequence], int], version: int) -> None:
        """Sorts anew by what the prefix tree holds at `version`, where the policy depends on it."""
        if not self._matches or self.num_waiting > MOST_REORDERED or version == self._sorted_at:
            return
        self._entries = deque(sorted((self._key(s, match(s)), s) for s in self.waiting()))
        self._sorted_at = version

    def waiting(self) -> list[Sequence]:
        """Live members, best first."""
        return [s for _, s in self._entries if s.live]
