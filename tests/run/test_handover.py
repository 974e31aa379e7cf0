"""Promise: a prompt that one server computed and another answers gets the tokens of one device, whatever the two
layouts; and when either side goes, or is left, both are told and everything is free."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from run.pd import WAIT_S, Pair, Server
from tessera.core.errors import ConfigError
from tessera.core.messages import SamplingParams, Submit
from tessera.plan.step import Send
from tessera.run import loop
from tessera.run.build import build_instance
from tessera.run.poster import Poster
from tessera.run.runner import Runner
from tiny import Answer, Run, TinyModel, resolved, serve, tiny_model

MODELS = {name: tiny_model(name) for name in ("qwen3", "hybrid", "mla")}
EXACT = {"dtype": "float64", "chunked_prefill_size": 16, "watchdog_timeout": 60.0}
LONG = SamplingParams(temperature=0.0, max_new_tokens=200, ignore_eos=True)


def dp(tp: int, groups: int) -> dict[str, Any]:
    return {"tp": tp, "dp": groups, "enable_dp_attention": True}


def prompt(i: int, length: int) -> list[int]:
    return [2 + (i * 7 + k * (1 + i % 3)) % 90 for k in range(length)]


def requests(count: int) -> list[Submit]:
    """Short and long ones, greedy and sampled, some with logprobs, some with several choices; one of one token."""
    made = []
    for i in range(count):
        params = SamplingParams(
            temperature=float(i % 2),
            seed=i,
            max_new_tokens=3 + i % 6,
            logprobs=2 if i % 3 == 0 else -1,
            prompt_logprobs=1 if i % 4 == 1 else -1,
            logprob_start=2 * (i % 8 == 5),
            repetition_penalty=1.3 if i % 5 == 0 else 1.0,
        )
        made.append(Submit(f"r{i}", prompt(i, 1 + (i * 5) % 70), params, 1 + (i % 4 == 3)))
    return made


def single(model: TinyModel, asked: list[Submit]) -> Run:
    return serve(model, asked, **EXACT)


def check_equal(pair: Pair, asked: list[Submit]) -> None:
    wanted, found = single(pair.model, asked), pair.answer(asked)
    assert not pair.decode.errors
    assert not pair.prefill.errors
    for key, answer in found.items():
        expected = wanted.answers[key]
        assert (answer.tokens, answer.finish) == (expected.tokens, expected.finish), key
        assert len(answer.logprobs) == len(expected.logprobs)
        for ours, theirs in zip(answer.logprobs, expected.logprobs, strict=True):
            assert ours.top_ids == theirs.top_ids
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-8)
        check_prompt(answer, expected)
    assert all(not answer.tokens for answer in pair.prefill.answers.values())
    for request in asked:  # a prompt of one token has nothing to hand over
        for server in (pair.prefill, pair.decode):
            times = server.handed.get(request.request_id)
            assert (times is not None) == (len(request.tokens) > 1)
            if times is not None:
                assert times.num_bytes > 0
                assert (times.waiting is None) == (server is pair.prefill)
                assert min(times.meeting, times.queue, times.prefill, times.transfer, times.waiting or 0.0) >= 0
                assert times.ended > time.monotonic() - 600


def check_prompt(answer: Answer, expected: Answer) -> None:
    """Logprobs of the prompt, which prefill computed and decode tells."""
    assert (answer.prompt_logprobs is None) == (expected.prompt_logprobs is None)
    for ours, theirs in zip(answer.prompt_logprobs or [], expected.prompt_logprobs or [], strict=True):
        assert ours.top_ids == theirs.top_ids
        assert ours.logprob == (None if theirs.logprob is None else pytest.approx(theirs.logprob, abs=1e-8))


@pytest.mark.parametrize(
    ("name", "prefill", "decode"),
    [
        ("qwen3", {}, {}),
        ("qwen3", {"tp": 4}, {"tp": 2}),
        ("hybrid", {}, {}),
        ("hybrid", {"tp": 4}, dp(4, 2) | {"ep": 2, "enable_dp_lm_head": True, "moe_dense_tp_size": 1}),
        ("hybrid", {"tp": 2}, {"tp": 4, "enable_mixed_chunk": True}),
        ("hybrid", dp(2, 2), {"tp": 4, "disable_overlap_schedule": True}),
        ("mla", dp(4, 2) | {"enable_two_batch_overlap": True, "tbo_min_tokens": 4}, {"tp": 2}),
        ("mla", {"tp": 1}, dp(2, 2)),
    ],
)
def test_the_answers_are_those_of_one_rank(name: str, prefill: dict[str, Any], decode: dict[str, Any]) -> None:
    with Pair(MODELS[name], prefill, decode, **EXACT) as pair:
        check_equal(pair, requests(24))
        prebuilt = [report for report in pair.decode.reports if report.label == "PREBUILT"]
        assert sum(report.num_new_seq for report in prebuilt) > 0, "no line of the log tells of it"
        assert not {report.label for report in pair.prefill.reports} & {"PREBUILT", "DECODE", "MIXED"}


def test_prompts_that_prefill_has_in_its_prefix_cache_are_sent_all_the_same() -> None:
    with Pair(MODELS["qwen3"], {"tp": 2}, {}, **EXACT) as pair:
        for turn in range(3):  # in the second and third turn prefill computes a page of each, decode may have some too
            asked = [msgspec.structs.replace(r, request_id=f"{turn} {r.request_id}") for r in requests(12)]
            check_equal(pair, asked)
            for name in (request.request_id for request in asked):
                told = [server.answers[name, 0].num_cached for server in (pair.decode, pair.prefill)]
                assert told[0] == told[1], "decode tells what prefill had"
        reports = pair.prefill.reports
        cached = sum(report.num_cached_token for report in reports)
        assert cached > 200
        assert sum(pair.decode.answers[key].num_cached for key in pair.decode.answers if not key[1]) == cached
        assert not sum(report.num_cached_token for report in pair.decode.reports), "it found nothing itself"


@pytest.mark.parametrize("flags", [{}, {"tp": 2}])
def test_what_has_landed_does_not_wait_for_a_step(flags: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The last of a prompt lands while prefill computes another one; decode answers before that is through."""
    with Pair(MODELS["qwen3"], flags, {}, **EXACT) as pair:
        pair.answer([Submit("meets", prompt(0, 9), LONG)])  # the servers
        answered, stuck = threading.Event(), threading.Event()
        report, execute = Poster._report, Runner._execute

        def late(self: Poster, one: Any) -> None:
            if self._rank == 0:
                pair.prefill.post(Submit("other", prompt(2, 9), SamplingParams(max_new_tokens=0)))
            assert stuck.wait(WAIT_S), "the other prompt never began"
            report(self, one)

        def slow(self: Runner, work: Any) -> Any:
            if self.post is not None and any(enter.request_id == "other" for enter in work.change.enter):
                stuck.set()
                assert answered.wait(WAIT_S), "a prompt waits for the step of another one"
            return execute(self, work)

        monkeypatch.setattr(loop, "IDLE_WAIT_S", 0.01)
        monkeypatch.setattr(Poster, "_report", late)
        monkeypatch.setattr(Runner, "_execute", slow)
        pair.post(Submit("first", prompt(1, 9), SamplingParams(temperature=0.0, max_new_tokens=3)))
        pair.decode.ended([("first", 0)])
        tick = pair.prefill.core.last_tick
        time.sleep(0.1)
        assert pair.prefill.core.last_tick == tick, "a step that hangs would not be noticed"
        answered.set()
        pair.prefill.ended([("first", 0), ("other", 0)])
        assert not pair.prefill.errors


def test_pages_go_while_later_chunks_compute_and_the_state_after_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    posted: list[tuple[int, bool]] = []
    post = Poster.post

    def noted(self: Poster, sends: Sequence[Send]) -> None:
        posted.extend((len(send.pages), send.slot >= 0) for send in sends)
        post(self, sends)

    monkeypatch.setattr(Poster, "post", noted)
    with Pair(MODELS["hybrid"], {}, {}, **EXACT) as pair:
        pair.answer([Submit("meets", prompt(0, 2), SamplingParams(max_new_tokens=2))])
        posted.clear()
        check_equal(pair, [Submit("r", prompt(1, 70), SamplingParams(temperature=0.0, max_new_tokens=3))])
    assert posted == [(4, False)] * 4 + [(2, True)], "chunks of 16 tokens, pages of 4"


def test_more_requests_than_room() -> None:
    """Pages for few: some wait at decode for pages, some are preempted there and computed again."""
    few = {"max_total_tokens": 400, "max_running_requests": 6, "context_length": 128}
    with Pair(MODELS["qwen3"], {}, few, **EXACT) as pair:
        check_equal(pair, requests(48))


def test_an_abort_at_either_side_ends_both() -> None:
    with Pair(MODELS["hybrid"], {}, {}, **EXACT) as pair:
        for i in range(12):
            pair.post(Submit(f"a{i}", prompt(i, 60), LONG))
        for i in range(12):
            (pair.prefill, pair.decode)[i % 2].abort(f"a{i}")
        pair.decode.ended((f"a{i}", 0) for i in range(1, 12, 2))
        pair.prefill.ended((f"a{i}", 0) for i in range(12))
        for i in range(0, 12, 2):  # it may have been taken before prefill was told
            pair.decode.abort(f"a{i}")
        pair.decode.ended((f"a{i}", 0) for i in range(12))
        pair.prefill.free()
        pair.decode.free()
        check_equal(pair, requests(6))


def test_a_prefill_server_that_is_replaced_is_used_without_a_restart_of_decode() -> None:
    with Pair(MODELS["hybrid"], {"tp": 2}, {}, **EXACT) as pair:
        check_equal(pair, requests(6))
        address = pair.prefill.address
        pair.prefill.close()
        pair.prefill = Server(
            pair.model, "prefill", **{**pair.flags["prefill"], "disaggregation_bootstrap_port": address.port}
        )
        again = [msgspec.structs.replace(request, request_id=f"again {request.request_id}") for request in requests(6)]
        check_equal(pair, again)


def test_nobody_at_the_address() -> None:
    with Pair(MODELS["qwen3"], {}, {}, **EXACT) as pair:
        pair.prefill.close()
        submit = Submit("r", prompt(0, 20), LONG, bootstrap_room=1, bootstrap=pair.prefill.address)
        pair.decode.post(submit)
        pair.decode.ended([("r", 0)])
        assert str(pair.prefill.address) in pair.decode.errors["r"]
        pair.decode.free()
        pair.prefill = pair.decode  # for the end
    assert pair.decode.core.planner.idle


@pytest.mark.parametrize("first", ["prefill", "decode"])
def test_a_pair_that_does_not_fit_is_refused_naming_the_tensor_and_both_halves_end(first: str) -> None:
    """No router is there to cancel the half at prefill: decode tells it."""
    with Pair(MODELS["hybrid"], {"page_size": 8}, {}, **EXACT) as pair:
        address = pair.prefill.address
        for name, room in (("r", 1), ("again", 2)):
            submit = Submit(name, prompt(0, 20), LONG, bootstrap_room=room, bootstrap=address)
            for server in (pair.prefill, pair.decode)[:: 1 if first == "prefill" else -1]:
                server.post(submit)
            for server in (pair.prefill, pair.decode):
                server.ended([(name, 0)], seconds=20.0)  # deadlines of hand-overs are minutes
                assert "layers.3.kv" in server.errors[name]
                assert "prefill has pages of 8 tokens, decode of 4" in server.errors[name]
                server.free()


def test_what_decode_refuses_ends_at_prefill_too() -> None:
    with Pair(MODELS["qwen3"], {}, {"context_length": 16}, **EXACT) as pair:
        for name in ("first", "second"):  # before the two have met, and after
            pair.post(Submit(name, prompt(0, 20), LONG))
            for server in (pair.prefill, pair.decode):
                server.ended([(name, 0)], seconds=20.0)
                assert "at most 15 are allowed" in server.errors[name]
                server.free()


def test_half_a_pair_is_told_at_its_deadline() -> None:
    short = {"disaggregation_bootstrap_timeout": 1.0, "disaggregation_waiting_timeout": 1.0}
    with Pair(MODELS["qwen3"], {}, {}, **EXACT, **short) as pair:
        pair.prefill.post(Submit("p", prompt(0, 20), LONG, bootstrap_room=1))
        pair.decode.post(Submit("d", prompt(0, 20), LONG, bootstrap_room=2, bootstrap=pair.prefill.address))
        pair.prefill.ended([("p", 0)])
        pair.decode.ended([("d", 0)])
        assert "no decode server asked for room 1" in pair.prefill.errors["p"]
        assert "room 2" in pair.decode.errors["d"] or "waited 1 s" in pair.decode.errors["d"]
        pair.prefill.free()
        pair.decode.free()


def test_what_cannot_be_handed_over_is_refused_by_name() -> None:
    with Pair(MODELS["qwen3"], {}, {}, **EXACT) as pair:
        pair.prefill.post(Submit("alone", prompt(0, 20), LONG))
        pair.prefill.ended([("alone", 0)])
        assert "bootstrap_room" in pair.prefill.errors["alone"]


def test_a_mistake_where_bytes_are_moved_ends_the_engine_and_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Poster, *_: object) -> None:
        raise ZeroDivisionError("a mistake")

    with Pair(MODELS["qwen3"], {}, {}, **EXACT) as pair:
        monkeypatch.setattr(Poster, "_runs", broken)
        pair.post(Submit("r", prompt(0, 20), LONG))
        pair.prefill.thread.join(WAIT_S)
        assert "ZeroDivisionError: a mistake" in str(pair.prefill.fatal)
        pair.decode.ended([("r", 0)])
        assert "has gone" in pair.decode.errors["r"]
        pair.decode.free()
        pair.prefill = pair.decode  # for the end


@pytest.mark.parametrize("name", ["hybrid", "mla"])
def test_pages_in_fp8_arrive_as_they_are(name: str) -> None:
    """Two ranks that prefill and one that decodes, rounded once: the tokens of one server with such pages."""
    asked, pages = requests(12), {"kv_cache_dtype": "fp8_e4m3"}
    wanted = serve(MODELS[name], asked, **EXACT, **pages)
    with Pair(MODELS[name], {"tp": 2}, {}, **EXACT, **pages) as pair:
        found = pair.answer(asked)
        assert not pair.decode.errors
        assert {key: a.tokens for key, a in found.items()} == wanted.tokens()


def test_a_pair_of_which_one_has_pages_in_fp8_is_refused() -> None:
    with Pair(MODELS["qwen3"], {"kv_cache_dtype": "fp8_e4m3"}, {}, **EXACT) as pair:
        pair.post(Submit("r", prompt(0, 20), LONG))
        pair.decode.ended([("r", 0)])
        assert "prefill keeps float8_e4m3fn, decode float64" in pair.decode.errors["r"]
        assert "--kv-cache-dtype" in pair.decode.errors["r"]
        pair.prefill.abort("r")
        pair.prefill.free()


def test_a_pair_of_which_one_keeps_parts_of_sums_in_float32_is_refused() -> None:
    """Answers would depend on which server computed what."""
    both = {**EXACT, "dtype": "bfloat16"}
    with Pair(MODELS["qwen3"], {"parts_dtype": "float32"}, {"parts_dtype": "model"}, **both) as pair:
        pair.post(Submit("r", prompt(0, 20), LONG))
        for server in (pair.prefill, pair.decode):
            server.ended([("r", 0)], seconds=20.0)
            assert "--parts-dtype: prefill has float32, decode has model" in server.errors["r"]
            server.free()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_library_that_is_missing_is_told_before_anything_is_read(monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    """Weights may take minutes to read. Ranks that are processes are not started either."""
    monkeypatch.setitem(sys.modules, "mooncake.engine", None)
    monkeypatch.setattr("tessera.run.build.load_decoder", lambda *_: pytest.fail("weights are read"))
    monkeypatch.setattr("tessera.run.build.Processes", lambda *_: pytest.fail("ranks are started"))
    asked = {"disaggregation_mode": "prefill", "disaggregation_transfer_backend": "mooncake"}
    model = MODELS["hybrid"]
    config = resolved(model.spec, **asked, tp=ranks, collectives="gloo").config
    with pytest.raises(ConfigError, match=r"tessera-llm\[mooncake\]"):
        build_instance(config, model.spec, model.source)
