"""Text comes out whole: no character is split, whatever tokens it came in; stop strings end it however it is cut."""

from __future__ import annotations

from pathlib import Path

import hypothesis.strategies as st
import pytest
import tokenizers
from hypothesis import given
from tokenizers import AddedToken, decoders, models, pre_tokenizers

import tessera
from serve.support import byte_tokenizer
from tessera.serve.text import REPLACEMENT, Detokenizer, StopMatcher, Tokenizer


def llama_like() -> Tokenizer:
    """Words begin with a space that decoding drops at the start of a text; unknown characters become bytes."""
    words = ["▁", "▁a", "▁b", "a", "b", "ab", "é", "▁éa"]
    vocab = {name: i for i, name in enumerate(["<unk>", *(f"<0x{i:02X}>" for i in range(256)), *words])}
    inner = tokenizers.Tokenizer(models.BPE(vocab, [("▁", "a"), ("▁", "b"), ("a", "b")], byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Sequence(parts)
    inner.add_special_tokens([AddedToken("</s>", special=True)])
    return Tokenizer(inner)


ASSETS = Path(tessera.__file__).parent / "assets"
BYTES = Tokenizer(byte_tokenizer())
TOKENIZERS = {
    "bytes": BYTES,
    "abacus": Tokenizer(tokenizers.Tokenizer.from_file(str(ASSETS / "abacus-hybrid" / "tokenizer.json"))),
    "llama": llama_like(),
}
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


def pieces(tokenizer: Tokenizer, ids: list[int], skip_special: bool = True) -> list[str]:
    detokenizer = Detokenizer(tokenizer, skip_special)
    return [*(detokenizer.push(i) for i in ids), detokenizer.flush()]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=ANY_TEXT)
def test_no_character_is_split(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text, add_special=False)
    got = pieces(tokenizer, ids)
    assert "".join(got) == tokenizer.decode(ids)
    if REPLACEMENT not in text and tokenizer.decode(ids) == text:
        assert not any(REPLACEMENT in piece for piece in got), got


@pytest.mark.parametrize("name", ["bytes", "abacus"])  # byte fallback shows bytes otherwise once wrong ones follow
@given(data=st.data())
def test_any_tokens_give_the_text_of_all_of_them(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, tokenizer.size - 1), max_size=60))
    for skip in (True, False):
        assert "".join(pieces(tokenizer, ids, skip)) == tokenizer.decode(ids, skip)


def test_a_character_comes_with_its_last_byte() -> None:
    euro = list("€".encode())
    assert pieces(BYTES, [*euro, 33]) == ["", "", "€", "!", ""]


def test_bytes_that_never_become_a_character_do_not_hold_the_text_back() -> None:
    got = pieces(BYTES, [0xE2] * 30 + [65])
    assert got[-2].endswith("A")
    assert max(map(len, got)) < 16


def test_a_character_right_after_bytes_that_are_none_comes_once() -> None:
    ids = [0x80] * 8 + [0xC2, 0x80]
    assert "".join(pieces(BYTES, ids)) == BYTES.decode(ids)


def test_a_long_answer_costs_the_same_per_token_at_its_end() -> None:
    detokenizer = Detokenizer(BYTES)
    for token in b"word " * 500:
        detokenizer.push(token)
        assert len(detokenizer._window) <= 16


def test_the_bytes_of_a_token_are_known_where_it_is_part_of_a_character() -> None:
    assert [BYTES.token_bytes(b) for b in "€".encode()] == [b"\xe2", b"\x82", b"\xac"]
    assert BYTES.token_text(0xE2) == REPLACEMENT
    assert BYTES.token_name(0xE2) == "bytes:\\xe2"
    assert BYTES.token_bytes(256) == b"<|endoftext|>"


# -- stop strings ------------------------------------------------------------------------------------------------------

SHORT = st.text("ab", min_size=1, max_size=4)


def cut_by(text: str, stops: tuple[str, ...], keep: bool) -> tuple[str, str | None]:
    """The plain rule: the match that ends first wins, the longest of those that end together."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end if keep else end - len(stop)], stop
    return text, None


@given(cuts=st.lists(st.text("ab", max_size=3), max_size=12), stops=st.lists(SHORT, max_size=3), keep=st.booleans())
def test_cutting_text_into_other_pieces_changes_nothing(cuts: list[str], stops: list[str], keep: bool) -> None:
    matcher = StopMatcher(tuple(stops), keep)
    out, found = "", None
    for piece in cuts:
        new, found = matcher.push(piece)
        out += new
        if found is not None:
            break
    if found is None:
        out += matcher.flush()
    assert (out, found) == cut_by("".join(cuts), tuple(stops), keep)


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    matcher = StopMatcher(("###",))
    assert matcher.push("a#") == ("a", None)
    assert matcher.push("#b") == ("##b", None)
    assert matcher.push("##") == ("", None)
    assert matcher.push("#c") == ("", "###")
