"""Hand-over of a computed prompt from a prefill server to a decode server: what the two say, hear and do.

What moves is the state of the prompt, and with the record the first token, which prefill draws: so decode tells it as
soon as the record is in, and it waits for no step there. Where several choices go on from a prompt, or where nothing is
drawn, the last token of the prompt is decode's to compute: each choice draws its first token from it, as one does that
was forked (see `RankState.fork`). What is drawn follows from seed, position and what came before, so of sampling only
the seed travels, decode's; and either server knows from the request alone who draws, so nothing is drawn twice.

A *room* is one request's hand-over. Both sides run a machine of the same shape, `apply(event) -> [action]`: `Giver` at
prefill, `Taker` at decode. Neither has a clock, a socket or a page. Four letters pass between them:

    taker -> giver   Reserve   pages and slot are yours to write, under this generation
    giver -> taker   Sent      every write has landed on every rank, the record is this           (terminal)
    giver -> taker   Closed    nothing of mine is under way for this generation, nor ever will be (terminal)
    taker -> giver   Over      taken, or given up and why                                         (terminal)

Letters may be lost, late, doubled or in any order. Three rules keep that harmless. A generation is given out once by a
taker, and names a reservation, so a letter about another one means nothing. (It is the taker's `key` of the request:
each side numbers its own, and no number comes twice.) A taker frees pages only after `Sent` or
`Closed` of their generation, or when every one of its ranks has fenced the peer; a deadline ends a request, but frees
no page. A giver that has closed a generation remembers it until the taker says (`floor`) that it is past it.

What decode refuses, or cannot serve since the two servers do not fit, it says by `Over` too, so that the other half of
the pair ends at once: prefill does not know for which of its rooms a decode server comes.

A *peer* is a session between two servers: when the connection ends, or the other side is another process than before,
it is another peer, and all that was agreed with the old one is void.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import msgspec

from tessera.core.messages import Address, Fault, HandoverTimes, Output, Submit, TokenLogprobs
from tessera.plan.step import Clock, Ints


@dataclass(frozen=True, slots=True)
class HandoffConfig:
    """The part a planner plays (`role`: "prefill" or "decode") and its deadlines, in seconds.

    `num_writers`: ranks of a DP rank, which all write. `num_ranks`: ranks of the instance, which all fence.
    `bootstrap_s`: how long one half of a pair waits at prefill for the other. `meet_s`: for a prefill server to answer.
    `waiting_s`: for pages, then for the prompt, at decode. `reply_s`: for the answer to `Sent` or `Over`; `Over` is
    said again every `retry_s`. `keep_s`: for so long one half of a pair that is over is remembered, for the other one.
    """

    role: str
    num_writers: int = 1
    num_ranks: int = 1
    bootstrap_s: float = 300.0
    meet_s: float = 300.0
    waiting_s: float = 300.0
    reply_s: float = 10.0
    retry_s: float = 1.0
    keep_s: float = 60.0


class Why(msgspec.Struct, frozen=True):
    """Why a room ended before its time. `fault` None: somebody aborted it; nothing went wrong."""

    text: str
    fault: Fault | None = "engine"


ABORTED = Why("the request was aborted", None)


# -- letters -----------------------------------------------------------------------------------------------------------


class Prompt(msgspec.Struct, frozen=True):
    """What both sides must mean by a room: how many tokens move, and a checksum over all of the prompt."""

    num_tokens: int
    checksum: int


def drawn_first(submit: Submit) -> bool:
    """Prefill draws the first token; else decode computes the last one of the prompt."""
    return submit.n == 1 and submit.params.max_new_tokens > 0


def num_moved(submit: Submit, num_prompt: int) -> int:
    """Tokens of a prompt whose state moves: all, but for one that decode computes."""
    return num_prompt - (not drawn_first(submit))


def prompt_of(submit: Submit, tokens: Ints) -> Prompt:
    """What is handed over of a request whose prompt is `tokens`."""
    return Prompt(num_moved(submit, len(tokens)), zlib.crc32(tokens.tobytes()))


class First(msgspec.Struct, frozen=True):
    """The first token, as prefill has drawn it; its logprobs, where they were asked for. `ends`: it is EOS or a stop
    token, so the request ends by it."""

    token: int
    logprobs: list[TokenLogprobs] | None = None
    ends: bool = False


class Reserve(msgspec.Struct, tag=True, frozen=True, eq=False):
    """`pages` and `slot` (-1: none) of DP rank `dp_rank` may be written. Generations below `floor` are over. `seed`:
    what the request draws with, on both sides, where it names none too."""

    room: int
    generation: int
    floor: int
    prompt: Prompt
    dp_rank: int
    pages: Ints
    slot: int
    seed: int = 0


class Sent(msgspec.Struct, tag=True, frozen=True):
    """The record: everything has landed. Goes last, and is checked before first use. `scores`: logprobs of the prompt,
    where they were asked for. `num_cached`: tokens of it that prefill had in its prefix cache. `first`: see
    `drawn_first`."""

    generation: int
    prompt: Prompt
    times: HandoverTimes | None = None
    scores: list[TokenLogprobs] | None = None
    num_cached: int = 0
    first: First | None = None


class Closed(msgspec.Struct, tag=True, frozen=True):
    """The room has failed at prefill, or is given up there as was asked; no write is under way or will be."""

    generation: int
    why: Why


class Over(msgspec.Struct, tag=True, frozen=True):
    """The room has ended at decode, perhaps before anything was reserved. `why` None: the prompt was taken."""

    generation: int
    room: int
    why: Why | None = None


Letter = Reserve | Sent | Closed | Over


# -- events ------------------------------------------------------------------------------------------------------------


class Heard(msgspec.Struct, tag=True, frozen=True, eq=False):
    """A letter came."""

    peer: str
    letter: Letter


class Met(msgspec.Struct, tag=True, frozen=True):
    """The server at `address` is peer `peer`; the two fit."""

    address: Address
    peer: str


class Unmet(msgspec.Struct, tag=True, frozen=True):
    """The server at `address` cannot be reached, or does not fit. `peer`: a session in which it can be told so, and in
    which nothing can be written; empty: there is none."""

    address: Address
    why: Why
    peer: str = ""


class Joined(msgspec.Struct, tag=True, frozen=True):
    """At prefill: a decode server has met this one, as `peer`. If the two do not fit, all that it says is `Over`."""

    peer: str


class Gone(msgspec.Struct, tag=True, frozen=True):
    """Peer `peer` has gone, is silent, or has become another."""

    peer: str
    reason: str


class Fenced(msgspec.Struct, tag=True, frozen=True):
    """No write of `peer` can land on rank `rank` any more."""

    peer: str
    rank: int


class Written(msgspec.Struct, tag=True, frozen=True):
    """What rank `rank` had to write of a ticket is over, after `seconds`. `error` None: it has landed."""

    ticket: int
    rank: int
    num_bytes: int = 0
    error: str | None = None
    seconds: float = 0.0


class Scored(msgspec.Struct, tag=True, frozen=True):
    """At prefill: what the ranks tell of a prompt with the step that computed the last of it, for the record."""

    request_id: str
    scores: list[TokenLogprobs] | None
    first: First | None = None


def scored(output: Output) -> Scored:
    """What a rank told."""
    if not output.parting:
        return Scored(output.request_id, output.prompt_logprobs)
    (token,) = output.tokens
    return Scored(
        output.request_id, output.prompt_logprobs, First(token, output.logprobs, ends=output.finish == "stop")
    )


Wire = Heard | Met | Unmet | Joined | Gone | Fenced | Written  # what comes from outside the planner


class Opened(msgspec.Struct, frozen=True):
    """A request came that belongs to `room`. `address`: of the prefill server, `seed`: what it draws with, at decode.
    `awaits`: at prefill the record is not whole before `Noted`."""

    key: int
    room: int
    prompt: Prompt
    address: Address | None = None
    awaits: bool = False
    seed: int = 0


class Refused(msgspec.Struct, frozen=True):
    """A request of `room` came that cannot be served. At decode it has a `key`, and the `address` of its other half."""

    room: int
    why: Why
    key: int = -1
    address: Address | None = None


class Cancelled(msgspec.Struct, frozen=True):
    """The request is to end: its client has left, or the engine stops."""

    key: int
    why: Why = ABORTED


class Leased(msgspec.Struct, frozen=True, eq=False):
    """At decode: pages and slot are set aside, and no step in flight touches them any more."""

    key: int
    dp_rank: int
    pages: Ints
    slot: int


class Noted(msgspec.Struct, frozen=True):
    """At prefill: what goes into the record of a request."""

    key: int
    scores: list[TokenLogprobs] | None
    first: First | None = None


class Ticketed(msgspec.Struct, frozen=True):
    """At prefill: a step was planned that writes. `last`: with it all of the prompt is written. `num_cached`: tokens
    of the prompt that were not computed but found."""

    key: int
    ticket: int
    last: bool
    num_cached: int = 0


class Computed(msgspec.Struct, frozen=True):
    """At prefill: the step that computed the last of a prompt is done."""

    key: int


Inner = Opened | Refused | Cancelled | Leased | Ticketed | Computed | Noted | Clock  # what comes from the planner


# -- actions -----------------------------------------------------------------------------------------------------------


class Tell(msgspec.Struct, frozen=True, eq=False):
    """Send a letter."""

    peer: str
    letter: Letter


class Meet(msgspec.Struct, frozen=True):
    """Find out who is at `address` and whether it fits: answered by `Met` or `Unmet`."""

    address: Address


class Fence(msgspec.Struct, frozen=True):
    """Leave `peer` and fence it: answered by a `Fenced` of every rank."""

    peer: str


Errand = Tell | Meet | Fence  # for the outside


class Want(msgspec.Struct, frozen=True):
    """At decode: set pages and a slot aside for the request, then say `Leased`."""

    key: int


class Arrive(msgspec.Struct, frozen=True):
    """At decode: the prompt is there, perhaps with the `first` token; the request goes on, unless that one ends it."""

    key: int
    times: HandoverTimes
    scores: list[TokenLogprobs] | None = None
    num_cached: int = 0
    first: First | None = None


class Start(msgspec.Struct, frozen=True, eq=False):
    """At prefill: compute the prompt and write it where `reserve` says, at `peer`."""

    key: int
    peer: str
    reserve: Reserve


class Free(msgspec.Struct, frozen=True):
    """Nobody writes or reads pages and slot of the request for the hand-over any more, if it has any. Said once of
    every request but those that arrive, before or after its `End`."""

    key: int


class End(msgspec.Struct, frozen=True):
    """The request ends. `why` None: it was handed over. What it holds stays until `Free`."""

    key: int
    why: Why | None
    times: HandoverTimes | None = None


Order = Want | Arrive | Start | Free | End  # for the planner
Action = Errand | Order
