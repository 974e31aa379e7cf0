"""A rank's side of steps that run for their time alone: they leave nothing behind, on the device or on the host."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch

from tessera.comm.rehearsal import Rehearsing
from tessera.plan.step import Step
from tessera.run.batch import Input, Model, make_batch
from tessera.run.host import finished
from tessera.run.pools import Pools
from tessera.run.table import RowTable


class Trials:
    """Runs steps of `plan/dry.py` while nobody sits in the row table, as they are and not as graphs, up to the logits.

    Their tokens are of the whole vocabulary, the same on all ranks of a DP rank, since experts get what routers choose.
    Page 0 and slot 0, of which alone they know, are zero again afterwards.
    """

    def __init__(
        self, model: Model, table: RowTable, pools: Pools, page_size: int, dp_rank: int, comm: Rehearsing
    ) -> None:
        self._model, self._table, self._pools, self._page_size = model, table, pools, page_size
        self._dp_rank, self._comm = dp_rank, comm

    @property
    def acts(self) -> Mapping[str, Callable[[Step], None]]:
        """See `recording.py`."""
        return {"rehearse": self.rehearse, "meet": self.meet}

    def rehearse(self, step: Step) -> None:
        """Runs a step without the other ranks: whatever it raises leaves nobody waiting. What travels to experts is
        not there, since others say how much it is."""
        with self._comm.alone():
            self.meet(step)

    def meet(self, step: Step) -> None:
        """Runs a step with the other ranks, and waits until the device is through with it."""
        batch = make_batch(step, self._dp_rank, self._table, self._page_size, self._pools.device)
        assert batch is not None, "a step without tokens tells nothing"
        rng = np.random.default_rng(self._dp_rank)
        inputs = []
        for half in batch.halves:
            tokens = rng.integers(0, self._model.vocab_size, half.segments.num_tokens, dtype=np.int32)
            inputs.append(Input(torch.from_numpy(tokens).to(self._pools.device), half.segments, half.counts))
        try:
            hidden = self._model.forward(tuple(inputs), self._pools.tensors)
            self._model.logits(hidden[batch.draws.index], batch.draws.counts)
        finally:
            self._pools.wipe_scratch()
        finished(self._pools.device)
