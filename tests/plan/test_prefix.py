"""The prefix tree: what is shared stays held, and what it counts as idle can really be taken back."""

from __future__ import annotations

from plan.fake import World, request
from tessera.plan.scheduler import PlannerConfig


def test_forks_move_to_the_pages_of_the_tree_with_their_parent() -> None:
    """Two equal prompts are computed side by side; the later one's forks share the pages that it gives up."""
    world = World(PlannerConfig(4, 200, 1, 12, prefix_cache=True, max_in_flight=2))
    world.submit(request("scored", [1, 2, 3, 4, 5, 1], 0))
    world.submit(request("forked", [1, 2, 3, 4, 2, 2], 2, n=2))
    world.finish()
