"""What a rank's memory goes to besides weights and pools: the rows of the table, each counted where it is used."""

from __future__ import annotations

from tessera.comm.dist import nccl_bytes
from tessera.comm.peer_memory import peers_bytes
from tessera.core.config.needs import Count, Rows, total
from tessera.models.activations import step_bytes
from tessera.ops.flashinfer_attention import workspace_bytes
from tessera.ops.rope import rope_bytes
from tessera.run.graphs import graph_bytes
from tessera.run.hardware import device_bytes
from tessera.run.sampler import draw_bytes
from tessera.run.table import table_bytes

STEPS = ("largest step", "logits and drawing")  # what a step takes, which is free again after it
NEEDS: tuple[tuple[str, Count], ...] = (
    ("row tables", table_bytes),
    ("rotations", rope_bytes),
    (STEPS[0], step_bytes),
    (STEPS[1], draw_bytes),
    ("CUDA graphs", graph_bytes),
    ("FlashInfer's workspace", workspace_bytes),
    ("collectives' memory of peers", peers_bytes),
    ("NCCL", nccl_bytes),
    ("CUDA context and kernels", device_bytes),
)


def kept_for_steps(rows: Rows) -> int:
    """Bytes of a table that whoever takes memory while steps run must leave free."""
    return total(tuple(row for row in rows if row[0] in STEPS))
