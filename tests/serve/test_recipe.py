"""Recipes: both spellings, the seed's file, every mistake told with its line, and what becomes of each key."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from commands.support import run
from tessera.core.config import Hardware
from tessera.core.errors import ConfigError
from tessera.serve.recipe import Recipe, changed, load_recipe, read_recipe
from tessera.serve.recipe_hardware import GPUS, assumed
from tessera.serve.recipe_plan import apart, check, misplaced, plan

RECIPES = Path(__file__).parents[2] / "recipes"
SEED = RECIPES / "qwen3.5-397b-gb200.yaml"
PLAIN = """
agg-workers: 2
tessera-config:
  aggregated: {model_path: abacus-hybrid, device: cpu, max-total-tokens: 800}
"""
FITS = ["*.model-path=abacus-hybrid", "*.attention-backend=auto", "*.kv-cache-dtype=", "*.quantization=",
        "*.moe-runner-backend="]  # fmt: skip


def wrong(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read_recipe(text)
    return str(caught.value)


def test_the_seeds_file_as_it_stands() -> None:
    found = load_recipe(SEED)
    prefill, decode = found.roles
    assert (found.gpu_type, found.gpus_per_node, found.ignored) == ("gb200", 4, ())
    assert (prefill.name, prefill.workers, prefill.nodes) == ("prefill", 1, 1)
    assert (prefill.flags["tp_size"], prefill.flags["dp_size"], prefill.flags["ep_size"]) == (4, 1, 1)
    assert (decode.flags["tp_size"], decode.flags["dp_size"], decode.flags["moe_dense_tp_size"]) == (4, 2, 1)
    assert (len(prefill.environment), len(decode.environment)) == (13, 15)
    assert decode.environment["SGLANG_HACK_SEQ_BOOTSTRAP_ROOM"] == "1"


def test_both_spellings_and_both_places_mean_the_same() -> None:
    dashed = re.sub(r"(?m)^(\s*)([a-z_]+):", lambda m: f"{m[1]}{m[2].replace('_', '-')}:", SEED.read_text())
    under = re.sub(r"(?m)^(\s*)([a-z-]+):", lambda m: f"{m[1]}{m[2].replace('-', '_')}:", SEED.read_text())
    assert "tensor_parallel_size" in under
    assert "sglang-config" in dashed
    head, _, rest = SEED.read_text().partition("backend:")
    nested = "resources:\n" + re.sub(r"(?m)^(?=[a-z])", "  ", head) + "backend:" + rest
    expected = read_recipe(SEED.read_text())
    assert read_recipe(dashed) == read_recipe(under) == read_recipe(nested) == expected


def test_every_recipe_of_the_repository_reads() -> None:
    for path in RECIPES.glob("*.yaml"):
        assert load_recipe(path).roles


def test_everything_wrong_is_told_with_its_line() -> None:
    text = wrong(
        "gpu_tpye: x\nprefill_workers: 0\nbackend:\n  prefill_environment: {A: [1]}\n  prefill_environment: {A: 1}\n"
        "  sglang_config:\n    prefill: {tp-size: 1,\n      tensor-parallel-size: 2}\n    decode:\n      tp-sise: 1\n"
    )
    assert "line 1: gpu_tpye: there is no such key. Did you mean gpu_type?" in text
    assert "line 2: prefill_workers: found 0. Expected a whole number from 1." in text
    assert "line 5: backend.prefill_environment: it is there twice, first in line 4" in text
    assert "line 7: backend.sglang_config.prefill: found" in text
    assert "tensor-parallel-size is there twice, as 1 and as 2" in text.replace("T", "t")
    assert "line 10: backend.sglang_config.decode.tp-sise: there is no such flag. Did you mean --tp-size" in text
    assert "Give prefill and decode, or aggregated" in wrong("sglang_config: {prefill: {}}")
    assert "found 'decode'. Expected prefill" in wrong(
        "sglang_config: {prefill: {disaggregation-mode: decode}, decode: {}}"
    )
    for broken in ("", "[1]", "a: [", "sglang_config: 5", "backend: {sglang_config: {prefill: 5}}"):
        assert wrong(broken)


def test_what_means_nothing_here_is_ignored_with_its_reason() -> None:
    found = read_recipe(PLAIN + "benchmark: {type: sa-bench}\nfrontend: {type: dynamo, args: {policy: round_robin}}\n")
    assert {d.what: d.why for d in found.ignored}.keys() == {"benchmark", "frontend.type"}
    assert found.router == {"policy": "round_robin"}


def test_changes() -> None:
    found = changed(load_recipe(SEED), ["*.tp=8", "decode.quantization=", "prefill.workers=2", "decode.env.A=1",
                                        "router.policy=round_robin", "resources.gpu_type=h100"])  # fmt: skip
    prefill, decode = found.roles
    assert (prefill.flags["tp_size"], decode.flags["tp_size"], prefill.workers) == (8, 8, 2)
    assert "quantization" not in decode.flags
    assert decode.environment["A"] == "1"
    assert "A" not in prefill.environment
    assert (found.router, found.gpu_type) == ({"policy": "round_robin"}, "h100")
    with pytest.raises(ConfigError) as caught:
        changed(found, ["prefill", "worker.tp=1", "prefill.workers=many", "resources.nodes=3", "*.tp={a: 1}"])
    assert len(caught.value.conflicts) == 5


def seed(*more: str) -> Recipe:
    return changed(load_recipe(SEED), [*FITS, *more])


def test_the_seeds_recipe_resolves_without_a_gpu_and_no_key_is_passed_over() -> None:
    hardware = assumed("gb200", 4)
    for recipe in (load_recipe(SEED), seed()):
        for role in recipe.roles:
            found = plan(role, hardware)
            assert [v.key for v in found.verdicts] == [*role.flags, *role.environment]
            assert all(v.why for v in found.verdicts if v.fate != "honoured")
            refused = {v.key for v in found.verdicts if v.fate == "refused"}
            assert bool(found.conflicts) == (found.resolved is None)
            assert not refused or found.conflicts
            fates = {v.key: v.fate for v in found.verdicts}
            assert (fates["trust_remote_code"], fates["tp_size"]) == ("ignored", "honoured")
            assert fates["NCCL_CUMEM_ENABLE"] == "passed on"


def test_the_seeds_recipe_can_run_on_cpu_with_a_model_of_this_package() -> None:
    for role in seed("*.device=cpu").roles:
        found = plan(role, Hardware("cpu", 1 << 34, bf16=True))
        assert found.conflicts == ()
        fates = {v.key: v.fate for v in found.verdicts}
        for key in ("tp_size", "disaggregation_mode", "SGLANG_DISAGGREGATION_WAITING_TIMEOUT", "chunked_prefill_size"):
            assert fates[key] == "honoured", key


def test_a_role_that_can_run_says_its_bytes() -> None:
    role = changed(read_recipe(PLAIN), ["*.device=cuda", "*.tp=4"]).roles[0]
    found = plan(role, assumed("gb200", 4))
    assert found.resolved is not None
    assert found.resolved.config.memory.available == GPUS["gb200"].memory
    assert found.conflicts == ()
    assert plan(changed(read_recipe(PLAIN), ["*.device=cuda", "*.tp=4"]).roles[0], assumed("h100", 2)).conflicts


def test_a_conflict_between_flags_is_told_of_each() -> None:
    role = changed(read_recipe(PLAIN), ["*.tp=4", "*.ep=3"]).roles[0]
    found = plan(role, Hardware("cpu", 1 << 33))
    assert {v.key for v in found.verdicts if v.fate == "refused"} == {"tp_size", "ep_size"}


def test_a_worker_of_two_hosts_is_planned_as_one() -> None:
    two = assumed("gb200", 2)
    more = ["*.device=cuda", "*.tp=4"]
    for nodes, can in ((1, False), (2, True)):
        recipe = changed(read_recipe(PLAIN), [*more, f"*.nodes={nodes}", "*.workers=1"])
        found = plan(recipe.roles[0], two)
        assert (found.resolved is not None) == can, found.conflicts
        assert bool(misplaced(recipe, two)) == (not can)
    crowded = changed(read_recipe(PLAIN), ["*.device=cuda", "*.tp=4"])
    assert "need 4 GPUs on a host that has 2" in str(misplaced(crowded, two)[0])
    assert misplaced(crowded, Hardware("cpu", 1 << 33)) == ()


def test_a_pair_that_would_not_fit_is_refused_before_anything_starts() -> None:
    """Both sides are known here, so nobody has to wait until they meet."""
    for change, text in (
        ("*.watchdog-timeout=100", ""),
        ("decode.page-size=32", "prefill has pages of 16 tokens, decode of 32"),
        ("decode.kv-cache-dtype=fp8_e4m3", ", decode float8_e4m3fn"),
        ("decode.model-path=abacus-mla", "only decode has it"),
        ("decode.disaggregation-transfer-backend=nixl", "transfer engine: prefill has ['local'], decode has ['nixl']"),
    ):
        recipe = changed(load_recipe(SEED.with_name("abacus-cpu.yaml")), [change])
        plans = [plan(role, None) for role in recipe.roles]
        assert not any(found.conflicts for found in plans)
        told = [str(conflict) for conflict in apart(plans)]
        assert bool(told) == bool(text)
        assert text in "".join(told)
        assert [c.flags[0] for c in check(recipe)[0]] == ["prefill and decode"] * len(told)


def test_a_config_json_is_enough_to_plan(tmp_path: Path) -> None:
    assets = Path(__file__).parents[2] / "src" / "tessera" / "assets" / "abacus-mla"
    (tmp_path / "config.json").write_text((assets / "config.json").read_text())
    for path in (tmp_path, tmp_path / "config.json"):
        role = changed(read_recipe(PLAIN), [f"*.model-path={path}"]).roles[0]
        assert plan(role, Hardware("cpu", 1 << 33)).resolved is not None


@pytest.mark.parametrize("name", ["abacus-cpu", "abacus-replicas"])
def test_what_comes_up_here_is_planned_for_here(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Known fault: prefill and decode of one host were planned for two, and refused for an engine inside one."""
    code, out, _ = run(capsys, "up", str(RECIPES / f"{name}.yaml"), "--plan")
    assert code == 0, out
    assert "hosts\n" not in out
    code, out, _ = run(capsys, "up", str(RECIPES / f"{name}.yaml"), "--plan", "--on", "slurm")
    assert (code, "moves bytes inside one host" in out) == ((2, True) if name == "abacus-cpu" else (0, False))


def test_the_command_plans(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = run(capsys, "up", str(SEED), "--plan", "--json")
    told = json.loads(out)
    assert (code, told["can_run"]) == (2, False)
    assert "model '/model/'" in str(told["roles"][0]["conflicts"])
    (tmp_path / "r.yaml").write_text(PLAIN)
    code, out, _ = run(capsys, "up", str(tmp_path / "r.yaml"), "--plan")
    assert code == 0
    for text in ("worker: 2 worker(s), can run", "max_total_tokens", "honoured", "bytes per rank"):
        assert text in out
    code, _, err = run(capsys, "up", str(tmp_path / "r.yaml"), "--set", "worker.pp-size=2")
    assert (code, "worker: --pp-size 2: not built yet" in err) == (2, True)
    code, _, err = run(capsys, "up", str(tmp_path / "none.yaml"))
    assert (code, "none.yaml: it cannot be read: No such file or directory. Give" in err) == (2, True)
    (tmp_path / "cut.yaml").write_text("a: [1\n")
    code, _, err = run(capsys, "up", str(tmp_path / "cut.yaml"))
    assert (code, "cut.yaml: line 2, column 1: expected ',' or ']', but got" in err) == (2, True)
    for more, text in (
        (["--json"], "--json with no --plan: only a plan is printed as JSON"),
        (["--job-dir", "x"], "--job-dir x: only --on slurm writes a job file"),
        (
            ["--plan", "--set", "*.device=cuda", "--set", "resources.gpu_type=abacus"],
            "gpu_type abacus: it is not known",
        ),
    ):
        code, _, err = run(capsys, "up", str(tmp_path / "r.yaml"), *more)
        assert (code, text in err) == (2, True), err
