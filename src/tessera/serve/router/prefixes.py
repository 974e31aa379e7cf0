"""What servers probably hold in their prefix caches: an approximate prefix tree of the prompts that went to each.

A prompt (text, or token ids) is cut into blocks; a node of the tree is a whole prefix of blocks, known by a hash that
chains over them (as vLLM keys its cached blocks). A node lists the servers that saw it. The tree is bounded: the
nodes used longest ago go first, and a node never outlives its parent.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

TEXT_BLOCK = 64  # characters
TOKEN_BLOCK = 16  # tokens: about as much
MOST_NODES = 1 << 17  # of all servers together


class Prefixes:
    """Prefixes by server. `block`: characters of a block of text, a quarter as many token ids."""

    def __init__(self, most: int = MOST_NODES, text_block: int = TEXT_BLOCK, token_block: int = TOKEN_BLOCK) -> None:
        self._most, self._text, self._token = most, text_block, token_block
        self._nodes: OrderedDict[int, set[str]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._nodes)

    def shares(self, prompt: str | Sequence[int]) -> dict[str, float]:
        """For each server that saw some beginning of the prompt: its share of the prompt, 0 to 1."""
        found: dict[str, float] = {}
        size, still = self._size(prompt), None
        for count, key in enumerate(self._keys(prompt), 1):
            holders = self._nodes.get(key)
            still = holders if still is None or holders is None else still & holders
            if not still:
                break
            found.update(dict.fromkeys(still, min(1.0, count * size / len(prompt))))
        return found

    def add(self, server: str, prompt: str | Sequence[int]) -> None:
        """`server` saw the prompt."""
        keys = list(self._keys(prompt))
        for key in keys:
            self._nodes.setdefault(key, set()).add(server)
        for key in reversed(keys):  # so that a parent was used later than its children, and outlives them
            self._nodes.move_to_end(key)
        while len(self._nodes) > self._most:
            self._nodes.popitem(last=False)

    def remove(self, server: str) -> None:
        """`server` saw nothing, after all."""
        for holders in self._nodes.values():
            holders.discard(server)
        for key in [key for key, holders in self._nodes.items() if not holders]:
            del self._nodes[key]

    def _size(self, prompt: str | Sequence[int]) -> int:
        return self._text if isinstance(prompt, str) else self._token

    def _keys(self, prompt: str | Sequence[int]) -> Iterator[int]:
        """The hash of every prefix of whole blocks; a prompt shorter than a block is one block."""
        size, key = self._size(prompt), hash(type(prompt) is str)
        for start in range(0, max(len(prompt) - size, 0) + 1, size):
            part = prompt[start : start + size]
            key = hash((key, part if isinstance(part, str) else tuple(part)))
            yield key
