"""A runner does what a step says: ranges, copies, changes; and nothing of an ended sequence comes out."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from run.toy import PLAIN, greedy, history_logits, toy_runner
from tessera.core.messages import Output, SamplingParams
from tessera.plan.step import NO_CHANGE, Change, Enter, Part, Step, StepDone, ints
from tessera.run.host import Inline, Worker
from tessera.run.runner import Runner

PROMPT = [5, 9, 3, 7, 11, 2, 30]


def enter(row: int, prompt: list[int], pages: list[int], params: SamplingParams = PLAIN, **other: object) -> Enter:
    """A sequence that enters with its whole prompt to compute; its slot is row + 1."""
    plain = Enter(row, f"r{row}", 0, ints(prompt), len(prompt), 0, ints(pages), row + 1, params, params.seed)
    return msgspec.structs.replace(plain, **other)


def step(index: int, ranges: list[tuple[int, int, int, bool]], change: Change = NO_CHANGE, logits: int = 1) -> Step:
    """Ranges as (row, start, length, samples)."""
    rows, starts, lengths, samples = (list(c) for c in zip(*ranges, strict=True)) if ranges else ([], [], [], [])
    num_logits = [logits if s or logits > 1 else 0 for s in samples]
    part = Part(ints(rows), ints(starts), ints(lengths), ints(num_logits), np.array(samples, np.bool_), change)
    return Step(index, (part,))


def run(runner: Runner, *steps: Step) -> list[tuple[StepDone, list[Output]]]:
    """Launches all, then collects all."""
    launched = [runner.launch(s) for s in steps]
    return [runner.collect(ticket) for ticket in launched]


def arrival(params: SamplingParams = PLAIN, **other: object) -> Change:
    """Row 0 enters with PROMPT on pages 1 .. 4 and a fresh slot."""
    return Change(enter=(enter(0, PROMPT, [1, 2, 3, 4], params, **other),), zero_slots=ints([1]))


def decodes(first: int, count: int) -> list[Step]:
    """Decode steps of row 0 after its prompt."""
    return [step(first + i, [(0, len(PROMPT) + i, 1, True)]) for i in range(count)]


@pytest.mark.parametrize("executor", [Inline, Worker])
def test_steps_in_flight_read_the_tokens_of_those_before(executor: type[Inline] | type[Worker]) -> None:
    runner = toy_runner(executor=executor())
    results = run(runner, step(0, [(0, 0, 7, True)], arrival()), *decodes(1, 4))
    runner.close()
    assert [o.tokens[0] for _, outputs in results for o in outputs] == greedy(PROMPT, 5)


def test_chunks_and_a_riding_decode_give_what_whole_prompts_give() -> None:
    runner = toy_runner()
    other = Change(enter=(enter(1, PROMPT[:3], [9, 8]),), zero_slots=ints([2]))
    results = run(
        runner,
        step(0, [(0, 0, 7, True)], arrival()),
        step(1, [(1, 0, 2, False), (0, 7, 1, True)], other),
        step(2, [(0, 8, 1, True), (1, 2, 1, True)]),
    )
    tokens = [(o.request_id, o.tokens[0]) for _, outputs in results for o in outputs]
    first, second = greedy(PROMPT, 3), greedy(PROMPT[:3], 1)
    assert tokens == [("r0", first[0]), ("r0", first[1]), ("r0", first[2]), ("r1", second[0])]


def test_a_fork_reads_copied_page_and_slot() -> None:
    runner = toy_runner()
    fork = enter(1, PROMPT, [1, 9], start=6, choice=1, request_id="r0")
    change = Change(enter=(fork,), page_copies=np.array([[2, 9]], np.int32), slot_copies=np.array([[1, 2]], np.int32))
    results = run(
        runner,
        step(0, [(0, 0, 6, False)], arrival()),
        step(1, [(0, 6, 1, True), (1, 6, 1, True)], change),
        step(2, [(0, 7, 1, True), (1, 7, 1, True)]),
    )
    tokens = {c: [o.tokens[0] for _, outputs in results for o in outputs if o.choice == c] for c in (0, 1)}
    assert tokens == {0: greedy(PROMPT, 2), 1: greedy(PROMPT, 2)}


def test_sources_of_copies_are_read_before_anything_is_written() -> None:
    runner = toy_runner()
    pages, slots = runner.pools.tensors.values()
    for i in range(6):
        pages[i], slots[i % 5] = 10.0 + i, 20.0 + i % 5
    swap = np.array([[1, 2], [2, 1]], np.int32)
    runner.pools.apply(Change(page_copies=swap, slot_copies=np.array([[1, 2], [2, 3]], np.int32), zero_slots=ints([1])))
    assert pages[:4, 0].tolist() == [10.0, 12.0, 11.0, 13.0]
    assert slots[:4, 0].tolist() == [20.0, 0.0, 21.0, 22.0]


@pytest.mark.parametrize(
    ("params", "eos", "count", "reason"),
    [
        (PLAIN, (), 8, "length"),
        (PLAIN, (2,), 3, "stop"),
        (msgspec.structs.replace(PLAIN, ignore_eos=True), (2,), 8, "length"),
        (msgspec.structs.replace(PLAIN, stop_token_ids=(1,)), (), 2, "stop"),
    ],
)
def test_a_sequence_ends_where_it_should_and_the_overshoot_is_dropped(
    params: SamplingParams, eos: tuple[int, ...], count: int, reason: str
) -> None:
    answer = greedy(PROMPT, 8)
    assert len(set(answer[:3])) == 3, "the case needs three different tokens"
    params = msgspec.structs.replace(params, stop_token_ids=tuple(answer[i] for i in params.stop_token_ids))
    runner = toy_runner(eos=tuple(answer[i] for i in eos))
    results = run(runner, step(0, [(0, 0, 7, True)], arrival(params)), *decodes(1, 8))
    outputs = [o for _, items in results for o in items]
    assert [o.tokens[0] for o in outputs] == answer[:count]
    assert [o.finish for o in outputs] == [None] * (count - 1) + [reason]
    assert outputs[-1].matched == (answer[count - 1] if reason == "stop" else None)
    finished = [bool(done.parts[0].finished[0]) for done, _ in results]
    assert finished == [i == count - 1 for i in range(9)]
    assert [int(done.parts[0].tokens[0, 0]) for done, _ in results[count:]] == [-1] * (9 - count)


def test_a_row_that_is_taken_again_is_not_confused_with_its_last_occupant() -> None:
    answer = greedy(PROMPT, 2)
    runner = toy_runner(eos=(answer[1],))
    other = Change(leave=ints([0]), enter=(enter(0, PROMPT[:3], [7], request_id="new"),), zero_slots=ints([1]))
    flying = [runner.launch(s) for s in (step(0, [(0, 0, 7, True)], arrival()), *decodes(1, 2))]
    results = [runner.collect(ticket) for ticket in flying[:2]]
    # Step 2 is an overshoot of the old sequence, still in flight when the row is taken again.
    flying = [flying[2], runner.launch(step(3, [(0, 0, 3, True)], other))]
    results += [runner.collect(ticket) for ticket in flying]
    outputs = [(o.request_id, o.tokens[0]) for _, items in results for o in items]
    assert outputs == [("r0", answer[0]), ("r0", answer[1]), ("new", greedy(PROMPT[:3], 1)[0])]


def test_nothing_comes_out_of_a_dropped_choice() -> None:
    runner = toy_runner()
    first, second = runner.launch(step(0, [(0, 0, 7, True)], arrival())), runner.launch(decodes(1, 1)[0])
    assert len(runner.collect(first)[1]) == 1
    runner.drop("r0", 0)
    done, outputs = runner.collect(second)
    assert outputs == []
    assert done.parts[0].tokens.tolist() == [[-1]]


def test_debug_mode_sees_a_slot_read_at_another_position() -> None:
    runner = toy_runner()
    run(runner, step(0, [(0, 0, 7, True)], arrival()))
    with pytest.raises(AssertionError, match="at positions \\[7\\], but their ranges start at \\[8\\]"):
        runner.launch(step(1, [(0, 8, 1, True)]))


def test_prompt_logprobs_are_gathered_over_chunks() -> None:
    params = msgspec.structs.replace(PLAIN, prompt_logprobs=2, logprob_start=2, token_ids_logprob=(4, 0))
    runner = toy_runner()
    results = run(
        runner,
        step(0, [(0, 0, 3, False)], arrival(params), logits=2),
        step(1, [(0, 3, 2, False)], logits=2),
        step(2, [(0, 5, 2, True)], logits=2),
    )
    entries = results[-1][1][0].prompt_logprobs
    assert entries is not None
    assert [o.prompt_logprobs for _, outputs in results[:-1] for o in outputs] == []
    for position, entry in zip(range(2, 7), entries, strict=True):
        logits = history_logits(PROMPT[:position])
        logprobs = logits - np.log(np.exp(logits).sum())
        assert entry.logprob == pytest.approx(logprobs[PROMPT[position]], abs=1e-9)
        assert entry.top_ids == np.argsort(-logprobs)[:2].tolist()
        assert entry.top_logprobs == pytest.approx(np.sort(logprobs)[::-1][:2])
        assert entry.asked_logprobs == pytest.approx(logprobs[[4, 0]])


def test_a_prompt_that_is_only_scored_ends_with_its_logprobs() -> None:
    params = msgspec.structs.replace(PLAIN, max_new_tokens=0, prompt_logprobs=0)
    runner = toy_runner()
    results = run(runner, step(0, [(0, 0, 7, False)], arrival(params), logits=7))
    (output,) = results[0][1]
    assert (output.tokens, output.finish) == ([], None), "the planner ends it"
    assert output.prompt_logprobs is not None
    assert [e.logprob is None for e in output.prompt_logprobs] == [True] + [False] * 6
