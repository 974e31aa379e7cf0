"""Promise: a step that runs at a padded size, from columns on the device, gives the tokens of the step itself.

On CPU a recorder stands in that computes anew what CUDA would replay: all but the recording is the same code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from run.test_runner import PROMPT, enter, step
from run.toy import PLAIN, Toy, greedy, toy_caches
from tessera.core.config.types import NO_GRAPHS, GraphSizes
from tessera.core.messages import SamplingParams
from tessera.ops.expand import expand_reference
from tessera.ops.greedy import greedy as greedy_op
from tessera.ops.sample import draw_reference
from tessera.plan.step import Change, Step
from tessera.run.graphs import Graphs, Size, padded
from tessera.run.pools import Pools
from tessera.run.rowparams import RowParams
from tessera.run.runner import Runner
from tessera.run.sampler import Sampler
from tessera.run.table import RowTable

SIZES = GraphSizes(rows=(1, 2, 4), segments=(2, 4), tokens=(8, 16))
PAGE = 4


class Narrow(Toy):
    """The toy with the logits that a graph takes."""

    def narrow_logits(self, hidden: Tensor, counts: tuple[int, ...]) -> Tensor:
        return self.logits(hidden, counts).unflatten(1, (2, -1))


class Again:
    """Computes a stage anew into the same tensors, and counts."""

    def __init__(self) -> None:
        self.recorded, self.replayed = 0, 0

    def warm(self, stage: Callable[[], tuple[Tensor, Tensor]]) -> None:
        stage()

    def capture(self, stage: Callable[[], tuple[Tensor, Tensor]]) -> tuple[tuple[Tensor, Tensor], Callable[[], None]]:
        found = stage()
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            for old, new in zip(found, stage(), strict=True):
                old.copy_(new)

        return found, replay


def runner(sizes: GraphSizes = SIZES) -> tuple[Runner, Again]:
    """A runner of the toy whose steps run at padded sizes."""
    table = RowTable(4, 64, PAGE, (), mirror_pages=True)
    params, pools, model, again = RowParams(4), Pools(toy_caches(PAGE), 64, 5), Narrow(), Again()
    graphs = Graphs(sizes, model, table, pools.tensors, PAGE, expand_reference, greedy_op, again)
    return Runner(model, table, params, pools, Sampler(table, params, draw_reference), PAGE, None, graphs=graphs), again


def run(runner: Runner, *steps: Step) -> list:  # type: ignore[type-arg]
    """One after the other: without a device to copy from, what a graph gives is overwritten by its next run."""
    return [runner.collect(runner.launch(recorded(runner, s))) for s in steps]


def recorded(runner: Runner, step: Step) -> Step:
    """The step, whose size is recorded by now where it has one."""
    assert runner.graphs is not None
    size = padded(step, runner.graphs._sizes)
    if size is not None and runner.graphs.size_of(step) is None:
        runner.record(size)
    return step


def drawn(results: list) -> list[list[int]]:  # type: ignore[type-arg]
    return [[token for output in outputs for token in output.tokens] for _, outputs in results]


def script(other: list[int], params: SamplingParams = PLAIN) -> list[Step]:
    """A prompt in two chunks; decode; another prompt while it decodes; both decode; a page is added."""
    first = Change(enter=(enter(0, PROMPT, [1, 2], params),))
    second = Change(enter=(enter(2, other, [5, 6], params),))
    grow = Change(pages=np.array([[0, 2, 9]], np.int32))
    return [
        step(0, [(0, 0, 5, False)], first),
        step(1, [(0, 5, 2, True)]),
        step(2, [(0, 7, 1, True)]),
        step(3, [(2, 0, 3, True), (0, 8, 1, True)], merged(second, grow)),
        step(4, [(0, 9, 1, True), (2, 3, 1, True)]),
    ]


def merged(a: Change, b: Change) -> Change:
    return Change(enter=a.enter, pages=b.pages)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_the_tokens_are_those_of_the_step_itself(temperature: float) -> None:
    params = msgspec.structs.replace(PLAIN, temperature=temperature, seed=3)
    graphed, again = runner()
    plain, _ = runner(NO_GRAPHS)
    found, expected = (run(r, *script([8, 4, 6], params)) for r in (graphed, plain))
    assert drawn(found) == drawn(expected)
    if not temperature:
        assert drawn(found)[1] == greedy(PROMPT, 1)
    assert [done.parts[0].rows.tolist() for done, _ in found] == [done.parts[0].rows.tolist() for done, _ in expected]
    assert again.replayed == 5
    assert again.recorded == 4, "two and four ranges by eight tokens, one and two rows"


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.8, 1.0])
def test_halves_run_as_one_graph(share: float, temperature: float) -> None:
    """Cut between ranges and inside them; a half may have no range. Drawn tokens keep the order of the step."""
    params = msgspec.structs.replace(PLAIN, temperature=temperature, seed=3)
    steps = script([8, 4, 6], params)
    split = [replace(s, cuts=(int(s.num_tokens * share + 0.5),)) for s in steps]
    graphed, again = runner()
    plain, _ = runner(NO_GRAPHS)
    assert drawn(run(graphed, *split)) == drawn(run(plain, *steps))
    assert again.replayed == 5
    for name, pool in graphed.pools.tensors.items():
        assert torch.equal(pool[1:], plain.pools.tensors[name][1:]), name
    assert torch.equal(graphed.table.tokens[:-1], plain.table.tokens[:-1])


def test_padding_leaves_all_but_scratch_alone() -> None:
    graphed, _ = runner()
    plain, _ = runner(NO_GRAPHS)
    for one in (graphed, plain):
        run(one, *script([8, 4, 6]))
    for name, pool in graphed.pools.tensors.items():
        assert torch.equal(pool[1:], plain.pools.tensors[name][1:]), name
    assert torch.equal(graphed.table.tokens[:-1], plain.table.tokens[:-1])


def test_as_many_ranges_as_tokens_are_not_ranges_of_one_token() -> None:
    """A chunk beside decodes may be padded to a size with equal counts."""
    sizes = GraphSizes(rows=(1, 2, 4), segments=(4,), tokens=(4,))
    first = Change(enter=(enter(0, PROMPT, [1, 2]), enter(2, [8, 4, 6], [5, 6])))
    steps = [
        step(0, [(0, 0, 4, False)], first),
        step(1, [(0, 4, 3, True), (2, 0, 1, False)]),
        step(2, [(2, 1, 2, True), (0, 7, 1, True)]),
    ]
    graphed, again = runner(sizes)
    plain, _ = runner(NO_GRAPHS)
    assert drawn(run(graphed, *steps)) == drawn(run(plain, *steps))
    assert again.replayed == 3
    assert again.recorded == 1


def test_what_is_not_recorded_runs_as_it_is() -> None:
    graphed, again = runner()
    assert graphed.graphs is not None
    plain, _ = runner(NO_GRAPHS)
    steps = script([8, 4, 6])
    found = [graphed.collect(graphed.launch(s)) for s in steps[:3]]
    assert (again.recorded, again.replayed) == (0, 0)
    graphed.record(Size(2, 2, True))
    assert graphed.graphs.size_of(steps[2]) is None, "of another size"
    found += [graphed.collect(graphed.launch(s)) for s in steps[3:]]
    assert (again.recorded, again.replayed) == (1, 1), "the last step has two rows"
    assert drawn(found) == drawn(run(plain, *steps))


def test_which_steps_have_a_size() -> None:
    one, chunk = [(0, 4, 1, True)], [(0, 4, 5, True), (1, 2, 1, True)]
    assert padded(step(0, one), SIZES) == Size(1, 1, True)
    assert padded(step(0, [(row, 4, 1, True) for row in range(3)]), SIZES) == Size(4, 4, True)
    assert padded(step(0, [(row, 4, 1, True) for row in range(5)]), SIZES) is None, "more rows than the largest size"
    assert padded(step(0, chunk), SIZES) == Size(4, 8)
    assert padded(step(0, [(0, 0, 17, True)]), SIZES) is None, "more tokens than the largest size"
    assert padded(step(0, chunk, logits=2), SIZES) is None, "prompts are scored"
    halves = Step(0, step(0, chunk).parts, cuts=(3,))
    assert padded(halves, SIZES) == Size(4, 8, False, 2), "three tokens, and three in two ranges"
    ones = step(0, [(row, 4, 1, True) for row in range(3)])
    assert padded(replace(ones, cuts=(1,)), SIZES) == Size(2, 2, True, 2)
    assert padded(replace(step(0, [(0, 0, 20, True)]), cuts=(10,)), SIZES) == Size(2, 16, False, 2), "each half fits"
    assert padded(replace(step(0, chunk, logits=2), cuts=(3,)), SIZES) is None, "prompts are scored"
    two = Step(0, (step(0, one).parts[0], step(0, chunk).parts[0]))
    assert padded(two, SIZES) == Size(4, 8), "the same on all ranks"
