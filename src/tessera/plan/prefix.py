"""The prefix cache: a tree over whole pages of tokens, for models whose whole state is in pages.

A node is one page under the tokens it holds; its key is exact (the tokens themselves), chained by its ancestors over
the namespace and the version of the weights at the root. Whoever holds the page of a node holds those of all its
ancestors, so idle nodes form whole subtrees and can be evicted leaf by leaf, least lately used first.
(After RadixAttention, Zheng et al. 2023, arXiv:2312.07104.)
"""

from __future__ import annotations

import heapq
from weakref import WeakValueDictionary

import numpy as np

from tessera.plan.pages import PagePool
from tessera.plan.step import Ints, ints


class Node:
    """One page of the tree. A root has no page (0)."""

    __slots__ = ("__weakref__", "children", "key", "page", "parent")

    def __init__(self, parent: Node | None, key: bytes, page: int) -> None:
        self.parent = parent
        self.key = key
        self.page = page
        self.children: dict[bytes, Node] = {}


class PrefixTree:
    """The tree over pages of `pool`. Without `enabled` nothing matches and nothing is kept."""

    def __init__(self, pool: PagePool, page_size: int, weights_version: str, enabled: bool) -> None:
        self.enabled = enabled
        self.version = 0  # grows when a page comes or goes: what matches may differ
        self._pool = pool
        self._page_size = page_size
        self._version = weights_version
        # A root is held by its pages and its sequences; one without either is gone, since namespaces are any strings.
        self._roots: WeakValueDictionary[tuple[str, str], Node] = WeakValueDictionary()
        self._nodes: dict[int, Node] = {}
        self._used = np.zeros(pool.num_pages if enabled else 0, np.int64)
        self._tick = 0
        self._oldest: list[tuple[int, int]] = []

    def root(self, namespace: str) -> Node:
        """Root of a namespace under the weights of now."""
        return self._roots.setdefault((namespace, self._version), Node(None, b"", 0))

    def match(self, namespace: str, tokens: Ints, most: int) -> tuple[Node, Ints]:
        """Deepest node that holds a prefix of `tokens` of at most `most` tokens, and the pages up to it."""
        node, pages = self.root(namespace), []
        size = self._page_size * tokens.itemsize
        data = tokens[: most // self._page_size * self._page_size].tobytes()
        for at in range(0, len(data), size):
            child = node.children.get(data[at : at + size])
            if child is None:
                break
            node = child
            pages.append(node.page)
        return node, ints(pages)

    def touch(self, pages: Ints) -> None:
        """Marks pages as used now."""
        self._tick += 1
        self._used[pages] = self._tick

    def publish(self, node: Node, tokens: Ints, pages: Ints) -> tuple[Node, list[tuple[int, int]]]:
        """Adds `pages`, which hold `tokens` below `node`, and returns the last node.

        Where the tree holds the same tokens in another page, whoever holds the page given is to take that one instead:
        (index in `pages`, page of the tree).
        """
        swaps: list[tuple[int, int]] = []
        size = self._page_size * tokens.itemsize
        data = tokens.tobytes()
        for i, page in enumerate(pages.tolist()):
            key = data[i * size : (i + 1) * size]
            child = node.children.get(key)
            if child is None:
                child = node.children[key] = self._nodes[page] = Node(node, key, page)
                self._pool.cache(page)
                self.version += 1
            elif child.page != page:
                swaps.append((i, child.page))
            node = child
        return node, swaps

    def evict(self, count: int) -> int:
        """Drops up to `count` idle pages, least lately used leaves first; returns how many."""
        evicted = 0
        while evicted < count:
            if not self._oldest and not self._scan():
                break
            used, page = heapq.heappop(self._oldest)
            node = self._nodes.get(page)
            if node is None or node.children or self._pool.refs[page] != 1 or self._used[page] != used:
                continue
            evicted += 1
            self.version += 1
            parent = node.parent
            assert parent is not None
            del parent.children[node.key], self._nodes[page]
            self._pool.evict(page)
            if parent.page and not parent.children and self._pool.refs[parent.page] == 1:
                heapq.heappush(self._oldest, (int(self._used[parent.page]), parent.page))
        return evicted

    def _scan(self) -> bool:
        idle = np.flatnonzero(self._pool.cached & (self._pool.refs == 1)).tolist()
        self._oldest = [(int(self._used[page]), page) for page in idle if not self._nodes[page].children]
        heapq.heapify(self._oldest)
        return bool(self._oldest)

    def flush(self) -> int:
        """Drops every idle page; returns how many."""
        return self.evict(self._pool.num_idle)

    def pages(self) -> Ints:
        """Pages that the tree holds."""
        return ints(list(self._nodes))

    def check(self) -> None:
        """The tree and its index of pages agree, and no idle page has a busy one below it."""
        seen: dict[int, Node] = {}
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            for key, child in node.children.items():
                assert child.parent is node
                assert child.key == key
                assert child.page not in seen, f"page {child.page} is in the tree twice"
                assert not node.page or self._pool.refs[node.page] > 1 or self._pool.refs[child.page] == 1
                seen[child.page] = child
                stack.append(child)
        assert seen == self._nodes, "the tree and its index of pages differ"
        assert set(np.flatnonzero(self._pool.cached).tolist()) == set(seen), "cached pages are not those of the tree"
