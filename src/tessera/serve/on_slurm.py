"""`tessera up --on slurm`: a recipe as a job file. Nothing is started; `sbatch` takes what is written here.

One job has all hosts; each process is a step of it on its host, and when one of them ends, all do.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

from tessera.serve.deployment import Deployment, Process, Site, deploy, numbered
from tessera.serve.recipe import Recipe

FIRST_PORT = 31000  # of workers and meetings: a host of a job is its own
HOST = "tessera-host-{}-"  # stands for the address of a host until the job runs
HOSTS = re.compile(r"tessera-host-(\d+)-")
SHELL_SIGNS = re.compile(r'[`$"\\]')

SCRIPT = """\
#!/bin/bash
{directives}

# Written by `tessera up --on slurm` from the recipe {name}.
set -uo pipefail
mapfile -t HOSTS < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
[ "${{#HOSTS[@]}}" -ge {hosts} ] || {{ echo "found ${{#HOSTS[@]}} hosts, needed are {hosts}"; exit 1; }}
LOGS="${{SLURM_SUBMIT_DIR:-.}}/logs-$SLURM_JOB_ID"
mkdir -p "$LOGS"

# step NAME HOST COMMAND...: a process of its own on a host of this job.
step() {{
  local name=$1 host=$2
  shift 2
  srun --overlap --kill-on-bad-exit=1 --nodes=1 --ntasks=1 --nodelist="$host" --job-name="$name" \\
    {srun}"$@" > "$LOGS/$name.log" 2>&1 &
}}

trap 'kill $(jobs -p) 2> /dev/null; wait' EXIT
trap 'exit 143' TERM INT

{steps}

echo "router: {router} (logs in $LOGS)"
wait -n
code=$?
echo "a process has ended with $code, so everything ends"
exit $((code == 0 ? 1 : code))
"""


def write_job(recipe: Recipe, router: Mapping[str, Any], folder: Path) -> list[Path]:
    """Writes the job file of a recipe into `folder`; returns what was written. Raises `ConfigError`."""
    ports = count(FIRST_PORT)
    site = Site(
        host=HOST.format,
        port=lambda: next(ports),
        gpus=() if _on_cpu(recipe) else numbered(recipe.gpus_per_node),
        listen="0.0.0.0",
        packed=False,
        python=("tessera",),
    )
    text = script(recipe, deploy(recipe, site, router))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{recipe.name}.sbatch"
    path.touch(mode=0o700)  # it may hold a key
    path.write_text(text, encoding="utf-8")
    return [path]


def script(recipe: Recipe, deployment: Deployment) -> str:
    """The job file."""
    container = recipe.slurm.get("container")
    return SCRIPT.format(
        directives="\n".join(_directives(recipe, deployment)),
        name=recipe.name,
        hosts=deployment.hosts,
        srun=f"--container-image={shlex.quote(container)} " if container else "",
        steps="\n".join(_step(process) for process in (*deployment.workers, deployment.router)),
        router=_word(deployment.router.url).strip('"'),
    )


def _directives(recipe: Recipe, deployment: Deployment) -> Iterator[str]:
    slurm = recipe.slurm
    asked: dict[str, object] = {"job-name": recipe.name, "nodes": deployment.hosts, "ntasks-per-node": 1}
    if any(process.gpus for process in deployment.workers):
        asked["gpus-per-node"] = recipe.gpus_per_node
    named = {"time_limit": "time", "account": "account", "partition": "partition"}
    asked |= {theirs: slurm[ours] for ours, theirs in named.items() if ours in slurm}
    asked |= {"output": "slurm-%j.out", **slurm.get("sbatch_directives", {})}
    for key, value in asked.items():
        yield f"#SBATCH --{key}" + ("" if value is None or value is True or value == "" else f"={value}")


def _step(process: Process) -> str:
    environment = [f"{name}={value}" for name, value in process.environment.items()]
    words = [*(["env", *environment] if environment else []), *process.command]
    place = _word(HOST.format(process.node))
    return f"step {shlex.quote(process.name)} {place} \\\n  " + " ".join(_word(word) for word in words)


def _word(word: str) -> str:
    """A word of the shell, with the addresses of hosts where they are meant."""
    if not HOSTS.search(word):
        return shlex.quote(word)
    assert not SHELL_SIGNS.search(word), f"an address with signs of the shell in it: {word}"
    return '"' + HOSTS.sub(lambda found: "${HOSTS[" + found[1] + "]}", word) + '"'


def _on_cpu(recipe: Recipe) -> bool:
    return all(role.flags.get("device") == "cpu" for role in recipe.roles)
