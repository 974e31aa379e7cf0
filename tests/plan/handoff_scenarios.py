"""Schedules of hand-overs by hand: each needs one promise, and runs clean where that promise is kept."""

from __future__ import annotations

from plan.fake import EOS, request
from plan.pair import HOME, Item, Pair, Side, Write, config, paired
from tessera.core.messages import Submit
from tessera.plan.handoff import Closed, Gone, Over, Reserve, Unmet, Why

PROMPT = [1, 2, 3, 4, 5, 1, 2, 3, 4]  # two pages of 4 and a token, the last one; 2 chunks of 5


def tight(num_pages: int = 4, **fields: object) -> dict[str, object]:
    """So few pages that the next request gets those of the last."""
    return {"num_pages": num_pages, "num_slots": 2, "max_running": 2, **fields}


def pair(prefill: dict[str, object] | None = None, decode: dict[str, object] | None = None) -> Pair:
    return Pair(config("prefill", **(prefill or {})), config("decode", **(decode or {})))


def both(pair: Pair, name: str, room: int, tokens: list[int] = PROMPT, max_new: int = 3, **fields: object) -> Submit:
    """A request goes to both servers."""
    submit = paired(request(name, tokens, max_new, ignore_eos=True, **fields), tokens, room)
    for side in pair.sides.values():
        side.submit(submit)
    pair.run_errands()
    return submit


def carry(pair: Pair) -> None:
    """All that is under way arrives, but writes."""
    while pair.bag:
        pair.deliver(pair.bag.pop(0))
        pair.run_errands()


def work(pair: Pair, role: str) -> Side:
    """A server computes all that it can."""
    side = pair.sides[role]
    while side.turn():
        pair.run_errands()
    return side


def writing(pair: Pair) -> list[Write]:
    """Prefill has computed the one prompt; its writes are under way."""
    both(pair, "first", 1)
    carry(pair)
    work(pair, "prefill")
    assert pair.writes
    return pair.writes


def own(pair: Pair) -> None:
    """A request of decode's own takes pages if some are free, and while it runs all writes that are under way land."""
    side = pair.sides["decode"]
    side.submit(request("own", [5, 5, 4, 4, 3, 3, 2, 2, 1], 4, ignore_eos=True))
    while not side.got["own", 0] and side.turn():
        pass
    while pair.writes:
        pair.land(pair.writes.pop(0))
    while side.turn():
        pass


def aborted_while_written() -> Pair:
    """Decode gives up while prefill writes: a write that lands late hits nobody."""
    p = pair(decode=tight())
    writing(p)
    p.sides["decode"].abort("first")
    own(p)
    p.drain()
    return p


def out_of_time_while_written() -> Pair:
    """The same by a deadline."""
    p = pair(decode=tight())
    writing(p)
    p.tick(16.0)
    assert p.sides["decode"].ends["first", 0].finish == "error"
    own(p)
    p.drain()
    return p


def dead_while_writing() -> Pair:
    """Prefill dies; what it posted may land until it is fenced."""
    p = pair(decode=tight())
    writing(p)
    p.kill("prefill")
    decode = p.sides["decode"]
    (news,) = [item for item in p.bag if isinstance(item.what, Gone)]
    p.bag.remove(news)
    p.deliver(news)
    assert decode.ends["first", 0].finish == "error"
    own(p)
    p.drain()
    return p


def told_at_once() -> Pair:
    """An abort at either side frees both in one round trip, without the clock."""
    for role in ("prefill", "decode"):
        p = pair()
        both(p, "first", 1)
        carry(p)
        p.sides["prefill"].turn()
        p.run_errands()
        p.sides[role].abort("first")
        while p.writes:
            p.land(p.writes.pop())
        p.run_errands()
        carry(p)
        work(p, "prefill")
        for side in p.sides.values():
            assert ("first", 0) in side.ends, f"{side.name} was not told"
            assert side.planner.idle, f"{side.name} holds on"
            side.verify()
    return p


def asked_too_late() -> Pair:
    """A reservation that comes after it was given up begins nothing, though its room is used again."""
    p = pair(decode=tight())
    decode, prefill = p.sides["decode"], p.sides["prefill"]
    first = paired(request("first", PROMPT, 3), PROMPT, 1)
    decode.submit(first)
    p.run_errands()
    p.deliver(p.bag.pop())  # they meet
    p.run_errands()
    (asked,) = p.bag
    decode.abort("first")
    p.run_errands()
    p.bag.remove(asked)
    carry(p)
    prefill.submit(first)
    assert prefill.ends["first", 0].finish == "abort", "it is wanted no more"
    p.bag.append(asked)
    carry(p)
    prefill.submit(paired(request("again", PROMPT, 3), PROMPT, 1))
    work(p, "prefill")
    own(p)
    p.drain()
    return p


def doubled_record() -> Pair:
    """The record of one request comes again while the next one waits for its own."""
    p = pair(decode={"max_running": 2})
    both(p, "first", 1)
    carry(p)
    work(p, "prefill")
    while p.writes:
        p.land(p.writes.pop())
    p.run_errands()
    (record,) = p.bag
    carry(p)
    both(p, "second", 2, [5, 4, 3, 2, 1, 5, 4, 3, 2])
    carry(p)
    p.deliver(record)
    work(p, "decode")
    p.drain()
    return p


def different_prompts() -> Pair:
    """The two servers were sent different prompts."""
    p = pair()
    one = request("first", PROMPT, 3)
    p.sides["prefill"].submit(paired(one, [*PROMPT[:-1], 5], 1))
    p.sides["decode"].submit(paired(one, PROMPT, 1))
    p.run_errands()
    p.drain()
    for side in p.sides.values():
        assert "different prompts" in (side.ends["first", 0].error or "")
    return p


def half_written() -> Pair:
    """One of two ranks has written, the other has not."""
    p = pair()
    writes = writing(p)
    for write in [w for w in writes if w.writer == 0]:
        writes.remove(write)
        p.land(write)
    p.run_errands()
    carry(p)
    work(p, "decode")
    p.drain()
    return p


def one_write_fails() -> Pair:
    """All has landed but what one rank wrote last, the state among it: the room fails, and both are told."""
    p = pair()
    *writes, last = writing(p)
    p.writes.clear()
    for write in writes:
        p.land(write)
    p.land(last, fails=True)
    p.run_errands()
    carry(p)
    work(p, "decode")
    for side in p.sides.values():
        end = side.ends["first", 0]
        assert (end.finish, "could not be written" in (end.error or "")) == ("error", True), side.name
        assert side.planner.idle, f"{side.name} holds on"
    p.drain()
    return p


def refused_at_prefill() -> Pair:
    """Decode has asked when prefill gets a request that it cannot serve: decode hears it at once."""
    p = pair(prefill={"max_context": len(PROMPT)})
    submit = paired(request("first", PROMPT, 3), PROMPT, 1)
    p.sides["decode"].submit(submit)
    p.run_errands()
    carry(p)
    p.sides["prefill"].submit(submit)
    p.run_errands()
    carry(p)
    work(p, "decode")
    for side in p.sides.values():
        end = side.ends["first", 0]
        assert (end.finish, "tokens" in (end.error or "")) == ("error", True), side.name
        assert side.planner.idle, f"{side.name} holds on"
    p.drain()
    return p


def aborted_at_prefill() -> Pair:
    """Prefill's pages stay as they are while they are written from: decode's answer is right, or none."""
    p = pair(prefill=tight(), decode={})
    writing(p)
    p.sides["prefill"].abort("first")
    p.run_errands()
    both(p, "second", 2, [5, 5, 4, 4, 3, 3, 2, 2, 1])
    carry(p)
    for write in p.writes[:]:
        p.writes.remove(write)
        p.land(write)
    p.run_errands()
    carry(p)
    p.drain()
    return p


def overshoot_in_flight() -> Pair:
    """A request is aborted with steps in flight: they still write its pages, which are reserved for another."""
    p = pair(decode=tight(max_in_flight=2))
    decode = p.sides["decode"]
    decode.submit(request("own", [5, 5, 4, 4, 3, 3, 2, 2, 1], 3, ignore_eos=True))
    while decode.launch():
        pass
    decode.abort("own")
    both(p, "first", 1)
    carry(p)
    work(p, "prefill")
    while p.writes:
        p.land(p.writes.pop())
    p.run_errands()
    p.drain()
    return p


def twins() -> Pair:
    """Two prompts share pages at prefill once the first is done; what the second wrote from stays until it is sent."""
    p = pair(prefill=tight(8, num_slots=0, prefix_cache=True, chunk_size=0), decode={"num_slots": 0})
    both(p, "first", 1)
    both(p, "second", 2)
    carry(p)
    work(p, "prefill")
    late = [write for write in p.writes if write.send.key == 1]
    for write in [write for write in p.writes if write not in late]:
        p.writes.remove(write)
        p.land(write)
    p.run_errands()
    carry(p)
    both(p, "third", 3, [5, 5, 4, 4, 3, 3, 2, 2, 1])
    carry(p)
    work(p, "prefill")
    p.drain()
    return p


def nobody_there() -> Pair:
    """There is no prefill server at the address."""
    p = pair()
    both(p, "first", 1)
    p.bag.clear()
    p.sides["decode"].hear_wire(Unmet(HOME, Why("connection refused")))
    assert p.sides["decode"].ends["first", 0].error == "connection refused"
    p.drain()
    return p


def does_not_fit() -> Pair:
    """The two servers do not fit: both halves end at once with the reason, whichever came first."""
    for first in ("prefill", "decode"):
        p = pair()
        p.misfit = why = "layers.0.kv: prefill has pages of 4 tokens, decode of 8"
        submit = paired(request("first", PROMPT, 3), PROMPT, 1)
        for role in (first, *(p.sides.keys() - {first})):
            p.sides[role].submit(submit)
            p.run_errands()
            carry(p)
        for side in p.sides.values():
            assert ("first", 0) in side.ends, f"{side.name} is not told"
            assert side.ends["first", 0].error == why
            assert side.planner.idle, f"{side.name} holds on"
        assert not any(session.up for session in p.sessions.values()), "the line stays open"
        p.drain()
    return p


def refused_at_decode() -> Pair:
    """Decode gets a request that it cannot serve, before it has met prefill or after: prefill hears it at once."""
    p = pair(decode={"max_context": len(PROMPT)})
    for room in (1, 2):
        both(p, f"r{room}", room)
        carry(p)
        for side in p.sides.values():
            assert (f"r{room}", 0) in side.ends, f"{side.name} is not told"
            end = side.ends[f"r{room}", 0]
            assert (end.finish, "tokens" in (end.error or "")) == ("error", True), side.name
            assert side.planner.idle, f"{side.name} holds on"
    assert len(p.sessions) == 1, "they met once"
    p.drain()
    return p


def cut_before_it_is_asked_for() -> Pair:
    """The line is cut while decode has no pages yet: it meets prefill again to say that the request has ended."""
    p = pair(decode=tight())
    both(p, "other", 1)
    carry(p)
    both(p, "first", 2)
    (session,) = p.sessions.values()
    for side in p.sides.values():
        p.bag.append(Item(side, Gone(session.name, "the line was cut"), session))
    carry(p)
    for side in p.sides.values():
        assert "has gone" in (side.ends["first", 0].error or ""), side.name
    p.drain()
    return p


def lost_answer() -> Pair:
    """Prefill's last word is lost: decode asks again, and frees nothing before."""
    p = pair()
    both(p, "first", 1)
    carry(p)
    p.sides["decode"].abort("first")
    p.run_errands()
    assert [type(item.what.letter) for item in p.bag] == [Over]  # type: ignore[union-attr]
    p.deliver(p.bag.pop())
    p.run_errands()
    assert [type(item.what.letter) for item in p.bag] == [Closed]  # type: ignore[union-attr]
    p.bag.clear()
    assert not p.sides["decode"].planner.idle
    p.tick(1.0)
    p.run_errands()
    carry(p)
    assert p.sides["decode"].planner.idle
    p.drain()
    return p


def aborted_before_it_is_asked_for() -> Pair:
    """Decode has no room yet, or has not met prefill yet, when it is aborted: prefill is told at once."""
    for met in (False, True):
        p = pair(decode=tight())
        if met:
            both(p, "other", 1)
            carry(p)
        both(p, "first", 2)
        p.sides["decode"].abort("first")
        p.run_errands()
        carry(p)
        assert p.sides["prefill"].ends["first", 0].finish == "abort"
        p.drain()
    return p


def told_before_a_step() -> Pair:
    """The first token comes with the record: its client has it while decode's steps run, and before a row is free."""
    p = pair(decode={"max_running": 2, "max_in_flight": 2})
    decode = p.sides["decode"]
    writing(p)
    for name in ("own", "more"):
        decode.submit(request(name, [5, 4, 3], 6, ignore_eos=True))
    while decode.launch():
        pass
    for write in p.writes[:]:
        p.writes.remove(write)
        p.land(write)
    p.run_errands()
    num_steps = len(decode.steps)
    carry(p)
    assert len(decode.got["first", 0]) == 1, "it waits for a step"
    assert len(decode.steps) == num_steps
    p.drain()
    return p


def written_before_it_is_told() -> Pair:
    """Ranks write when they have run a step, of which the planner has not heard yet: nor of the token."""
    p = pair()
    both(p, "first", 1, [1, 2, 3])
    carry(p)
    prefill = p.sides["prefill"]
    while prefill.launch():
        pass
    prefill.execute()
    p.run_errands()
    for write in p.writes[:]:
        p.writes.remove(write)
        p.land(write)
    p.run_errands()
    carry(p)
    assert not p.sides["decode"].got["first", 0]
    p.drain()
    return p


def ended_by_its_first_token() -> Pair:
    """A request that wants one token, and one whose first token is EOS, take no row at decode."""
    p = pair()
    both(p, "one", 1, max_new=1)
    submit = paired(request("eos", [1, 2, 1], 3, seed=1), [1, 2, 1], 2)
    for side in p.sides.values():
        side.submit(submit)
    p.run_errands()
    p.drain()
    decode = p.sides["decode"]
    assert not decode.steps
    assert decode.ends["one", 0].finish == "length"
    assert (decode.ends["eos", 0].finish, decode.ends["eos", 0].matched) == ("stop", EOS)
    assert [decode.ends[name, 0].tokens for name in ("one", "eos")] == [decode.got["one", 0], [EOS]]
    return p


def asked_for_at_once() -> Pair:
    """Pages that nobody held for a while are reserved while steps run: those touch others."""
    p = pair(decode={"max_in_flight": 2})
    decode = p.sides["decode"]
    both(p, "meets", 1)
    p.drain()
    decode.submit(request("own", [5, 4, 3], 6, ignore_eos=True))
    decode.turn()
    while decode.launch():
        pass
    both(p, "first", 2)
    assert [type(item.what.letter) for item in p.bag] == [Reserve], "it waits for steps"  # type: ignore[union-attr]
    p.drain()
    return p


def seeds_of_their_own() -> Pair:
    """A request without a seed gets one of either server: decode's holds."""
    p = pair()
    for role, seed in (("prefill", 8), ("decode", 5)):
        p.sides[role].submit(paired(request("first", PROMPT, 3, ignore_eos=True, seed=seed), PROMPT, 1))
    p.run_errands()
    p.drain()
    assert p.sides["decode"].ends["first", 0].finish == "length"
    return p


def one_token_left_of_a_prompt() -> Pair:
    """A chunk ends one token short of the prompt: the last one is sent too."""
    p = pair()
    both(p, "first", 1, PROMPT[:6])
    p.drain()
    assert p.sides["decode"].ends["first", 0].finish == "length"
    return p


ALL = (
    told_before_a_step,
    written_before_it_is_told,
    ended_by_its_first_token,
    asked_for_at_once,
    seeds_of_their_own,
    one_token_left_of_a_prompt,
    one_write_fails,
    refused_at_prefill,
    refused_at_decode,
    cut_before_it_is_asked_for,
    does_not_fit,
    aborted_before_it_is_asked_for,
    aborted_while_written,
    out_of_time_while_written,
    dead_while_writing,
    told_at_once,
    asked_too_late,
    doubled_record,
    different_prompts,
    half_written,
    aborted_at_prefill,
    overshoot_in_flight,
    twins,
    nobody_there,
    lost_answer,
)
