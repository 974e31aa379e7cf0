"""Which form of an operation a step uses. Chosen here and nowhere else, from the lengths of its ranges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from tessera.ops.delta import Form as DeltaForm
from tessera.ops.segments import Segments

MLAForm = Literal["absorbed", "expanded"]

# Absorbed MLA reads latent + rope numbers per position and head, expanded first makes nope + value of them for all
# positions: with few queries per sequence that expansion costs more than it saves.
ABSORB_UP_TO = 32
# What is recorded without lengths is bound by the number of launches while its tokens are few.
ABSORB_RECORDED = 512


@dataclass(frozen=True, slots=True)
class Forms:
    """`mla`: (first, last, form) of neighbouring segments that share a form; together all. `delta`: of ranges."""

    mla: tuple[tuple[int, int, MLAForm], ...]
    delta: DeltaForm


def choose_forms(segments: Segments) -> Forms:
    """Long ranges come first in a step, so one cut separates the expanded from the absorbed.

    Where the host does not know the lengths, either form is right for any range, and one is taken for all.
    """
    delta: DeltaForm = "chunked" if segments.max_length > 1 else "recurrent"
    if not segments.known:
        form: MLAForm = "expanded" if segments.max_length > ABSORB_RECORDED else "absorbed"
        return Forms(((0, segments.num_segments, form),), delta)
    long = np.flatnonzero(segments.host_lengths > ABSORB_UP_TO)
    cut = int(long[-1]) + 1 if len(long) else 0
    last = segments.num_segments
    runs: tuple[tuple[int, int, MLAForm], ...] = ((0, cut, "expanded"), (cut, last, "absorbed"))
    return Forms(tuple(run for run in runs if run[0] < run[1]), delta)
