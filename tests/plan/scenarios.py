"""Short traces, each of which needs one promise of the planner. They run clean; with the fault put in they do not."""

from __future__ import annotations

import msgspec

from plan.fake import World, expected, request
from tessera.core.messages import Submit
from tessera.plan.scheduler import PlannerConfig

LONG = [1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 2, 2]


def kinds(world: World, dp_rank: int = 0) -> str:
    """Per step, what a rank computes: d decodes, p prompts, m both, - nothing. A row decodes what it drew."""
    drew: set[int] = set()
    found = ""
    for step in world.steps:
        part = step.parts[dp_rank]
        drew -= {enter.row for enter in part.change.enter}
        decodes = {int(row) for row in part.rows if int(row) in drew}
        found += "-dpm"[bool(decodes) + 2 * (len(decodes) < len(part.rows))]
        drew |= set(part.rows[part.samples].tolist())
    return found


def ending(submit: Submit, lengths: list[int], recurrent: bool) -> Submit:
    """The request with a seed at which its choices end after these numbers of tokens."""
    for seed in range(1000):
        params = msgspec.structs.replace(submit.params, seed=seed)
        seeded = msgspec.structs.replace(submit, params=params)
        if [len(expected(seeded, i, 24, recurrent)[0]) for i in range(submit.n)] == lengths:
            return seeded
    raise AssertionError("no seed does that")


def shared_prefix() -> World:
    """The second prompt begins with pages of the first, which runs on."""
    world = World(PlannerConfig(3, 50, 2, 24, prefix_cache=True))
    world.submit(request("first", LONG[:8], 10, ignore_eos=True))
    world.turn()
    world.submit(request("second", [*LONG[:6], 1], 4, ignore_eos=True))
    world.finish()
    assert world.ends["second", 0].num_cached == 6
    return world


def evicting() -> World:
    """The tree gives up pages that nobody uses, and not those of an answer that runs on."""
    world = World(PlannerConfig(3, 10, 2, 24, prefix_cache=True))
    world.submit(request("running", LONG[:4], 6, ignore_eos=True))
    world.turn()
    world.submit(request("ended", LONG[3:9], 1))
    world.turn()
    world.submit(request("third", LONG[::-1][:8], 2))
    world.finish()
    assert kinds(world) == "pdpdpddd", kinds(world)
    return world


def crowded() -> World:
    """Two answers grow until the pool is too small for both; what is computed of the later one is put back."""
    world = World(PlannerConfig(2, 8, 2, 24, num_slots=3, max_in_flight=2))
    world.submit(request("first", [1, 2, 3], 8, ignore_eos=True))
    world.submit(request("second", [3, 2, 1], 8, ignore_eos=True))
    world.finish()
    assert world.planner.ranks[0].state.num_preempted == 1
    return world


def growing() -> World:
    """A prompt that would take the page that a running answer needs next waits until that has ended."""
    world = World(PlannerConfig(2, 5, 4, 16))
    world.submit(request("first", [1, 2], 6, ignore_eos=True))
    world.turn()
    world.submit(request("second", LONG[:11], 4, ignore_eos=True))
    world.finish()
    assert world.planner.ranks[0].state.num_preempted == 0, "the page of a running answer was given away"
    return world


def riding() -> World:
    """Answers ride along with the chunks of a long prompt; the chunk counts them."""
    world = World(PlannerConfig(3, 50, 4, 24, chunk_size=4, mixed=True))
    world.submit(request("first", [1], 9, ignore_eos=True))
    world.submit(request("second", [2], 9, ignore_eos=True))
    world.turn()
    world.submit(request("long", LONG, 2))
    world.finish()
    assert "mmm" in kinds(world)
    return world


def turns() -> World:
    """Without mixed steps a long prompt and a running answer take turns."""
    world = World(PlannerConfig(2, 50, 4, 24, chunk_size=3))
    world.submit(request("first", [1], 9, ignore_eos=True))
    world.turn()
    world.submit(request("long", LONG, 1))
    world.finish()
    assert kinds(world) == "pdpdpdpdpdddd", kinds(world)
    return world


def long_while_alone() -> World:
    """Prompts are cut longer while nobody decodes on any rank, and only then."""
    world = World(PlannerConfig(2, 50, 4, 40, chunk_size=3, alone_size=5, num_dp=2))
    world.submit(request("first", LONG[:11], 1))
    world.turn()
    world.turn()
    world.submit(request("second", [1], 6, ignore_eos=True))
    world.finish()
    world.submit(request("third", LONG[:11], 6, ignore_eos=True))
    world.submit(request("fourth", [1], 6, ignore_eos=True))
    world.finish()
    sizes = [[part.num_tokens for part in step.parts] for step in world.steps if (step.parts[0].lengths > 1).any()]
    assert sizes[:2] == [[5, 0], [5, 0]], sizes
    assert [a for a, _ in sizes[-3:]] == [5, 3, 3], sizes
    return world


def turns_together() -> World:
    """Ranks compute prompts in the same steps, though these came one after the other: no step is long for one alone."""
    world = World(PlannerConfig(2, 50, 4, 40, chunk_size=3, num_dp=2))
    for name in ("first", "second"):
        world.submit(request(name, [1], 20, ignore_eos=True))
    world.turn()
    for name in ("third", "fourth"):
        world.submit(request(name, LONG, 1))
        world.turn()
        world.turn()
    world.finish()
    assert kinds(world, 0).startswith("pdpdpdpdpdd"), kinds(world, 0)
    assert kinds(world, 1).startswith("pdddpdpdpdpdd"), kinds(world, 1)
    return world


def full_chunks() -> World:
    """Answers that fill a chunk by themselves do not keep a prompt out: the two take turns."""
    world = World(PlannerConfig(3, 50, 4, 24, chunk_size=2, mixed=True))
    world.submit(request("first", [1], 12, ignore_eos=True))
    world.submit(request("second", [2], 12, ignore_eos=True))
    world.turn()
    world.submit(request("long", LONG[:6], 1))
    world.finish()
    assert kinds(world).startswith("pdpdpdpd"), kinds(world)
    return world


def aborted_in_flight() -> World:
    """A row is taken again while the step in which an aborted sequence draws its end still runs."""
    world = World(PlannerConfig(1, 20, 4, 24, max_in_flight=3))
    gone = ending(request("gone", [1, 2, 3], 9), [2], recurrent=False)
    world.submit(gone)
    world.submit(request("next", [3, 2, 1], 5, ignore_eos=True))
    world.launch()
    world.launch()
    world.abort("gone")
    world.launch()
    world.finish()
    return world


def forked() -> World:
    """Choices of a prompt that ends inside a page, with a state; one ends before the other."""
    world = World(PlannerConfig(4, 50, 4, 24, num_slots=5))
    world.submit(ending(request("many", LONG[:6], 9, n=2), [3, 5], recurrent=True))
    world.finish()
    return world


def twins() -> World:
    """Equal prompts side by side: the later one gives its pages up for those of the tree, and so do its forks."""
    world = World(PlannerConfig(4, 200, 1, 12, prefix_cache=True, max_in_flight=2))
    world.submit(request("scored", [1, 2, 3, 4, 5, 1], 0))
    world.submit(ending(request("forked", [1, 2, 3, 4, 2, 2], 6, n=2), [1, 5], recurrent=False))
    world.finish()
    return world


def one_slot() -> World:
    """Sequences use one slot one after the other."""
    world = World(PlannerConfig(2, 50, 4, 24, num_slots=2))
    world.submit(request("first", [1, 2, 3], 3))
    world.submit(request("second", [1, 2, 3], 3))
    world.finish()
    return world


def spread() -> World:
    """Requests of unequal size over two ranks, by tokens; a rank whose requests have ended idles."""
    world = World(PlannerConfig(4, 50, 4, 24, num_dp=2, load_balance="total_tokens"))
    world.submit(request("long", LONG, 12, ignore_eos=True))
    for i in range(3):
        world.submit(request(f"short{i}", [1, 2, 3], 1))
    world.finish()
    assert [len(part.rows) for part in world.steps[0].parts] == [1, 3]
    assert kinds(world, 0) == "p" + "d" * 11
    assert kinds(world, 1) == "p" + "-" * 11
    return world


def halved() -> World:
    """Mixed steps in two halves; one cut falls inside a prompt."""
    world = World(PlannerConfig(3, 50, 4, 24, num_slots=4, chunk_size=8, mixed=True, split_from=2, split_grain=1))
    world.submit(request("first", [1], 9, ignore_eos=True))
    world.turn()
    world.submit(request("long", LONG, 3, ignore_eos=True))
    world.finish()
    assert "mm" in kinds(world)
    assert any(a.parts[0].rows[-1:] == b.parts[0].rows[:1] for a, b in (s.halves for s in world.steps if s.cuts))
    return world
