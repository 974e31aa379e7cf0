"""Builds a `Decoder` from a spec and the weights of one rank."""

from __future__ import annotations

from collections.abc import Mapping

from tessera.comm.base import Comm
from tessera.core.mesh import Mesh
from tessera.core.parts import NOTHING, Wide
from tessera.core.spec import DeltaSpec, ModelSpec
from tessera.core.weights import weight_table
from tessera.models.decoder import Decoder
from tessera.models.parts import Tile, Tools, Weights
from tessera.ops.aside import Aside
from tessera.ops.backend import TORCH, Backend
from tessera.ops.rope import rope_tables
from tessera.ops.tied import Ends, plain_rows


def build_model(
    spec: ModelSpec,
    mesh: Mesh,
    rank: int,
    tensors: Mapping[str, Tile],
    comm: Comm,
    backend: Backend = TORCH,
    max_positions: int | None = None,
    padded_up_to: int = 0,
    wide: Wide = NOTHING,
) -> Decoder:
    """The model on rank `rank` of `mesh`, from what `models/load.py` loaded. Serves up to `max_positions` positions.

    `padded_up_to`: tokens up to which those that travel to experts do so in exchanges of one size. `wide`: see `Tools`.

    The caller drops `tensors`: a tied embedding may be kept in another form.
    """
    weights = Weights({t.name: t for t in weight_table(spec, mesh)}, tensors, mesh, rank)
    embed = weights.tensor("embed")
    positions = max_positions or spec.max_positions
    ropes = {
        rope: rope_tables(rope, positions, embed.dtype, embed.device)
        for rope in dict.fromkeys(la.mixer.rope for la in spec.layers if not isinstance(la.mixer, DeltaSpec))
    }
    tools = Tools(comm, backend, ropes, spec.norm_eps, spec.zero_centred, Aside(embed.device), padded_up_to, wide)
    ends = backend.tie(embed) if spec.tied else Ends(plain_rows(embed), weights.linear("head"))
    return Decoder(spec, weights, tools, ends)
