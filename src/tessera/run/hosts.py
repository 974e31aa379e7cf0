"""Whether the hosts of one instance were started alike. Each reads the model and its flags itself; what the first host
resolved holds for all, so another host's flags must ask for the same, and its folder must hold the same model."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import msgspec

from tessera.core.config.types import Config
from tessera.core.errors import Conflict
from tessera.models.folder import read_model, weights_version

# Flags that say what ranks compute, and what they resolve to. Sizes that follow from free memory may differ: those of
# the first host hold. Scheduling, serving and logging happen there alone.
ALIKE = {
    "--tp-size": "mesh.tp",
    "--dp-size": "mesh.dp",
    "--ep-size": "mesh.ep",
    "--moe-dense-tp-size": "mesh.dense_tp",
    "--enable-dp-lm-head": "mesh.dp_lm_head",
    "--moe-a2a-backend": "mesh.all_to_all",
    "--device": "mesh.device",
    "--collectives": "mesh.collectives",
    "--dtype": "model.dtype",
    "--quantization": "model.quantization",
    "--load-format": "model.load_format",
    "--random-seed": "model.seed",
    "--kv-cache-dtype": "memory.kv_dtype",
    "--mamba-ssm-dtype": "memory.state_dtype",
    "--page-size": "memory.page_size",
    "--attention-backend": "kernels.attention",
    "--linear-attn-backend": "kernels.delta",
    "--moe-runner-backend": "kernels.moe",
    "--sampling-backend": "kernels.sampling",
    "--fp8-gemm-backend": "kernels.fp8",
    "--parts-dtype": "kernels.parts",
}
REMEDY = "Start every host with the same model and the same flags, but for --node-rank."
Identity = tuple[str, str]  # of a model: its spec, its weights


class Placed(msgspec.Struct, frozen=True):
    """What decides which ranks a host has; `where`: which one it is, for people."""

    tp: int
    num_nodes: int
    node_rank: int
    where: str = ""


def placed(config: Config) -> Placed:
    """That of this host."""
    mesh = config.mesh
    return Placed(mesh.tp, mesh.num_nodes, mesh.node_rank, f"process {os.getpid()} on {socket.gethostname()}")


def misplaced(there: Placed, first: Placed, holder: Placed | None) -> list[Conflict]:
    """Why a host cannot have the ranks that it started. `holder`: who has them already."""
    pairs = (("--tp-size", there.tp, first.tp), ("--nnodes", there.num_nodes, first.num_nodes))
    found = [
        Conflict((f"{flag} of host {there.node_rank}",), f"found {ours}, the first host has {theirs}", REMEDY)
        for flag, ours, theirs in pairs
        if ours != theirs
    ]
    if not found and holder is not None:
        why = f"two hosts have it: {holder.where} and {there.where}"
        remedy = f"Give each host its own, from 0 to {first.num_nodes - 1}."
        found.append(Conflict((f"--node-rank {there.node_rank}",), why, remedy))
    return found


def identity(config: Config) -> Identity:
    """Tells the model in the folder of a configuration from others. Raises `ModelError` when it cannot be read."""
    return repr(read_model(Path(config.model.path))), weights_version(config.model)


def conflicts(here: Config, first: Config, model: Identity) -> list[Conflict]:
    """What the configuration of this host asks for that the first host's does not, and whether its folder holds
    another model than the first host's, `model`."""
    where = f"of host {here.mesh.node_rank}"
    pairs = ((flag, attrgetter(name)(here), attrgetter(name)(first)) for flag, name in ALIKE.items())
    found = [
        Conflict((f"{flag} {where}",), f"found {ours}, the first host has {theirs}", REMEDY)
        for flag, ours, theirs in pairs
        if ours != theirs
    ]
    same = replace(first.model, path=here.model.path)  # so that dtypes that differ are told once
    spec, weights = identity(replace(here, model=same))
    others = {"config is not that": spec != model[0], "weights are not those": weights != model[1]}
    folder = (f"--model-path {here.model.path} {where}",)
    said = (f"its {what} of the first host's" for what, differs in others.items() if differs)
    return [*found, *(Conflict(folder, why, REMEDY) for why in said)]
