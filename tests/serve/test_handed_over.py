"""What a client of decode is told of a prompt that prefill computed: as if one engine had."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import tessera

FLAGS: dict[str, Any] = {"device": "cpu", "dtype": "float32", "max_total_tokens": 4096, "page_size": 16}
PARAMS = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}


def times_add_up(meta: dict[str, Any], phases: tuple[str, ...]) -> None:
    """All are seconds, as the request's own latency is; `ended` counts from the request's arrival."""
    handed = meta["handover"]
    assert sum(handed[name] for name in phases) <= handed["ended"] + 0.05, "planners' clocks tick by turn"
    assert 0 < handed["ended"] <= meta["e2e_latency"]


def test_tokens_that_prefill_had_in_its_cache_are_told_by_decode() -> None:
    prompt = [5 + i % 90 for i in range(70)]
    prefill = tessera.Engine("abacus-mla", disaggregation_mode="prefill", disaggregation_bootstrap_port=0, **FLAGS)
    decode = tessera.Engine("abacus-mla", disaggregation_mode="decode", **FLAGS)
    with prefill, decode, ThreadPoolExecutor(1) as pool:
        host, _, port = str(prefill.info["bootstrap"]).rpartition(":")
        place = {"bootstrap_host": host, "bootstrap_port": int(port)}

        def cached(room: int, **fields: Any) -> tuple[int, int]:
            leg = pool.submit(prefill.generate, None, PARAMS, prompt, bootstrap_room=room, **place)
            found = decode.generate(None, PARAMS, prompt, bootstrap_room=room, **place, **fields)
            last = list(found)[-1] if fields else found
            assert last["meta_info"]["completion_tokens"] == 4
            times_add_up(leg.result()["meta_info"], ("meeting", "queue", "prefill", "transfer"))
            times_add_up(last["meta_info"], ("meeting", "queue", "waiting"))
            return leg.result()["meta_info"]["cached_tokens"], last["meta_info"]["cached_tokens"]

        assert cached(1) == (0, 0)
        assert cached(2) == (64, 64), "four pages of sixteen"
        assert cached(3, stream=True) == (64, 64)
