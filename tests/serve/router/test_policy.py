"""Policies of the router: every choice is a candidate, turns are even, prefixes are found, load wins over caches."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.serve.router.policy import POLICIES, CacheAware, LeastLoaded, RoundRobin
from tessera.serve.router.prefixes import Prefixes

SERVERS = [f"s{i}" for i in range(5)]
prompts = st.one_of(st.none(), st.text("ab", max_size=40), st.lists(st.integers(0, 2), max_size=40))
loads = st.dictionaries(st.sampled_from(SERVERS), st.integers(0, 200), min_size=1)


@given(st.sampled_from(sorted(POLICIES)), st.lists(st.tuples(loads, prompts, st.booleans()), max_size=30))
def test_every_choice_is_a_candidate_whatever_comes_and_goes(name: str, rounds: list[tuple]) -> None:  # type: ignore[type-arg]
    policy = POLICIES[name]()
    for load, prompt, forget in rounds:
        chosen = policy.choose(load, prompt)
        assert chosen in load
        policy.took(chosen, prompt)
        if forget:
            policy.forget(chosen)


@given(st.integers(1, 5), st.integers(1, 40))
def test_round_robin_is_even_at_every_moment(count: int, requests: int) -> None:
    policy, seen = RoundRobin(), Counter(dict.fromkeys(SERVERS[:count], 0))
    for _ in range(requests):
        chosen = policy.choose(dict.fromkeys(SERVERS[:count], 0), None)
        policy.took(chosen, None)
        seen[chosen] += 1
        assert max(seen.values()) - min(seen.values()) <= 1


def test_round_robin_does_not_flood_one_that_was_away() -> None:
    policy = RoundRobin()
    for candidates in [SERVERS[:2]] * 10 + [SERVERS[:3]] * 6:
        policy.took(policy.choose(dict.fromkeys(candidates, 0), None), None)
    chosen = []
    for _ in range(3):
        chosen.append(policy.choose(dict.fromkeys(SERVERS[:3], 0), None))
        policy.took(chosen[-1], None)
    assert sorted(chosen) == SERVERS[:3]


@given(loads)
def test_least_loaded_takes_a_least_loaded(load: dict[str, int]) -> None:
    assert load[LeastLoaded().choose(load, "x")] == min(load.values())


def blocks(prompt: str, size: int) -> list[str]:
    return [prompt[i : i + size] for i in range(0, max(len(prompt) - size, 0) + 1, size)]


@given(
    st.lists(st.tuples(st.sampled_from(SERVERS), st.text("ab", min_size=1, max_size=30)), max_size=20),
    st.text("ab", min_size=1, max_size=30),
)
def test_shares_are_those_of_the_longest_common_prefix_in_blocks(sent: list[tuple[str, str]], prompt: str) -> None:
    tree, size, expected = Prefixes(text_block=3), 3, {}
    for server, text in sent:
        tree.add(server, text)
    for server in SERVERS:
        best = 0
        for _, text in [one for one in sent if one[0] == server]:
            common = 0
            for mine, theirs in zip(blocks(prompt, size), blocks(text, size), strict=False):
                if mine != theirs:
                    break
                common += 1
            best = max(best, common)
        if best:
            expected[server] = min(1.0, best * size / len(prompt))
    assert tree.shares(prompt) == expected


@settings(max_examples=30)
@given(st.lists(st.text("ab", min_size=1, max_size=60), min_size=1, max_size=30))
def test_the_tree_is_bounded_and_never_holds_a_node_without_its_parent(texts: list[str]) -> None:
    tree = Prefixes(most=8, text_block=2)
    for text in texts:
        tree.add("s0", text)
        assert len(tree) <= 8
        held = [key in tree._nodes for key in tree._keys(text)]
        assert held == sorted(held, reverse=True), "a child outlived its parent"
    tree.remove("s0")
    assert len(tree) == 0


def test_cache_aware_follows_prefixes_until_the_load_is_uneven() -> None:
    policy = CacheAware(balance_abs=4, balance_rel=1.5)
    system = "You are a helpful assistant. " * 10
    policy.took("s1", system + "first question")
    even = {"s0": 0, "s1": 4, "s2": 0}
    assert policy.choose(even, system + "second question") == "s1"
    assert policy.choose(even, "something else entirely, and long enough for a block or two, at that") != "s1"
    assert policy.choose({**even, "s1": 5}, system + "third question") != "s1", "5 more than 0 is uneven"
    policy.forget("s1")
    assert policy.choose(even, system + "fourth question") != "s1", "it is another process now"


def test_token_ids_and_text_do_not_meet() -> None:
    tree = Prefixes(text_block=1, token_block=1)
    tree.add("s0", [1, 2, 3])
    assert tree.shares([1, 2, 4]) == {"s0": 2 / 3}
    assert tree.shares("abc") == {}
