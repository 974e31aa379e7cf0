"""A recipe as processes: addresses, GPUs, hosts; and as a Slurm job that ends as a whole."""

from __future__ import annotations

import itertools
import os
import subprocess
from pathlib import Path

import psutil
import pytest

from commands.support import run
from tessera.core.errors import ConfigError
from tessera.serve.deployment import Deployment, Site, deploy, numbered
from tessera.serve.recipe import changed, load_recipe, read_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
SEED = load_recipe(RECIPES / "qwen3.5-397b-gb200.yaml")


def here(gpus: int = 8, packed: bool = True) -> Site:
    ports = itertools.count(4000)
    return Site(lambda node: f"host{node}", lambda: next(ports), numbered(gpus), packed=packed, python=("tessera",))


def after(command: tuple[str, ...], word: str) -> str:
    return command[command.index(word) + 1]


def made(changes: list[str], site: Site, **router: object) -> Deployment:
    return deploy(changed(SEED, changes), site, router)


def test_workers_get_ports_and_gpus_of_their_own_and_the_router_knows_all() -> None:
    found = made(["prefill.tp-size=1", "prefill.workers=3", "decode.tp-size=2"], here())
    assert [p.environment["CUDA_VISIBLE_DEVICES"] for p in found.workers] == ["0", "1", "2", "3,4"]
    ports = [after(p.command, "--port") for p in found.workers]
    ports += [after(p.command, "--disaggregation-bootstrap-port") for p in found.workers[:3]]
    assert len(set(ports)) == 7
    router = found.router.command
    assert router.count("--prefill") == 3
    assert router[router.index("--prefill") + 1 :][:2] == (found.workers[0].url, ports[4])
    assert after(router, "--decode") == found.workers[3].url
    assert "--disaggregation-bootstrap-port" not in found.workers[3].command
    assert found.workers[0].environment["MC_FORCE_MNNVL"] == "1"
    assert "--enable-dp-attention" in found.workers[3].command


def test_what_does_not_fit_is_refused() -> None:
    for changes, site, text in (
        (["prefill.workers=2"], here(8), "need 12 GPUs on a host that has 8"),
        (["prefill.nodes=2", "prefill.tp-size=8"], here(8), "each worker spans 2 hosts"),
        (["prefill.nodes=2", "prefill.tp-size=5"], here(4, packed=False), "5 ranks cannot be spread over 2 hosts"),
    ):
        with pytest.raises(ConfigError, match=text):
            made(changes, site)
    assert made(["*.device=cpu", "prefill.workers=9"], here(0)).workers[0].gpus == 0


def test_a_worker_of_several_hosts_is_one_server() -> None:
    found = made(["prefill.nodes=2", "prefill.tp-size=8"], here(4, packed=False))
    first, second, decode = found.workers
    assert found.hosts == 3
    assert [p.node for p in found.workers] == [0, 1, 2]
    assert (first.url, second.url) == ("http://host0:4000", "")
    assert after(first.command, "--dist-init-addr") == after(second.command, "--dist-init-addr") == "host0:4002"
    assert [after(p.command, "--node-rank") for p in (first, second)] == ["0", "1"]
    assert "--nnodes" not in decode.command
    assert found.router.command.count("--prefill") == 1


def test_between_hosts_bytes_move_by_an_engine_that_can() -> None:
    flag = "--disaggregation-transfer-backend"
    for process in made([], here(4, packed=False)).workers:
        assert after(process.command, flag) == "mooncake"
    assert (
        after(made(["*.disaggregation-transfer-backend=nixl"], here(4, packed=False)).workers[0].command, flag)
        == "nixl"
    )
    for one_host in (
        made([], here(8)),
        made(["decode.tp-size=2", "prefill.tp-size=2", "decode.nodes=0"], here(4, packed=False)),
    ):
        assert all(flag not in process.command for process in one_host.workers)


@pytest.mark.parametrize("engine", ["local", "cuda_ipc"])
def test_an_engine_of_one_host_is_refused_between_hosts(engine: str) -> None:
    asked = [f"*.disaggregation-transfer-backend={engine}"]
    with pytest.raises(ConfigError, match="moves bytes inside one host") as refused:
        made(asked, here(4, packed=False))
    assert len(refused.value.conflicts) == 2
    for fits in (made(asked, here(8)), made([*asked, "*.tp-size=2", "decode.nodes=0"], here(4, packed=False))):
        assert after(fits.workers[0].command, "--disaggregation-transfer-backend") == engine


def test_ports_of_the_recipe_are_kept_and_counted_on() -> None:
    found = made(["prefill.port=31000", "prefill.workers=2", "prefill.tp-size=1", "decode.tp-size=2"], here())
    assert [after(p.command, "--port") for p in found.workers[:2]] == ["31000", "31001"]


def test_keys_are_not_on_command_lines() -> None:
    found = made(["*.api-key=secret", "*.device=cpu"], here())
    for process in (*found.workers, found.router):
        assert "secret" not in " ".join(process.command)
        assert process.environment["TESSERA_API_KEY"] == "secret"
    with pytest.raises(ConfigError, match="different keys"):
        made(["prefill.api-key=secret", "decode.api-key=other", "*.device=cpu"], here())


def test_options_of_the_router() -> None:
    plain = read_recipe(
        "tessera_config: {aggregated: {model-path: x}}\nfrontend: {args: {policy: round_robin, port: 1}}"
    )
    router = deploy(plain, here(), {"port": 5, "host": None}).router
    assert (after(router.command, "--policy"), after(router.command, "--port")) == ("round_robin", "5")
    assert router.url == "http://host0:5"
    assert after(router.command, "--worker").startswith("http://host0:40")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("worker.port=abc", "worker: --port: found 'abc'. Expected a whole number from 0 to 65535."),
        ("worker.drain-timeout=soon", "worker: --drain-timeout: found 'soon'."),
        ("worker.no-such=1", "worker: no_such: there is no such flag."),
        ("router.port=abc", "argument --port: found 'abc'"),
        ("router.no-such=1", "--no-such: there is no such flag"),
    ],
)
@pytest.mark.parametrize("where", ["slurm", "plan"])
def test_what_no_process_could_read_is_told_before_any_is_started(
    change: str, told: str, where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, job = tmp_path / "r.yaml", tmp_path / "job"
    recipe.write_text("tessera_config: {aggregated: {model-path: abacus-mla, device: cpu}}")
    how = ["--plan"] if where == "plan" else ["--on", "slurm", "--job-dir", str(job)]
    code, out, err = run(capsys, "up", str(recipe), "--set", change, *how)
    assert (code, job.exists()) == (2, False)
    assert (out + err).count(told.removeprefix("worker: ") if where == "plan" else told) == 1


STUBS = {
    "scontrol": "printf 'a\\nb\\nc\\n'",
    "srun": 'while [[ "$1" == --* ]]; do shift; done; exec "$@"',
    "tessera": 'echo $$ >> pids; echo "$@"; [ $1 = router ] || exec sleep 60; '
    "while [ $(wc -l < pids) -lt 4 ]; do sleep 0.05; done; exit 3",
}


def test_a_slurm_job_starts_all_and_ends_with_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--set", "prefill.nodes=2", "--set", "prefill.tp-size=8", "--port", "7000"]
    code, _, err = run(capsys, "up", str(RECIPES / "qwen3.5-397b-gb200.yaml"), "--on", "slurm",
                       "--job-dir", str(tmp_path / "job"), *more)  # fmt: skip
    job = tmp_path / "job" / "qwen3.5-397b-gb200.sbatch"
    assert (code, str(job) in err) == (0, True)
    text = job.read_text()
    for line in ("#SBATCH --nodes=3", "#SBATCH --ntasks-per-node=1", "#SBATCH --gpus-per-node=4"):
        assert line in text
    assert '--dist-init-addr "${HOSTS[0]}:31002" --node-rank 1' in text
    assert '--prefill "http://${HOSTS[0]}:31000" 31001 --decode "http://${HOSTS[2]}:31003"' in text
    for name, body in STUBS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "x", "SLURM_JOB_ID": "7"}
    done = subprocess.run(
        ["bash", job], check=False, env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 3, done.stdout + done.stderr
    assert "router: http://a:7000" in done.stdout
    logs = {path.name: path.read_text() for path in (tmp_path / "logs-7").iterdir()}
    assert logs.keys() == {"prefill-0.log", "prefill-0.1.log", "decode-0.log", "router.log"}
    assert "--prefill http://a:31000 31001 --decode http://c:31003" in logs["router.log"]
    pids = [int(line) for line in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 4
    assert not any(psutil.pid_exists(pid) for pid in pids), "the others ended with it"
