"""Every command that asks a model does so in this process and of a server, with the same answers."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from commands.support import FLAGS, QUIET, fill, run, started
from tessera.core.messages import choice_seed
from waits import PATIENCE_S, wait_until

READY = re.compile(r"Serving \S+ at (http://\S+)")
Where = list[str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    with started(
        "serve", str(folder), *FLAGS, "--port", "0", "--served-model-name", "tiny", "--api-key", "k"
    ) as process:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := READY.search(line):
                yield found[1]
                return
        pytest.fail("".join(lines))


@pytest.fixture(params=["here", "server"])
def where(request: pytest.FixtureRequest, folder: Path, url: str) -> Where:
    """The flags that say whom to ask."""
    if request.param == "here":
        return ["--model-path", str(folder), *FLAGS, *QUIET]
    return ["--url", url, "--api-key", "k"]


def answers(out: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in out.splitlines()]


def test_generate_prints_texts_in_the_order_of_the_prompts(where: Where, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--max-tokens", "6", "--ignore-eos", "--json"]
    prompts = ["one", "two words", "three little words", "four"]
    code, out, _ = run(capsys, "generate", *prompts, *where, *argv)
    found = answers(out)
    assert code == 0
    assert [a["prompt"] for a in found] == prompts
    assert {(a["completion_tokens"], a["finish_reason"]) for a in found} == {(6, "length")}
    alone = [answers(run(capsys, "generate", p, *where, *argv)[1])[0] for p in prompts]
    assert alone == found
    code, out, _ = run(capsys, "generate", prompts[2], *where, *argv[:-1])
    assert (code, out) == (0, f"{found[2]['text']}\n")


def test_here_and_at_a_server_are_the_same(folder: Path, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    here, there = ["--model-path", str(folder), *FLAGS], ["--url", url, "--api-key", "k"]
    for argv in (
        ["greedy", "--max-tokens", "8"],
        ["drawn", "--temperature", "1", "--seed", "5", "--top-k", "50", "--top-p", "0.9", "--max-tokens", "8"],
        ["as a chat", "--chat", "--max-tokens", "8", "--stop", "e"],
    ):
        first, second = (run(capsys, "generate", *argv, *where, "--json")[1] for where in (here, there))
        assert answers(first) == answers(second)


def test_prompts_come_from_a_file_or_from_standard_input(
    where: Where, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, rows = tmp_path / "a.txt", tmp_path / "a.jsonl"
    plain.write_text("one\n\ntwo\n")
    rows.write_text('{"prompt": "three\\nfour"}\n')
    monkeypatch.setattr(sys, "stdin", io.StringIO("five\nsix"))
    for argv, prompts in (
        (["--file", str(plain)], ["one", "two"]),
        (["--file", str(rows)], ["three\nfour"]),
        ([], ["five\nsix"]),
    ):
        code, out, _ = run(capsys, "generate", *argv, *where, "--max-tokens", "2", "--json")
        assert (code, [a["prompt"] for a in answers(out)]) == (0, prompts)


def test_a_chat_goes_on_from_what_was_said(
    where: Where, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n\nand again\n"))
    code, out, err = run(capsys, "chat", *where, "--max-tokens", "4", "--system", "Be short.")
    assert (code, err) == (0, "")
    first, second = out.removesuffix("\n").split("\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("and again\n"))
    alone = run(capsys, "chat", *where, "--max-tokens", "4", "--system", "Be short.")[1]
    assert first
    assert second != alone.removesuffix("\n")  # it has seen the first question


def test_bench_measures_what_was_asked(where: Where, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.jsonl"
    argv = ["--num-prompts", "12", "--random-input-len", "9", "--random-output-len", "5", "--max-concurrency", "4"]
    code, out, _ = run(capsys, "bench", *where, *argv, "--json", "--output-file", str(file), "--output-details")
    told = json.loads(out)
    assert code == 0
    assert (told["completed"], told["failed"]) == (12, 0)
    assert (told["total_input_tokens"], told["total_output_tokens"]) == (12 * 9, 12 * 5)
    assert (told["input_lens"], told["output_lens"]) == ([9] * 12, [5] * 12)
    assert 1 < told["concurrency"] <= 4.01
    assert 0 < told["median_ttft_ms"] <= told["median_e2e_latency_ms"]
    assert told["output_throughput"] == pytest.approx(60 / told["duration"])
    assert json.loads(file.read_text()) == told
    code, out, _ = run(capsys, "bench", *where, *argv, "--request-rate", "200", "--random-range-ratio", "0.3")
    assert code == 0
    assert "time to first token" in out
    assert "output throughput" in out


def test_bench_of_a_file(where: Where, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "one"}\n{"messages": [{"role": "user", "content": "hi"}], "output_len": 3}\n')
    argv = ["--dataset-path", str(file), "--random-output-len", "4", "--json"]
    code, out, _ = run(capsys, "bench", *where, *argv)
    assert (code, json.loads(out)["total_output_tokens"]) == (0, 7)


def test_the_choices_of_an_engine_are_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["generate", "x", "--model-path", str(folder), *FLAGS, "--max-tokens", "1"]
    code, _, err = run(capsys, *argv)
    assert code == 0
    assert err.startswith(f"{folder} in this process with:\n")
    assert "  dtype: float32 (that of the checkpoint)\n" in err
    assert run(capsys, *argv, *QUIET)[2] == ""


def test_eval_scores_and_says_when_it_is_not_enough(where: Where, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--task", "gpqa", "--num-questions", "6", "--repeat", "2", "--max-tokens", "5"]
    code, out, _ = run(capsys, "eval", *where, *argv, "--json", "--output-details", "--temperature", "1", "--seed", "3")
    told = json.loads(out)
    assert code == 0
    assert (told["num_questions"], len(told["scores"]), len(told["answers"])) == (6, 2, 12)
    assert told["output_tokens"] == sum(a["num_tokens"] for a in told["answers"]) > 0
    assert len({a["text"] for a in told["answers"]}) > 6
    code, out, err = run(capsys, "eval", *where, *argv, "--min-score", "0.9")
    assert (code, "is below --min-score 0.9" in err) == (1, True)
    assert "output tokens/s" in out


def test_eval_of_a_file(where: Where, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "questions.jsonl"
    rows = [{"question": f"What is {i}?", "answer": f"It is\n#### {i}"} for i in range(5)]
    file.write_text("\n".join(map(json.dumps, rows)))
    argv = ["--data", str(file), "--max-tokens", "2", "--json"]
    code, out, _ = run(capsys, "eval", "--task", "gsm8k", *where, *argv)
    assert (code, json.loads(out)["num_questions"]) == (0, 5)
    code, _, err = run(capsys, "eval", "--task", "gpqa", *where, *argv)
    assert (code, "its questions are of the gsm8k form. Use --task gsm8k" in err) == (2, True)


def test_the_packaged_model_solves_its_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--model-path", "abacus-hybrid", "--device", "cpu", "--task", "gsm8k", "--num-questions", "20"]
    code, out, err = run(capsys, "eval", *argv, "--min-score", "0.9", "--json")
    assert code == 0, err
    assert json.loads(out)["num_cut"] == 0


@pytest.mark.parametrize(
    ("argv", "code", "problem"),
    [
        (["generate", "x"], 2, "--model-path: no model was named"),
        (["generate", "x", "--model-path", "nothing"], 1, "models of this package"),
        (["generate", "x", "--file", "y"], 2, "prompts come from one place"),
        (["generate", "--file", "/no/such/file"], 2, "No such file"),
        (["generate", "x", "--url", "a:1", "--port", "3"], 2, "both say where the server is"),
        (
            ["generate", "x", "--url", "a:1", "--tp-size", "1", "--dtype", "float32"],
            2,
            "--tp-size with a running server",
        ),
        (["generate", "x", "--port", "9"], 1, "no server answers at http://127.0.0.1:9"),
        (["generate", "x", "--api-key", "k", "--model-path", "abacus-mla"], 2, "no server to send it to"),
        (["chat", "--port", "9"], 1, "no server answers"),
        (["bench", "--port", "9"], 1, "no server answers"),
        (["bench", "--dataset-name", "custom", "--random-range-ratio", "2"], 2, "Give --dataset-path"),
        (["bench", "--flush-cache", "--model-path", "abacus-mla"], 2, "there is no server whose cache"),
        (["bench", "--profile", "--model-path", "abacus-mla"], 2, "there is no server that could be profiled"),
        (["bench", "--profile-num-steps", "2", "--port", "9"], 2, "Give --profile, too"),
        (["bench", "--extra-request-body", "[1]", "--port", "9"], 2, "Expected a JSON object"),
        (["bench", "--dataset-path", "/no/such/file", "--port", "9"], 2, "No such file"),
        (["eval", "--task", "recall", "--data", "/no/such/file"], 2, "No such file"),
        (["bench", "--output-file", "/no/such/folder/file", "--port", "9"], 2, "No such file"),
        (["generate", "x", "--url", "http://127.0.0.1:http"], 2, "--url http://127.0.0.1:http: Invalid port"),
        (["generate", "x", "--model-path", __file__], 1, "a file, and a folder is needed"),
        (
            ["generate", "x", "--model-path", "abacus-mla", "--tokenizer-path", "no"],
            1,
            "--tokenizer-path 'no': no such",
        ),
    ],
    ids=lambda v: " ".join(v)[:40] if isinstance(v, list) else None,
)
def test_what_cannot_be_is_said_plainly(
    argv: list[str], code: int, problem: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    found, out, err = run(capsys, *argv)
    assert (found, out) == (code, "")
    assert problem in err
    assert "Traceback" not in err


def test_bytes_that_are_no_text_are_refused(
    where: Where, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Known fault: they ended in a traceback."""
    argv = [*where, "--max-tokens", "2"]
    code, out, err = run(capsys, "generate", os.fsdecode(b"caf\xe9"), *argv)
    assert (code, out, "no valid Unicode" in err) == (1, "", True)
    for command, found in (("generate", 2), ("chat", 1)):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
        code, out, err = run(capsys, command, *argv)
        assert (code, out, "can't decode byte 0xe9" in err) == (found, "", True), err


def test_a_request_that_a_server_refuses_is_told(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "generate", "x", "--url", url)
    assert (code, "status 401" in err) == (1, True)
    where = ["--url", url, "--api-key", "k"]
    code, _, err = run(capsys, "generate", "x", *where, "--max-tokens", "999999")
    assert (code, "max_tokens" in err) == (1, True)
    code, _, err = run(capsys, "generate", "x", *where, "--model-path", "other")
    assert (code, "'other' is not served here" in err) == (1, True)
    code, out, err = run(capsys, "bench", *where, "--num-prompts", "3", "--extra-request-body", '{"top_k": "x"}')
    assert (code, "the warm-up failed: status 400: top_k" in err) == (1, True)
    code, out, err = run(
        capsys, "bench", *where, "--num-prompts", "3", "--output-len", "99999", "--warmup", "0", "--json"
    )
    assert (code, json.loads(out)["failed"], "3 request(s) failed" in err) == (1, 3, True)


def test_seeds_of_questions_stay_in_the_range_of_a_seed(url: str) -> None:
    with httpx.Client(base_url=url, headers={"authorization": "Bearer k"}, trust_env=False) as http:
        for seed in (0, 2**62):
            body = {"model": "tiny", "prompt": "x", "max_tokens": 1, "seed": choice_seed(seed, 7)}
            assert http.post("/v1/completions", json=body).status_code == 200


def test_a_client_that_leaves_leaves_nothing_running(url: str) -> None:
    where = ["--url", url, "--api-key", "k"]
    with (
        httpx.Client(base_url=url, headers={"authorization": "Bearer k"}, trust_env=False) as http,
        started("bench", *where, "--num-prompts", "30", "--output-len", "1500", "--warmup", "0") as bench,
    ):
        wait_until(lambda: http.get("/server_info").json()["state"]["in_flight"] > 0)
        bench.send_signal(2)
        assert bench.wait(PATIENCE_S) == 130
        wait_until(lambda: http.get("/server_info").json()["state"]["in_flight"] == 0)
