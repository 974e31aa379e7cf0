"""No silent change: sizes of ranks and groups that do not go together are refused, with both sides and a remedy."""

from __future__ import annotations

import contextlib
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.test_config import CPU, CUDA, DENSE, HYBRID, decided, spec_of
from tessera.core.config import Resolved, mesh, resolve
from tessera.core.config.flags_engine import MOST_RANKS
from tessera.core.errors import ConfigError
from tessera.core.mesh import divisors, instance_mesh
from tessera.core.weights import weight_table

TWELVE = {  # heads, experts and columns that go into up to 12 ranks
    **HYBRID,
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "linear_num_key_heads", "num_experts"), 12),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "linear_num_value_heads"), 24),
}
MODELS = {"dense": DENSE, "hybrid": HYBRID, "twelve": TWELVE}


def meshed(model: str = "hybrid", gpus: int = 0, **asked: object) -> Resolved:
    hardware = replace(CUDA, count=gpus) if gpus else CPU
    return resolve({"model_path": "m", **asked}, spec_of(MODELS[model]), hardware)


def refused(model: str = "hybrid", gpus: int = 0, **asked: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        meshed(model, gpus, **asked)
    return [str(c) for c in caught.value.conflicts]


def test_the_seeds_layouts_resolve() -> None:
    decode = meshed(
        tp_size=4, dp_size=2, ep_size=2, enable_dp_attention=True, enable_dp_lm_head=True, moe_dense_tp_size=1,
        load_balance_method="round_robin", gpus=4,
    ).config.mesh  # fmt: skip
    assert decode.mesh == instance_mesh(4, 2, 2, 1, dp_lm_head=True)
    assert (decode.dp_lm_head, decode.balance, decode.replicas) == (True, "round_robin", 1)
    assert "all ranks see" in decided(meshed(tp_size=4, ep_size=2), "--moe-a2a-backend").why
    travelling = meshed(tp_size=4, ep_size=4, moe_a2a_backend="all_to_all")
    assert travelling.config.mesh.mesh == instance_mesh(4, ep=4, all_to_all=True)
    assert "where its experts are" in decided(travelling, "--moe-a2a-backend").why
    mixed = meshed(tp=2, dp=2, enable_dp_attention=True, enable_mixed_chunk=True, chunked_prefill_size=256)
    assert mixed.config.scheduling.chunk_size == 256
    assert "per data-parallel rank" in decided(mixed, "--chunked-prefill-size").why
    overlap = meshed(tp=2, enable_two_batch_overlap=True, tbo_token_distribution_threshold=0.4).config.scheduling
    assert (overlap.split_from, overlap.split_measured, overlap.split_share) == (2, True, 0.4)
    assert meshed(tp=2, gpus=2).config.mesh.peers
    assert not meshed(tp=2, gpus=2, disable_custom_all_reduce=True).config.mesh.peers
    several = meshed(tp=2, gpus=1, nnodes=2, dist_init_addr="h:1")
    assert not several.config.mesh.peers
    assert "several hosts" in decided(several, "small collectives").why
    assert decided(meshed(tp=2, disable_custom_all_reduce=True), "--disable-custom-all-reduce").value == "ignored"
    alone = meshed(enable_two_batch_overlap=True)
    assert alone.config.scheduling.split_from == 0
    assert "no wire" in decided(alone, "two-batch overlap").why
    said = meshed(tp=2, enable_two_batch_overlap=True, tbo_min_tokens=7).config.scheduling
    assert (said.split_from, said.split_measured) == (7, False)
    assert "only read with" in decided(meshed(tp=2, tbo_min_tokens=7), "--tbo-min-tokens").why


BAD: list[tuple[dict[str, object], str, str, str]] = [
    # asked; flags of both sides; found; what to change
    ({"tp_size": 3}, "--tp-size 3 with the model: section 'q'", "cannot be cut for 3", "Use --tp-size 1, 2 or 4"),
    ({"tp_size": 4, "dp_size": 3, "enable_dp_attention": True}, "--dp-size 3 with --tp-size 4", "does not divide",
     "Use --dp-size 2 or 4"),
    ({"tp_size": 4, "ep_size": 3}, "--ep-size 3 with --tp-size 4", "does not divide", "Use --ep-size 1, 2 or 4"),
    ({"tp_size": 8, "ep_size": 8, "dp_size": 2, "enable_dp_attention": True}, "--ep-size 8 with the model",
     "use at most 4 ranks", "Use --ep-size 1, 2 or 4"),
    ({"tp_size": 4, "moe_dense_tp_size": 3}, "--moe-dense-tp-size 3 with --tp-size 4", "does not divide",
     "Use --moe-dense-tp-size 1, 2 or 4"),
    ({"tp_size": 6, "dp_size": 3, "enable_dp_attention": True, "moe_dense_tp_size": 3},
     "--moe-dense-tp-size 3 with --tp-size 6 with --dp-size 3", "groups of 2", "Use --moe-dense-tp-size 1, 2 or 6"),
    ({"tp_size": 2, "moe_a2a_backend": "all_to_all"}, "--moe-a2a-backend all_to_all with --ep-size 1", "go everywhere",
     "Give --ep-size"),
    ({"tp_size": 2, "enable_dp_attention": True}, "--enable-dp-attention with --dp-size 1", "not data parallel",
     "Give --dp-size"),
    ({"tp_size": 2, "enable_dp_lm_head": True}, "--enable-dp-lm-head with no --enable-dp-attention", "no data-parallel",
     "Give --enable-dp-attention"),
    ({"dp_size": 2, "enable_dp_attention": True}, "--dp-size 2 with --tp-size 1", "does not divide 1 rank",
     "Raise --tp-size to 2"),
    ({"nnodes": 2, "tp_size": 2}, "--nnodes 2 with no --dist-init-addr", "where to meet", "HOST:PORT"),
    ({"nnodes": 3, "tp_size": 4, "dist_init_addr": "a:1"}, "--nnodes 3 with --tp-size 4", "spread evenly",
     "Use --nnodes 1, 2 or 4"),
    ({"node_rank": 2, "nnodes": 2, "tp_size": 2, "dist_init_addr": "a:1"}, "--node-rank 2 with --nnodes 2",
     "counted from 0", "from 0 to 1"),
    ({"node_rank": 1}, "--node-rank 1 with --nnodes 1", "counted from 0", "Leave --node-rank out"),
    ({"dist_init_addr": "nowhere"}, "--dist-init-addr nowhere", "no host and port", "HOST:PORT"),
    ({"nnodes": 2, "tp_size": 2, "dp_size": 2, "dist_init_addr": "a:1"}, "--nnodes 2 with --dp-size 2", "on one host",
     "Give --enable-dp-attention"),
    ({"on_failure": "continue"}, "--on-failure continue with one replica", "no other", "more replicas"),
    ({"on_failure": "restart", "nnodes": 2, "tp_size": 2, "dist_init_addr": "a:1"},
     "--on-failure restart with --nnodes 2", "nobody starts", "Use exit"),
    ({"tbo_token_distribution_threshold": 0.6}, "--tbo-token-distribution-threshold", "0.6", "from 0 to 0.5"),
]  # fmt: skip


@pytest.mark.parametrize(("asked", "flags", "found", "remedy"), BAD, ids=lambda v: str(v)[:40])
def test_a_bad_combination_is_refused_with_both_sides_and_a_remedy(
    asked: dict[str, object], flags: str, found: str, remedy: str
) -> None:
    (text,) = [t for t in refused(**asked) if t.startswith(flags)]
    assert found in text
    assert remedy in text
    assert not [t for t in refused(**asked) if "not built yet" in t]


def test_what_is_not_built_is_checked_too() -> None:
    text = refused(tp_size=4, ep_size=3, pp_size=2)
    assert [t.split(":")[0] for t in text] == ["--pp-size 2", "--ep-size 3 with --tp-size 4"]


def test_many_at_once_are_reported_together() -> None:
    text = refused(
        tp_size=6, dp_size=4, ep_size=5, moe_dense_tp_size=4, enable_dp_attention=True, nnodes=4, node_rank=4, gpus=1,
        context_length=10**6, enable_two_batch_overlap=True,
    )  # fmt: skip
    for start in (
        "--dp-size 4 with --tp-size 6", "--ep-size 5 with --tp-size 6", "--moe-dense-tp-size 4 with --tp-size 6",
        "--node-rank 4 with", "--nnodes 4 with no", "--nnodes 4 with --tp-size", "--context-length 1000000 with",
        "--tp-size 6 with the model",
    ):  # fmt: skip
        assert [t for t in text if t.startswith(start)], (start, text)


def test_each_way_of_cutting_the_model_is_named_for_itself() -> None:
    text = refused(tp_size=3)
    assert len(text) == 2  # heads of the attention, and columns inside an expert
    assert len({t.split(": ", 1)[1] for t in text}) == 2
    assert any("it has no experts" in t for t in refused("dense", ep_size=2))


def test_ranks_talk_in_the_fastest_way_that_there_is_and_it_is_told() -> None:
    two = {"nnodes": 2, "dist_init_addr": "a:1"}
    for asked, gpus, kind in (({}, 0, "shared"), ({}, 4, "nccl"), (two, 0, "gloo"), (two, 4, "nccl")):
        found = meshed(tp_size=4, gpus=gpus, **asked)
        assert found.config.mesh.collectives == decided(found, "collectives").value == kind
    assert meshed(tp_size=4, collectives="gloo").config.mesh.collectives == "gloo"
    assert not [d for d in meshed().decisions if d.what == "collectives"]
    for asked, gpus in (
        ({"collectives": "nccl"}, 0),
        ({"collectives": "gloo"}, 4),
        ({"collectives": "shared", **two}, 0),
    ):
        (text,) = refused(tp_size=4, gpus=gpus, **asked)
        assert text.startswith(f"--collectives {asked['collectives']} with --")
        assert "Use --collectives" in text


def test_a_rank_needs_a_gpu() -> None:
    (text,) = refused(tp_size=4, gpus=2)
    assert text.startswith("--tp-size 4 with 2 GPU(s): 4 ranks on this host need a GPU each. Use at most 2")
    (text,) = refused(tp_size=2, dp_size=2, gpus=2)
    assert text.startswith("--tp-size 2 with --dp-size 2 with 2 GPU(s)")
    assert meshed(tp_size=4, nnodes=2, dist_init_addr="10.0.0.1:5000", gpus=2).config.mesh.ranks_here == 2


def test_replicas_are_not_groups_of_the_attention() -> None:
    mesh = meshed(tp_size=2, dp_size=3).config.mesh
    assert (mesh.dp, mesh.replicas, mesh.ranks_here) == (1, 3, 6)


def test_ranks_of_one_host_share_its_ram_and_not_their_gpus() -> None:
    assert meshed(tp_size=4).config.memory.available * 4 == CPU.memory
    assert meshed(tp_size=4, gpus=4).config.memory.available == CUDA.memory


def test_from_where_on_steps_are_halved_is_told_whoever_chose_it() -> None:
    asked = {"tp": 2, "enable_two_batch_overlap": True}
    told = decided(meshed(**asked), "two-batch overlap")
    assert (told.value, "down to 2 tokens" in told.why, "48 %" in told.why) == ("measured at start", True, True)
    chosen = decided(meshed(**asked, tbo_min_tokens=7, tbo_token_distribution_threshold=0.25), "two-batch overlap")
    assert chosen.value == "steps of 7 tokens or more"
    assert ("as asked" in chosen.why, "25 %" in chosen.why) == (True, True)
    never = decided(meshed(gpus=2, **asked, chunked_prefill_size=1024), "two-batch overlap")
    assert (never.value, never.why.split(";")[0]) == (
        "off",
        "no step holds 2049 tokens: what graphs hold is not split unasked",
    )
    assert "--tbo-min-tokens" in never.why
    assert not meshed(gpus=2, **asked, chunked_prefill_size=1024).config.scheduling.split_measured
    late = decided(meshed(**asked, chunked_prefill_size=64, tbo_min_tokens=65), "two-batch overlap")
    assert (late.value, "from which on it is asked for" in late.why) == ("off", True)
    whole = decided(meshed(gpus=2, **asked, chunked_prefill_size=-1), "two-batch overlap")
    assert whole.value == "measured at start", "a prompt that is not cut may be as long"
    launched = decided(meshed(gpus=2, **asked, disable_cuda_graph=True), "two-batch overlap")
    assert "down to 2 tokens" in launched.why


def test_how_tokens_meet_around_experts_is_told_wherever_they_meet() -> None:
    groups = {"tp": 2, "dp": 2, "enable_dp_attention": True}
    assert decided(meshed(**groups), "--moe-a2a-backend").value == "none"
    for asked in ({"tp": 2}, {**groups, "model": "dense"}):
        assert not [d for d in meshed(**asked).decisions if d.what == "--moe-a2a-backend"]  # type: ignore[arg-type]


def test_how_requests_are_spread_is_told_where_it_means_nothing() -> None:
    assert decided(meshed(load_balance_method="total_tokens"), "--load-balance-method total_tokens").value == "ignored"
    told = meshed(dp_size=2, load_balance_method="minimum_tokens")
    assert told.config.mesh.balance == decided(told, "--load-balance-method").value == "total_tokens"
    assert meshed(dp_size=2).config.mesh.balance == "round_robin"


def test_replicas_take_no_part_in_a_hand_over() -> None:
    text = refused(disaggregation_mode="decode", dp_size=2)
    assert any(t.startswith("--disaggregation-mode decode with --dp-size 2: the replicas of a server") for t in text)


def test_what_is_only_read_with_something_else_is_told() -> None:
    for flag, asked in (("max_restarts", 2), ("restart_window", 5.0), ("dist_timeout", 5.0)):
        assert decided(meshed(**{flag: asked}), f"--{flag.replace('_', '-')}").value == "ignored"
    restarting = meshed(on_failure="restart", max_restarts=2).config.serving
    assert (restarting.on_failure, restarting.max_restarts, restarting.restart_window) == ("restart", 2, 600.0)


def test_a_start_may_be_silent_for_as_long_as_its_hosts_may_take_to_meet() -> None:
    hosts: dict[str, object] = {"nnodes": 2, "node_rank": 0, "tp_size": 2, "dist_init_addr": "10.0.0.1:5000"}
    for asked, meeting, start in ((5.0, 5.0, 300.0), (900.0, 900.0, 900.0), (None, 600.0, 600.0)):
        config = meshed(**hosts, **({} if asked is None else {"dist_timeout": asked})).config
        assert (config.mesh.meet_within, config.serving.start_timeout) == (meeting, start)
    assert meshed(tp_size=2, dist_timeout=900.0).config.serving.start_timeout == 300.0


def test_only_where_there_are_several_groups_must_a_request_have_a_room() -> None:
    follow: dict[str, object] = {"load_balance_method": "follow_bootstrap_room"}
    assert meshed(dp_size=2, **follow).config.mesh.follows_rooms
    assert meshed(tp_size=2, dp_size=2, enable_dp_attention=True, **follow).config.mesh.follows_rooms
    alone = meshed(**follow)
    assert decided(alone, "--load-balance-method follow_bootstrap_room").value == "ignored"
    assert not alone.config.mesh.follows_rooms


@st.composite
def sizes(draw: st.DrawFn) -> dict[str, object]:
    """Sizes that mostly divide the number of ranks, so that what is left to refuse is met too."""
    tp = draw(st.integers(1, 12))
    fair = st.sampled_from(divisors(tp)) | st.integers(1, 12)
    return {
        "tp": tp,
        "dp": draw(fair),
        "ep": draw(fair),
        "moe_dense_tp_size": draw(st.none() | fair),
        "enable_dp_attention": draw(st.booleans()),
        "enable_dp_lm_head": draw(st.booleans()),
    }


@given(asked=sizes(), model=st.sampled_from(sorted(MODELS)))
def test_every_combination_resolves_or_is_refused_with_what_to_change(asked: dict[str, object], model: str) -> None:
    with contextlib.suppress(ConfigError):
        config = meshed(model, **asked).config
        assert config.mesh.mesh.size == asked["tp"]
        weight_table(spec_of(MODELS[model]), config.mesh.mesh)  # raises LayoutError where it does not fit
        assert config.memory.weight_bytes > 0
        assert config.memory.num_pages > 1
        return
    assert all(re.search(r": .+\. .+\.$", text) for text in refused(model, **asked))


@pytest.mark.parametrize(
    "asked", [{"tp_size": 3}, {"tp_size": 12, "ep_size": 2}, {"tp_size": 6, "moe_dense_tp_size": 2}], ids=str
)
def test_every_size_that_a_remedy_names_helps(asked: dict[str, object]) -> None:
    text = refused(**asked)[-1]
    sizes = text.rpartition("Use --tp-size ")[2].removesuffix(".").replace(" or ", ", ").split(", ")
    assert len(sizes) > 1
    for size in sizes:
        meshed(**{**asked, "tp_size": int(size)})


@pytest.mark.parametrize("name", ["tp_size", "dp_size", "ep_size", "moe_dense_tp_size", "nnodes"])
def test_sizes_of_ranks_that_nobody_has_are_refused_at_once(name: str) -> None:
    """Known fault: 100,000 ranks resolved for minutes."""
    flag = "--" + name.replace("_", "-")
    assert refused(**{name: 100_000}) == [f"{flag}: found 100000. Expected a whole number from 1 to {MOST_RANKS}."]
    assert not any("Expected a whole number" in text for text in refused(**{name: MOST_RANKS, "device": "cuda"}))


@pytest.mark.parametrize("sizes", [{"ep_size": 3}, {"ep_size": 7}, {"dp_size": 70, "enable_dp_attention": True}, {}])
def test_few_layouts_are_tried_for_a_remedy_however_many_there_are(
    sizes: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """840 has more divisors than any other size up to 1,000: 2,048 pairs of groups, tens of seconds."""
    tried: list[object] = []

    def counting(*args: object, **more: object) -> object:
        tried.append(args)
        return weight_table(*args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(mesh, "weight_table", counting)
    assert any("--tp-size" in text for text in refused("twelve", tp_size=840, **sizes))
    assert len(tried) < 1000, len(tried)
