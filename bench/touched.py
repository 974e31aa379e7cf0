"""How many experts a step touches: the bytes that it must read follow from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ours import Ours
from tessera.models.experts import MoE
from tessera.run.batch import Input


class Touched:
    """The experts that steps chose in each of `num_layers` layers, of the steps with the most rows.

    `decodes`: only steps in which every range is of one token count, else all do. The last step will not do: a run
    ends with the few sequences that came last, or with an overshoot of one.
    """

    def __init__(self, num_layers: int, decodes: bool) -> None:
        self._num_layers, self._decodes = num_layers, decodes
        self._open: list[list[Tensor]] = []  # ids by layer of the step under way; a step of two halves asks twice
        self._counts: list[int] = []  # of each step and layer, of the steps with `rows` rows
        self.rows = 0

    def begin(self) -> None:
        """A step begins."""
        self._open = [[] for _ in range(self._num_layers)]

    def note(self, layer: int, ids: Tensor) -> None:
        """ids [T, k]: what a layer chose."""
        self._open[layer].append(ids)

    def end(self, inputs: Sequence[Input]) -> None:
        """The step has run, with these ranges."""
        rows = sum(len(each.tokens) for each in inputs)
        counts = not self._decodes or all(each.segments.max_length == 1 for each in inputs)
        if not counts or rows < self.rows:
            return
        if rows > self.rows:
            self.rows, self._counts = rows, []
        self._counts += [len(torch.cat(of_layer).unique()) for of_layer in self._open]

    @property
    def experts(self) -> float:
        """The mean number of a layer and step; 0: nothing was chosen."""
        return sum(self._counts) / len(self._counts) if self._counts else 0.0


@contextmanager
def experts_touched(ours: Ours, decodes: bool) -> Iterator[Touched]:
    """While it is open steps run without graphs and are watched."""
    runner: Any = ours.core.runner
    ours.settle()
    ours.core.recordings.held = True
    ours([[1]], 1)  # whatever was being recorded is by now
    graphs, runner.graphs = runner.graphs, None
    model = runner.model
    moes = [layer.mlp for layer in model.decoder.layers if isinstance(layer.mlp, MoE)]
    touched = Touched(len(moes), decodes)
    routes, forward = [moe.route for moe in moes], model.forward

    def watched(layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
        ids, scores = routes[layer](x)
        touched.note(layer, ids)
        return ids, scores

    def stepped(inputs: tuple[Input, ...], caches: dict[str, Tensor]) -> Tensor:
        touched.begin()
        hidden: Tensor = forward(inputs, caches)
        touched.end(inputs)
        return hidden

    for layer, moe in enumerate(moes):
        moe.route = lambda x, layer=layer: watched(layer, x)  # type: ignore[method-assign]
    model.forward = stepped
    try:
        yield touched
    finally:
        runner.graphs, ours.core.recordings.held, model.forward = graphs, False, forward
        for moe, route in zip(moes, routes, strict=True):
            moe.route = route  # type: ignore[method-assign]
