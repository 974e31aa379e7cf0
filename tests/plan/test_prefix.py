"""The prefix cache keeps nothing of a namespace that has no pages left."""

from __future__ import annotations

from tessera.plan.pages import PagePool
from tessera.plan.prefix import PrefixTree
from tessera.plan.step import ints

SIZE = 4  # tokens of a page


def test_a_namespace_without_pages_is_forgotten() -> None:
    """Callers name them (`cache_salt`), so there is no end of them."""
    pool = PagePool(8)
    tree = PrefixTree(pool, SIZE, "weights", enabled=True)
    for i in range(100):
        assert tree.match(f"salt {i}", ints(range(SIZE + 1)), SIZE)[0] is not tree.root("another")
    assert len(tree._roots) == 0
    pages = pool.take(2)
    tree.publish(tree.root("kept"), ints(range(2 * SIZE)), pages)
    pool.drop(pages)
    assert tree.match("kept", ints(range(2 * SIZE)), 2 * SIZE)[1].tolist() == pages.tolist()
    assert len(tree._roots) == 1
    tree.check()
    assert tree.flush() == 2
    assert len(tree._roots) == 0
    tree.check()
