"""What would become of a recipe: every key of every role honoured, refused or ignored, with the reason; no start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tessera.core.config import BY_KEY, Config, Decision, Flag, Hardware, Notes, Resolved, read, read_environment
from tessera.core.errors import ConfigError, Conflict, LayoutError, ModelError
from tessera.core.spec import ModelSpec
from tessera.run.handover import manifest_of
from tessera.run.hardware import measure
from tessera.run.startup import prepare
from tessera.serve.deployment import Site, deploy, hosts_each, numbered, unreadable
from tessera.serve.recipe import Recipe, Role
from tessera.transfer.manifest import Manifest, Member, differences

SOMEWHERE = "host:31000"  # where the hosts of a worker meet is not known yet
Fate = Literal["honoured", "refused", "ignored", "passed on"]
# Variables that are nobody's flag: who reads them.
READERS = {
    "NCCL_": "read by NCCL",
    "CUDA_": "read by CUDA",
    "UCX_": "read by UCX",
    "PYTHON": "read by Python",
    "OMP_": "read by OpenMP",
    "HF_": "read by the Hugging Face hub",
    "FLASHINFER_": "read by FlashInfer, where its kernels run",
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """One key, and what becomes of it."""

    key: str
    value: object
    fate: Fate
    why: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """One role. `resolved`: where it can run. `conflicts`: why not; they are told of their keys, too.
    `spec`: the model's, where it can run."""

    role: Role
    verdicts: tuple[Verdict, ...]
    conflicts: tuple[Conflict, ...]
    resolved: Resolved | None = None
    spec: ModelSpec | None = None


def plan(role: Role, hardware: Hardware | None) -> Plan:
    """Resolves a role's flags as `tessera serve` would. `hardware`: assumed; None: that of this host."""
    conflicts: tuple[Conflict, ...] = ()
    resolved: Resolved | None = None
    spec: ModelSpec | None = None
    try:
        prepared = prepare(_as_started(role), role.environment, hardware, weights=False)
        resolved, spec = prepared.resolved, prepared.spec
        decisions = resolved.decisions
    except ConfigError as error:
        conflicts, decisions = error.conflicts, _read_alone(role)
    except (ModelError, LayoutError) as error:
        remedy = f"Give a folder with a config.json: --set '{role.name}.model-path=...'."
        conflicts, decisions = (Conflict(("--model-path",), str(error), remedy), *_conflicts(role)), _read_alone(role)
    verdicts = [_flag(name, value, conflicts, decisions) for name, value in role.flags.items()]
    verdicts += [_variable(name, value, decisions) for name, value in role.environment.items()]
    return Plan(role, tuple(verdicts), conflicts, resolved, spec)


def apart(plans: Sequence[Plan]) -> tuple[Conflict, ...]:
    """Why prefill and decode would refuse each other when they meet; nothing where either cannot run anyway."""
    shown = {found.role.name: _manifest(found.resolved.config, found.spec) for found in plans if found.resolved}
    if not {"prefill", "decode"} <= shown.keys():
        return ()
    return tuple(differences(shown["prefill"], shown["decode"]))


def _manifest(config: Config, spec: ModelSpec | None) -> Manifest:
    assert spec is not None, "of what can run"
    return manifest_of(config, spec, (Member(config.handover.engine, b"", 0, 0, ()),))


def _as_started(role: Role) -> Mapping[str, Any]:
    """The flags, with what is added at the start. A path to a config.json itself names its folder."""
    flags, hosts = dict(role.flags), hosts_each(role)
    path = Path(str(flags.get("model_path", "")))
    if path.name == "config.json":
        flags["model_path"] = str(path.parent)
    return {**flags, "nnodes": hosts, "dist_init_addr": SOMEWHERE} if hosts > 1 else flags


def _read_alone(role: Role) -> tuple[Decision, ...]:
    """What is ignored whatever the model: it is known even where nothing can be resolved."""
    notes = Notes()
    read(role.flags, notes)
    return (*notes.decisions, *read_environment(role.environment).ignored)


def _conflicts(role: Role) -> list[Conflict]:
    notes = Notes()
    read(role.flags, notes)
    return notes.conflicts


def _flag(name: str, value: object, conflicts: tuple[Conflict, ...], decisions: tuple[Decision, ...]) -> Verdict:
    flag = BY_KEY.get(name)
    spelled = flag.spellings if flag is not None else (name,)
    for conflict in conflicts:
        if any(_names(one, spelled) for one in conflict.flags):
            return Verdict(name, value, "refused", f"{conflict.reason}. {conflict.remedy}")
    for decision in decisions:
        if decision.value == "ignored" and _names(decision.what, spelled):
            return Verdict(name, value, "ignored", decision.why)
    return Verdict(name, value, "honoured", _note(flag, spelled, decisions))


def _note(flag: Flag | None, spelled: tuple[str, ...], decisions: tuple[Decision, ...]) -> str:
    """What was decided about an honoured flag."""
    told = [f"{d.value}: {d.why}" for d in decisions if flag is not None and _names(d.what, spelled)]
    return "; ".join(told)


def _names(what: str, spelled: tuple[str, ...]) -> bool:
    """Whether a conflict or decision (`--tp-size 4`, `chunked-prefill-size`) speaks of a flag."""
    first = what.split(maxsplit=1)[0] if what.split() else ""
    return any(first.removeprefix("--") == one.removeprefix("--") for one in spelled)


def _variable(name: str, value: object, decisions: tuple[Decision, ...]) -> Verdict:
    for decision in decisions:
        if decision.what == name and decision.value == "ignored":
            return Verdict(name, value, "ignored", decision.why)
    if read_environment({name: str(value)}).asked:
        return Verdict(name, value, "honoured")
    reader = next((why for prefix, why in READERS.items() if name.startswith(prefix)), "nothing of ours reads it")
    return Verdict(name, value, "passed on", f"set for the workers; {reader}")


def misplaced(recipe: Recipe, hardware: Hardware | None, packed: bool = False) -> tuple[Conflict, ...]:
    """Why the workers do not fit onto the hosts, each with as many GPUs as `hardware` has. `packed`: onto one host."""
    gpus = numbered(hardware.count) if hardware is not None and hardware.device == "cuda" else ()
    site = Site(host=str, port=lambda: 1, gpus=gpus, packed=packed)
    try:
        deploy(recipe, site, {})
    except ConfigError as error:
        told = [conflict for role in recipe.roles for conflict in unreadable(role)]  # by their plans
        return tuple(conflict for conflict in error.conflicts if conflict not in told)
    return ()


def check(recipe: Recipe) -> tuple[list[Conflict], int]:
    """Why the roles cannot run on this host, and how many GPUs they may count on."""
    plans = [plan(role, None) for role in recipe.roles]
    wrong = [
        Conflict((f"{found.role.name}: {conflict.flags[0]}", *conflict.flags[1:]), conflict.reason, conflict.remedy)
        for found in plans
        for conflict in found.conflicts
    ]
    wrong += [Conflict(("prefill and decode", *one.flags), one.reason, one.remedy) for one in apart(plans)]
    cuda = any(found.resolved is not None and found.resolved.config.mesh.device == "cuda" for found in plans)
    return wrong, measure("cuda").count if cuda else 0


def as_data(found: Plan) -> dict[str, Any]:
    """A plan as plain data."""
    rows: list[Mapping[str, object]] = [
        {"key": v.key, "value": v.value, "fate": v.fate, "why": v.why} for v in found.verdicts
    ]
    return {
        "role": found.role.name,
        "workers": found.role.workers,
        "can_run": found.resolved is not None,
        "keys": rows,
        "conflicts": [str(conflict) for conflict in found.conflicts],
    }
