"""What of the table of flags this build runs beyond what the table calls built: features are lifted here, nowhere else.

A name is that of a flag (`tp_size`), of one value (`kv_cache_dtype=fp8_e4m3`), or `replicas` (`--dp-size` without
`--enable-dp-attention`). What is not lifted is refused by name; its combinations are checked all the same.
"""

from __future__ import annotations

BUILT: frozenset[str] = frozenset(
    {
        "tp_size",
        "dp_size",
        "ep_size",
        "moe_dense_tp_size",
        "enable_dp_attention",
        "enable_dp_lm_head",
        "enable_two_batch_overlap",
        "replicas",
        "disaggregation_mode=prefill",
        "disaggregation_mode=decode",
        "disaggregation_transfer_backend=mooncake",
        "disaggregation_transfer_backend=nixl",
        "nnodes",
        "node_rank",
    }
)
