"""Text <-> tokens: the tokenizer, incremental detokenisation that never splits a character, and stop strings.

Only the `tokenizers` library is loaded (torch and transformers are not): a `tokenizer.json` says everything. A folder
without one is read by transformers once, if that ends in a fast tokenizer.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import tokenizers

REPLACEMENT = "\ufffd"
LONGEST_SPLIT = 3  # bytes of one character that may be missing their rest
MOST_FRESH = 8


def _byte_letters() -> dict[str, int]:
    """The letters by which byte-level BPE writes bytes (GPT-2's table): printable ones themselves, others from 256."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(b): b for b in plain}
    others = [b for b in range(256) if b not in table.values()]
    return table | {chr(256 + i): b for i, b in enumerate(others)}


BYTE_OF_LETTER = _byte_letters()


class Tokenizer:
    """A fast tokenizer with what serving asks of it.

    `special_ids` are skipped in text unless asked for. `longest`: characters of the longest token, so that a text which
    cannot fit is refused before it is encoded.
    """

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        self.inner = inner
        self.special_ids = frozenset(i for i, token in inner.get_added_tokens_decoder().items() if token.special)
        vocabulary = inner.get_vocab(with_added_tokens=True)
        self.size = max(vocabulary.values(), default=-1) + 1
        self.longest = max(map(len, vocabulary), default=1)
        self.token_bytes = functools.lru_cache(maxsize=1 << 16)(self._token_bytes)

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids of a text."""
        ids: list[int] = self.inner.encode(text, add_special_tokens=add_special).ids
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of token ids; ids outside the vocabulary are left out."""
        text: str = self.inner.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def _token_bytes(self, token: int) -> bytes:
        """The bytes that one token stands for, also where it is part of a character."""
        name = self.inner.id_to_token(token)
        if name is None:
            return b""
        if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            return bytes.fromhex(name[3:5])
        text = self.decode([token], skip_special=False)
        if REPLACEMENT in text and all(letter in BYTE_OF_LETTER for letter in name):
            return bytes(BYTE_OF_LETTER[letter] for letter in name)
        return text.encode()

    def token_text(self, token: int) -> str:
        """One token as text; bytes that are part of a character show as U+FFFD."""
        return self.token_bytes(token).decode(errors="replace")

    def token_name(self, token: int) -> str:
        """One token as a key: its text, or its bytes where they are part of a character (OpenAI's own convention)."""
        raw = self.token_bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


@dataclass(slots=True)
class Detokenizer:
    """Text of a growing list of tokens, in pieces that never split a character.

    A window of tokens is decoded again as it grows. It begins where earlier text ended, because a leading space and a
    run of bytes depend on what precedes them. U+FFFD at its end may be part of a character; up to 3 are held back.
    """

    tokenizer: Tokenizer
    skip_special: bool = True
    _window: list[int] = field(default_factory=list)
    _sent: str = ""  # how much of the window's text is out
    _fresh: int = 0  # tokens at the window's end since its text last ended with a whole character

    def push(self, token: int) -> str:
        """The text that this token completes."""
        if self.skip_special and token in self.tokenizer.special_ids:
            return ""
        self._window.append(token)
        self._fresh += 1
        text = self._decode(self._window)
        whole = _certain(text)
        new = ""
        if whole.startswith(self._sent):
            new, self._sent = whole[len(self._sent) :], whole
            if new and whole == text:
                self._restart(self._fresh)
        elif self._fresh > MOST_FRESH:
            new = _certain(self._decode(self._window[-self._fresh :]))
        if self._fresh > MOST_FRESH:  # bytes that never become a character: do not let the window grow
            self._restart(LONGEST_SPLIT + 1)
            self._fresh = LONGEST_SPLIT + 1  # its last bytes may still be the beginning of one
        return new

    def flush(self) -> str:
        """What was held back: the rest of the text, with U+FFFD for bytes that never became a character."""
        text = self._decode(self._window)
        new = text[len(self._sent) :] if text.startswith(self._sent) else self._decode(self._window[-self._fresh :])
        self._restart(0)
        return new

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, self.skip_special)

    def _restart(self, keep: int) -> None:
        self._window = self._window[len(self._window) - keep :]
        self._sent = _certain(self._decode(self._window))
        self._fresh = 0


def _certain(text: str) -> str:
    """A text without the U+FFFD at its end that further bytes may turn into a character."""
    return text[:-LONGEST_SPLIT] + text[-LONGEST_SPLIT:].rstrip(REPLACEMENT)


@dataclass(slots=True)
class StopMatcher:
    """Finds stop strings in text that comes in pieces, and holds back what may be the start of one.

    The match that ends first wins, the longest of those that end together; so cutting the text into other pieces
    changes nothing. `keep`: the stop string stays in the text.
    """

    stops: tuple[str, ...]
    keep: bool = False
    _held: str = ""

    def push(self, piece: str) -> tuple[str, str | None]:
        """Text that may go out, and the stop string if one was found (nothing must be pushed after that)."""
        if not self.stops:
            return piece, None
        text = self._held + piece
        found = [(at + len(stop), at, stop) for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            end, start, stop = min(found)
            self._held = ""
            return text[: end if self.keep else start], stop
        hold = max(_overlap(text, stop) for stop in self.stops)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold], None

    def flush(self) -> str:
        """What was held back: no stop string will come of it."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, shorter than `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
