"""The mesh phase: which ranks there are and how they cut the model. Every combination that does not work is named.

`--tp-size` counts all ranks of the instance. With `--enable-dp-attention` the attention runs in `--dp-size` groups of
them (attention TP = tp / dp); without, `--dp-size` counts replicas of the whole instance. Experts are spread over
`--ep-size` groups, dense MLPs over `--moe-dense-tp-size` ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from tessera.core.config.ask import Asked
from tessera.core.config.types import MEET_SECONDS, Hardware, MeshConfig, Notes
from tessera.core.errors import LayoutError
from tessera.core.mesh import SINGLE, Axis, Mesh, divisors, instance_mesh, share
from tessera.core.quantization import Quantization
from tessera.core.spec import ModelSpec, MoESpec
from tessera.core.weights import weight_table

BALANCE = {"auto": "round_robin", "shortest_queue": "total_requests", "minimum_tokens": "total_tokens"}
GROUPED = ("--enable-dp-attention",)  # what makes groups of replicas
TRIED = 64  # sizes that are tried for a remedy


def mesh_phase(
    values: Asked, spec: ModelSpec, quantization: Quantization | None, hardware: Hardware, notes: Notes
) -> tuple[MeshConfig, bool]:
    """The ranks, and whether the model can be laid out on them."""
    mesh = _asked(values, hardware.device, _balance(values, notes), _collectives(values, hardware.device, notes))
    mesh = replace(mesh, peers=_peers(values, hardware.device, notes))
    _groups(values, notes)
    _divisors(values, notes)
    _straddling(mesh, notes)
    _hosts(values, mesh, notes)
    _devices(mesh, hardware, notes)
    model = Cut(_kinds(spec, quantization), quantization)
    _model(values, mesh, model, notes)
    _experts(mesh, spec, notes)
    return mesh, model.fits(mesh)


@dataclass(frozen=True, slots=True)
class Cut:
    """A model that is to be cut."""

    spec: ModelSpec
    quantization: Quantization | None

    def misfit(self, tp: int, axis: str, sizes: dict[str, Any]) -> str:
        """Why it cannot be cut along one axis alone; empty when it can, or when there is no such axis."""
        try:
            size = instance_mesh(tp, **sizes).size_of(axis)
        except LayoutError:
            return ""  # refused already: a size that does not divide the ranks
        return self._error(Mesh(size, (Axis(axis, size),)))

    def fits(self, mesh: MeshConfig) -> bool:
        """Whether it can be laid out on these ranks."""
        try:
            return not self._error(mesh.mesh)
        except LayoutError:
            return False

    def _error(self, mesh: Mesh) -> str:
        try:
            weight_table(self.spec, mesh, quantization=self.quantization)
        except LayoutError as error:
            return str(error)
        return ""


def _asked(values: Asked, device: str, balance: str, collectives: str) -> MeshConfig:
    tp, dp, split = values.number("tp_size"), values.number("dp_size"), values.on("enable_dp_attention")
    nodes = values.number("nnodes")
    return MeshConfig(
        device,
        tp=tp,
        dp=dp if split else 1,
        ep=values.number("ep_size"),
        dense_tp=values.whole("moe_dense_tp_size") or tp,
        replicas=1 if split else dp,
        dp_lm_head=values.on("enable_dp_lm_head"),
        all_to_all=values.word("moe_a2a_backend") == "all_to_all",
        balance=balance,
        num_nodes=nodes,
        node_rank=values.number("node_rank"),
        meeting=(values.text("dist_init_addr") or "").removeprefix("tcp://") or None,
        meet_within=values.amount("dist_timeout") if nodes > 1 else MEET_SECONDS,
        collectives=collectives,
    )


def _peers(values: Asked, device: str, notes: Notes) -> bool:
    """Whether GPUs take small collectives into their own hands."""
    off = values.on("disable_custom_all_reduce")
    if device != "cuda" or values.number("tp_size") == 1:
        if off:
            notes.decide("--disable-custom-all-reduce", "ignored", "there are no collectives between GPUs")
        return False
    one_host = values.number("nnodes") == 1
    why = "as asked" if off else "they are on one host" if one_host else "they are on several hosts"
    notes.decide("small collectives", "through NCCL" if off or not one_host else "through memory of the peers", why)
    return one_host and not off


def _groups(values: Asked, notes: Notes) -> None:
    dp, split = values.number("dp_size"), values.on("enable_dp_attention")
    if split and dp == 1:
        remedy = "Give --dp-size (a divisor of --tp-size above 1), or leave --enable-dp-attention out."
        notes.refuse(("--enable-dp-attention", "--dp-size 1"), "one group is not data parallel", remedy)
    if values.on("enable_dp_lm_head") and not split:
        notes.refuse(
            ("--enable-dp-lm-head", "no --enable-dp-attention"),
            "without groups of the attention there is no data-parallel output head",
            "Give --enable-dp-attention, or leave --enable-dp-lm-head out.",
        )
    if dp > 1 and split:
        why = "counts per data-parallel rank and step, the riding decodes included (SGLang divides it by --dp-size)"
        notes.decide("--chunked-prefill-size", "of each rank", why)


def _divisors(values: Asked, notes: Notes) -> None:
    """Sizes that must divide the number of ranks."""
    tp = values.number("tp_size")
    sizes = {"--ep-size": values.number("ep_size"), "--moe-dense-tp-size": values.whole("moe_dense_tp_size") or 1}
    if values.on("enable_dp_attention"):
        sizes["--dp-size"] = values.number("dp_size")
    for flag, size in sizes.items():
        allowed = [n for n in divisors(tp) if n > 1 or flag != "--dp-size"]
        if size > 1 and size not in allowed:
            remedy = _use(flag, allowed) if allowed else f"Raise --tp-size to {size}, or leave {flag} out."
            notes.refuse((f"{flag} {size}", f"--tp-size {tp}"), f"{size} does not divide {tp} rank(s)", remedy)


def _straddling(mesh: MeshConfig, notes: Notes) -> None:
    """Ranks that share a dense MLP lie inside one group of the attention, or are whole groups of it."""
    if mesh.dense_tp not in divisors(mesh.tp) or mesh.dp not in divisors(mesh.tp):
        return  # refused already
    attention = share(mesh.tp, mesh.dp)
    allowed = [n for n in divisors(mesh.tp) if n in divisors(attention) or attention in divisors(n)]
    if mesh.dense_tp not in allowed:
        flags = (f"--moe-dense-tp-size {mesh.dense_tp}", f"--tp-size {mesh.tp}", f"--dp-size {mesh.dp}")
        why = f"{mesh.dense_tp} ranks cut the attention's groups of {attention}"
        notes.refuse(flags, why, _use("--moe-dense-tp-size", allowed))


def _hosts(values: Asked, mesh: MeshConfig, notes: Notes) -> None:
    nodes, meeting = mesh.num_nodes, mesh.meeting
    if mesh.node_rank >= nodes:
        remedy = f"Use --node-rank from 0 to {nodes - 1}." if nodes > 1 else "Leave --node-rank out, or give --nnodes."
        notes.refuse((f"--node-rank {mesh.node_rank}", f"--nnodes {nodes}"), "hosts are counted from 0", remedy)
    if nodes > 1 and meeting is None:
        remedy = "Give --dist-init-addr HOST:PORT, the same on every host."
        flags = (f"--nnodes {nodes}", "no --dist-init-addr")
        notes.refuse(flags, "the hosts do not know where to meet", remedy)
    if meeting is not None and not _is_address(meeting):
        remedy = "Expected HOST:PORT with a port from 1 to 65535."
        notes.refuse((f"--dist-init-addr {meeting}",), "found no host and port", remedy)
    if nodes > 1 and mesh.replicas > 1:
        remedy = "Give --enable-dp-attention, or start a server on each host and a router before them."
        flags = (f"--nnodes {nodes}", f"--dp-size {mesh.replicas}")
        notes.refuse(flags, "the replicas of a server are on one host", remedy, GROUPED)
    if values.word("disaggregation_mode") != "null" and mesh.replicas > 1:
        remedy = "Give --enable-dp-attention, or start a server for each and a router before them."
        flags = (f"--disaggregation-mode {values.word('disaggregation_mode')}", f"--dp-size {mesh.replicas}")
        notes.refuse(flags, "the replicas of a server have one address at which the two sides meet", remedy, GROUPED)
    if nodes not in divisors(mesh.tp):
        reason = f"{mesh.tp} rank(s) cannot be spread evenly over {nodes} hosts"
        notes.refuse((f"--nnodes {nodes}", f"--tp-size {mesh.tp}"), reason, _use("--nnodes", divisors(mesh.tp)))
    if values.gave("dist_timeout") and nodes == 1:
        notes.decide("--dist-timeout", "ignored", "only read with --nnodes")
    if meeting is not None and nodes == 1:
        notes.decide("--dist-init-addr", "ignored", "all ranks are on this host, and find each other")


def _collectives(values: Asked, device: str, notes: Notes) -> str:
    """How ranks talk: GPUs by NCCL, CPU ranks of one host through its memory, those of several over TCP."""
    asked, nodes = values.word("collectives"), values.number("nnodes")
    there = "cuda" if device == "cuda" else "several hosts" if nodes > 1 else "one host"
    fits = {"cuda": ("nccl",), "several hosts": ("gloo",), "one host": ("shared", "gloo", "threads")}[there]
    if asked != "auto" and asked not in fits:
        flags = (f"--collectives {asked}", f"--nnodes {nodes}" if there == "several hosts" else f"--device {device}")
        notes.refuse(flags, f"it does not work on {there}", f"Use --collectives {' or '.join(fits)}.", ("--nnodes",))
    found = asked if asked in fits else fits[0]
    if asked == "auto" and values.number("tp_size") > 1:
        notes.decide("collectives", found, f"the fastest between ranks on {there}")
    return found


def _is_address(text: str) -> bool:
    host, _, port = text.removeprefix("tcp://").rpartition(":")
    return bool(host) and port.isdecimal() and 0 < int(port) < 1 << 16


def _balance(values: Asked, notes: Notes) -> str:
    asked = values.word("load_balance_method")
    method = BALANCE.get(asked, asked)
    if values.gave("load_balance_method") and asked != "auto" and values.number("dp_size") == 1:
        notes.decide(f"--load-balance-method {asked}", "ignored", "there is one data-parallel group")
    elif values.number("dp_size") > 1 and method != asked:
        why = "nothing else was asked" if asked == "auto" else "its name today"
        notes.decide("--load-balance-method", method, why)
    return method


def _devices(mesh: MeshConfig, hardware: Hardware, notes: Notes) -> None:
    """Every rank of this host on CUDA has a device of its own."""
    ranks = mesh.ranks_here
    if hardware.device == "cuda" and ranks > hardware.count:
        replicas = [f"--dp-size {mesh.replicas}"] if mesh.replicas > 1 else []
        remedy = f"Use at most {hardware.count} rank(s) on this host, or more hosts (--nnodes)."
        flags = (f"--tp-size {mesh.tp}", *replicas, f"{hardware.count} GPU(s)")
        of = (*GROUPED, "--dp-size", "--nnodes")
        notes.refuse(flags, f"{ranks} ranks on this host need a GPU each", remedy, of)


def _model(values: Asked, mesh: MeshConfig, model: Cut, notes: Notes) -> None:
    """Heads, experts and rows that cannot be cut for as many ranks: one conflict for each reason."""
    counts = [layer.mlp.router.num_experts for layer in model.spec.layers if isinstance(layer.mlp, MoESpec)]
    if mesh.ep > 1 and not counts:
        notes.refuse((f"--ep-size {mesh.ep}", "the model"), "it has no experts", "Leave --ep-size out.")
    tp, dp, ep = f"--tp-size {mesh.tp}", f"--dp-size {mesh.dp}", f"--ep-size {mesh.ep}"
    dense = tp if mesh.dense_tp == mesh.tp else f"--moe-dense-tp-size {mesh.dense_tp}"
    # Axis of the mesh: the sizes that make it beside the number of ranks, and the flags that ask for them.
    cuts: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
        "expert": ({"ep": mesh.ep}, (ep,)),
        "attn": ({"dp": mesh.dp}, (tp, dp) if mesh.dp > 1 else (tp,)),
        "moe": ({"ep": mesh.ep}, (tp, ep) if mesh.ep > 1 else (tp,)),
        "dense": ({"dense_tp": mesh.dense_tp}, (dense,)),
        "shared": ({"all_to_all": mesh.all_to_all}, (tp,)),
    }
    wrong = {(flags, model.misfit(mesh.tp, axis, sizes)): axis for axis, (sizes, flags) in reversed(cuts.items())}
    for (flags, why), axis in wrong.items():
        if why:
            few = [n for n in divisors(mesh.tp) if not model.misfit(n, "expert", {"ep": n})]
            remedy = _use("--ep-size", few) if axis == "expert" else _ranks(values, mesh, model)
            notes.refuse((*flags, "the model"), why, remedy)


def _experts(mesh: MeshConfig, spec: ModelSpec, notes: Notes) -> None:
    """How tokens get to experts."""
    if mesh.all_to_all and mesh.ep == 1:
        flags = ("--moe-a2a-backend all_to_all", "--ep-size 1")
        why = "every rank holds a share of every expert, so every token would go everywhere"
        notes.refuse(flags, why, "Give --ep-size, or leave --moe-a2a-backend out.")
    elif max(mesh.ep, mesh.dp) > 1 and any(isinstance(layer.mlp, MoESpec) for layer in spec.layers):
        way = "all_to_all" if mesh.all_to_all else "none"
        why = "each token goes where its experts are" if mesh.all_to_all else "all ranks see the tokens of all"
        notes.decide("--moe-a2a-backend", way, f"{why}; shared experts are {'whole' if mesh.all_to_all else 'cut'}")


def _ranks(values: Asked, mesh: MeshConfig, model: Cut) -> str:
    """The numbers of ranks that go with the other sizes."""
    dense = values.whole("moe_dense_tp_size")
    allowed = [n for n in range(1, TRIED + 1) if model.fits(replace(mesh, tp=n, dense_tp=dense or n))]
    if allowed != [1]:
        return _use("--tp-size", allowed) if allowed else f"No --tp-size goes with it.{_regrouped(mesh, model)}"
    return f"Use --tp-size 1.{_regrouped(mesh, model)}"


def _regrouped(mesh: MeshConfig, model: Cut) -> str:
    """Other groups of as many ranks that the model can be cut for, by the fewest flags; empty when there are none."""
    flags = {"ep": "--ep-size {}", "dense_tp": "--moe-dense-tp-size {}", "all_to_all": "--moe-a2a-backend all_to_all"}
    if model.misfit(mesh.tp, "attn", {"dp": mesh.dp}):
        return ""  # no other groups change that
    eps = [n for n in divisors(mesh.tp) if not any(model.misfit(mesh.tp, a, {"ep": n}) for a in ("expert", "moe"))]
    denses = [n for n in divisors(mesh.tp) if not model.misfit(mesh.tp, "dense", {"dense_tp": n})]
    sizes = product(eps, denses, (mesh.all_to_all, True))
    found: list[list[str]] = []
    for ep, dense_tp, all_to_all in sizes:
        changed = replace(mesh, ep=ep, dense_tp=dense_tp, all_to_all=all_to_all and ep > 1)
        if model.fits(changed):
            now = {name: getattr(changed, name) for name in flags}
            found.append([flags[name].format(size) for name, size in now.items() if size != getattr(mesh, name)])
    return f" Or, with {mesh.tp} ranks, {' and '.join(sorted(found, key=len)[0])}." if found else ""


def _kinds(spec: ModelSpec, quantization: Quantization | None) -> ModelSpec:
    """The model with each kind of layer once, unless it is quantised in some layers and not in others."""
    if quantization is not None and quantization.kept:
        everywhere = replace(quantization, kept=())
        dims = (dim for tensor in weight_table(spec, SINGLE) for dim in tensor.layout.dims)
        stored = [section.stored.tensor for dim in dims for section in dim.sections if section.stored]
        if any(quantization.covers(name) != everywhere.covers(name) for name in stored):
            return spec
    return replace(spec, layers=tuple(dict.fromkeys(spec.layers)))


def _use(flag: str, allowed: list[int]) -> str:
    """The remedy that lists sizes."""
    *some, last = map(str, allowed)
    return f"Use {flag} {', '.join(some)}{' or ' if some else ''}{last}."
