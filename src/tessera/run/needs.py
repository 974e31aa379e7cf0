"""What a rank's memory goes to besides weights and pools: the rows of the table, each counted where it is used."""

from __future__ import annotations

from tessera.comm.dist import nccl_bytes
from tessera.comm.peer_memory import peers_bytes
from tessera.core.config.needs import Count
from tessera.models.activations import step_bytes
from tessera.ops.flashinfer_attention import workspace_bytes
from tessera.ops.rope import rope_bytes
from tessera.run.graphs import graph_bytes
from tessera.run.hardware import device_bytes
from tessera.run.sampler import draw_bytes
from tessera.run.table import table_bytes

NEEDS: tuple[tuple[str, Count], ...] = (
    ("row tables", table_bytes),
    ("rotations", rope_bytes),
    ("largest step", step_bytes),
    ("logits and drawing", draw_bytes),
    ("CUDA graphs", graph_bytes),
    ("FlashInfer's workspace", workspace_bytes),
    ("collectives' memory of peers", peers_bytes),
    ("NCCL", nccl_bytes),
    ("CUDA context and kernels", device_bytes),
)
