"""Scales that a checkpoint brings for keys and values in fp8 pages, under all the names that they have been given.

Our pages hold keys and values as they are. So such a tensor is not needed where pages are in another dtype; where they
are in fp8 a scale of 1 says nothing, and any other is refused. A name that is not here is refused as every tensor that
nothing uses.

Sources: `maybe_remap_kv_scale_name` and `get_cache_scale` of vLLM and SGLang, and the names of compressed-tensors,
ModelOpt, AMMO, Quark, HunYuan and Ascend that these or their forks take.
"""

from __future__ import annotations

import re

# Ends of names. Some are the scale and some one divided by it, so only 1 is read the same in all.
OF_CACHE = re.compile(
    r"""\.(
        [kv]_scale | kv_scale                       # in self_attn, self_attn.attn, [kv]_proj or qkv_proj
        | [kv]_proj\.output_scale
        | (kv|[kv])_cache[._]scale | kv_cache_scaling_factor
        | (key|value)_(antiquant_)?scale
    )$""",
    re.VERBOSE,
)
