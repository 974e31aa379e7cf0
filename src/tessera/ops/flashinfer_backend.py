"""The versions of FlashInfer's kernels, with ours around them. Imports flashinfer, so it is imported where it is
chosen (`ops/backend.py`)."""

from __future__ import annotations

from dataclasses import replace

import flashinfer
import torch

from tessera.ops.backend import Backend
from tessera.ops.flashinfer_attention import FlashInfer
from tessera.ops.flashinfer_plans import Done
from tessera.ops.triton_backend import TRITON


def make(recorded: int) -> Backend:
    """With workspaces of its own, on the current device; steps of up to `recorded` tokens are for our kernels."""
    attention = FlashInfer(flashinfer, TRITON, torch.cuda.get_device_capability()[0] == 9, _mark, recorded)
    return replace(
        TRITON,
        name="flashinfer",
        paged_attention=attention.paged_attention,
        mla_absorbed=attention.mla_absorbed,
        mla_expanded=attention.mla_expanded,
        compile=attention.compile,
    )


def _mark() -> Done:
    event = torch.cuda.Event()
    event.record()
    return event.query
