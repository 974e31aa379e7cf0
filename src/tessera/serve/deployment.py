"""A recipe as processes: every worker with its address, devices and command line, and the router before them. Pure."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tessera.core.config import BY_KEY, Asked, Notes, read, suggestion
from tessera.core.config.handover import INSIDE
from tessera.core.errors import ConfigError, Conflict
from tessera.core.mesh import divisors, share
from tessera.serve.recipe import WORKER, Recipe, Role

PYTHON = (sys.executable, "-m", "tessera.cli")
LOCAL = "127.0.0.1"
ENGINE, ACROSS = "disaggregation_transfer_backend", "mooncake"  # between hosts, as in SGLang; auto is for one host
MEETING, BOOTSTRAP = "dist_init_addr", "disaggregation_bootstrap_port"
DEVICES = "CUDA_VISIBLE_DEVICES"
KEY = "TESSERA_API_KEY"  # not on a command line, which all of a host's users can read


@dataclass(frozen=True, slots=True)
class Process:
    """One process to start. `url`: where it answers; empty for the further hosts of a worker, which hold only ranks.
    `bootstrap`: port at which decode servers meet it; 0: they do not.

    `node`: on which of the deployment's hosts. `environment`: besides that of whoever starts it.
    """

    name: str
    role: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    url: str = ""
    node: int = 0
    gpus: int = 0
    bootstrap: int = 0


@dataclass(frozen=True, slots=True)
class Deployment:
    """All processes: workers in their order, then the router. `hosts`: how many hosts they need."""

    workers: tuple[Process, ...]
    router: Process
    hosts: int


@dataclass(frozen=True, slots=True)
class Site:
    """Where it runs. `host(node)`: the address of a host for the others. `port()`: a free one. `gpus`: of each host,
    by the names that CUDA_VISIBLE_DEVICES knows.

    `listen`: the address that workers listen on. `packed`: all of it is one host, so its GPUs are counted out.
    """

    host: Callable[[int], str]
    port: Callable[[], int]
    gpus: Sequence[str]
    listen: str = LOCAL
    packed: bool = True
    python: Sequence[str] = PYTHON


def deploy(recipe: Recipe, site: Site, router: Mapping[str, Any]) -> Deployment:
    """The processes of a recipe. `router`: options of the router beside the recipe's, which they overrule.

    Raises `ConfigError` where a worker does not fit its hosts, the recipe's hosts are not there, or a flag's value
    cannot be read.
    """
    recipe = recipe if site.packed else across_hosts(recipe)
    plan = _Placing(site)
    workers = [process for role in recipe.roles for process in plan.role(role)]
    if plan.wrong:
        raise ConfigError(plan.wrong)
    options = {**recipe.router, **{key: value for key, value in router.items() if value is not None}}
    keys = {worker.environment[KEY] for worker in workers if KEY in worker.environment}
    keys |= {str(options.pop("api_key"))} if "api_key" in options else set()
    if len(keys) > 1:
        remedy = "Give all workers the one that the router has: --set '*.api-key=...'."
        raise ConfigError([Conflict(("api-key",), "workers and router have different keys", remedy)])
    port = int(options.pop("port", 30000)) or site.port()
    host = str(options.pop("host", site.listen))
    address = site.host(0) if host in (LOCAL, "0.0.0.0", "::") else host
    named = [word for process in workers if process.url for word in _named(process)]
    command = (*site.python, "router", *named, "--host", host, "--port", str(port), *words(options))
    environment = {**recipe.router_environment, **({KEY: keys.pop()} if keys else {})}
    front = Process("router", "router", command, environment, f"http://{address}:{port}")
    return Deployment(tuple(workers), front, plan.hosts)


def across_hosts(recipe: Recipe) -> Recipe:
    """The recipe, for hosts of its own: where prefill and decode are on different ones, bytes move between hosts.

    Raises `ConfigError` where an engine was asked for that cannot.
    """
    if WORKER in {role.name for role in recipe.roles} or sum(role.nodes for role in recipe.roles) < 2:
        return recipe
    remedy = f"Use {ACROSS} or nixl, or leave it out; or --set decode.nodes=0 puts both onto one host."
    reason = "it moves bytes inside one host, and prefill and decode are on different ones"
    asked = {role.name: role.flags.get(ENGINE) for role in recipe.roles}
    flag = BY_KEY[ENGINE].spellings[0]
    wrong = [Conflict((f"{name}: {flag} {one}",), reason, remedy) for name, one in asked.items() if one in INSIDE]
    if wrong:
        raise ConfigError(wrong)
    roles = [
        replace(role, flags={**role.flags, ENGINE: ACROSS}) if role.flags.get(ENGINE, "auto") == "auto" else role
        for role in recipe.roles
    ]
    return replace(recipe, roles=tuple(roles))


class _Placing:
    """Counts out hosts, GPUs and ports."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._first_host = 0
        self._next_gpu: dict[int, int] = {}
        self.hosts = 1
        self.wrong: list[Conflict] = []

    def role(self, role: Role) -> list[Process]:
        """The workers of one role, spread over its hosts in order."""
        values = read(role.flags, Notes())  # what cannot be read has its default here, so that all is told
        self.wrong += unreadable(role)
        ranks = ranks_of(values)
        cpu = values.word("device") == "cpu" or not self._site.gpus
        nodes = max(role.nodes, 1)
        if role.nodes == 0 or self._site.packed:
            first = 0
        else:
            first, self._first_host = self._first_host, self._first_host + nodes
        self.hosts = max(self.hosts, first + nodes)
        each = self._nodes_each(role, ranks)
        return [
            process
            for index in range(role.workers)
            for process in self._worker(role, values, index, cpu, first + index * each % nodes, each)
        ]

    def _nodes_each(self, role: Role, ranks: int) -> int:
        """Hosts of one worker."""
        each = hosts_each(role)
        if each > 1 and self._site.packed:
            self._refuse(role, f"each worker spans {each} hosts, and this is one", "Use --on ray or --on slurm.")
        elif each not in divisors(ranks):
            self._refuse(role, f"{ranks} ranks cannot be spread over {each} hosts", "Change its nodes or --tp-size.")
        return each

    def _worker(self, role: Role, values: Asked, index: int, cpu: bool, node: int, each: int) -> list[Process]:
        site, here = self._site, share(ranks_of(values), each)
        name = f"{role.name}-{index}"
        flags: dict[str, Any] = {"host": site.listen, **role.flags}
        secret = {KEY: str(flags.pop("api_key"))} if "api_key" in flags else {}
        for key in ("port", BOOTSTRAP) if role.name == "prefill" else ("port",):
            flags[key] = values.number(key) + index if flags.get(key) not in (None, 0, "0") else site.port()
        if each > 1:
            flags |= {"nnodes": each, MEETING: f"{site.host(node)}:{site.port()}"}
        url = f"http://{site.host(node)}:{flags['port']}"
        made = []
        for rank in range(each):
            environment = {**role.environment, **secret, **({} if cpu else self._devices(role, node + rank, here))}
            own = {**flags, "node_rank": rank} if each > 1 else flags
            command = (*site.python, "serve", *words(own))
            gpus = 0 if cpu else here
            meets = flags[BOOTSTRAP] if role.name == "prefill" else 0
            made.append(Process(name, role.name, command, environment, url, node + rank, gpus, meets))
        rest = enumerate(made[1:], 1)
        return [made[0], *(replace(one, name=f"{name}.{i}", url="", bootstrap=0) for i, one in rest)]

    def _devices(self, role: Role, node: int, count: int) -> dict[str, str]:
        """The GPUs of one worker on one host, in the order of its hosts' devices."""
        first = self._next_gpu.get(node, 0)
        self._next_gpu[node] = first + count
        gpus = self._site.gpus
        if first + count > len(gpus):
            reason = f"its workers need {first + count} GPUs on a host that has {len(gpus)}"
            self._refuse(role, reason, "Use fewer workers or ranks, more nodes, or --device cpu.")
        return {DEVICES: ",".join(gpus[first : first + count])}

    def _refuse(self, role: Role, reason: str, remedy: str) -> None:
        self.wrong.append(Conflict((f"{role.name}: {role.workers} worker(s)",), reason, remedy))


def unreadable(role: Role) -> list[Conflict]:
    """Flags that no process knows, and values that none could read."""
    wrong = []
    for name, value in role.flags.items():
        flag = BY_KEY.get(name)
        if flag is None:
            wrong.append(Conflict((f"{role.name}: {name}",), "there is no such flag", suggestion(name, BY_KEY)))
            continue
        try:
            flag.parse(value)
        except ValueError as error:
            remedy = f"{str(error)[:1].upper()}{str(error)[1:]}."
            wrong.append(Conflict((f"{role.name}: {flag.spellings[0]}",), f"found {value!r}", remedy))
    return wrong


def ranks_of(values: Asked) -> int:
    """Ranks of one worker, those of all its replicas."""
    replicas = 1 if values.on("enable_dp_attention") else values.number("dp_size")
    return values.number("tp_size") * replicas


def hosts_each(role: Role) -> int:
    """Hosts that one worker spans: where there are more of them than workers, they are shared out evenly."""
    return max(share(role.nodes, role.workers), 1) if role.workers in divisors(max(role.nodes, 1)) else 1


def numbered(count: int) -> tuple[str, ...]:
    """The GPUs of a host, as CUDA numbers them."""
    return tuple(str(i) for i in range(count))


def _named(process: Process) -> list[str]:
    """How the router is told of a worker."""
    words = ["--prefill" if process.role == "prefill" else f"--{process.role}", process.url]
    words += [str(process.bootstrap)] if process.bootstrap else []
    assert process.role in ("prefill", "decode", WORKER), f"a {process.role} server"
    return words


def words(flags: Mapping[str, Any]) -> list[str]:
    """Flags as words of a command line. A switch that is off is left out."""
    made: list[str] = []
    for name, value in flags.items():
        spelling = f"--{name.replace('_', '-')}"
        flag = BY_KEY.get(name)
        if isinstance(value, bool) or (flag is not None and flag.is_switch):
            made += [spelling] if value is True or (flag is not None and flag.parse(value) is True) else []
        elif isinstance(value, list | tuple):
            made += [spelling, *map(str, value)]
        else:
            made += [spelling, str(value)]
    return made
