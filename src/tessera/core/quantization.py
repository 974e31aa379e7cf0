"""Which weights are in fp8, in which blocks: said by a checkpoint, or asked for (`--quantization fp8`).

The scheme is DeepSeek-V3's (arXiv 2412.19437, 3.3): e4m3 with one scale for each block of a stored tensor, activations
quantised in groups of as many neighbours as a block has columns. What is a projection is in blocks; embedding, head,
routers, gates of a number a token or head, norms and convolutions are not, in every checkpoint that is published so.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

# kv_b_proj is not among them: absorbed MLA multiplies by its parts, in the model's dtype.
PROJECTION = re.compile(r"\.((q|k|v|o|q_a|q_b|gate|up|down|out)_proj|kv_a_proj_with_mqa|in_proj_(qkv|z|qkvz))\.weight$")
LIBRARY_BLOCK = (128, 128)  # that DeepGEMM's products take on compute capability 9
PREFIXES = (("model.language_model.", "model."), ("language_model.model.", "model."), ("language_model.", ""))


@dataclass(frozen=True, slots=True)
class Quantization:
    """Weights in fp8 with one scale for each `block` (rows, columns) of a stored tensor.

    `kept`: modules that are not (`modules_to_not_convert`), by canonical names or their ends. `loading`: the checkpoint
    is not quantised, its weights are while they are loaded. `dequantized`: weights get the model's dtype back while
    they are loaded, and products are those of that dtype.
    """

    block: tuple[int, int] = (128, 128)
    kept: tuple[str, ...] = ()
    loading: bool = False
    dequantized: bool = False

    @property
    def group(self) -> int:
        """Neighbours of a row of activations that share a scale."""
        return self.block[1]

    def covers(self, tensor: str) -> bool:
        """Whether the checkpoint's tensor of this (canonical) name is in fp8."""
        if PROJECTION.search(tensor) is None:
            return False
        module = tensor.removesuffix(".weight")
        return not any(f".{module}.".startswith(f".{k}.") or f".{module}".endswith(f".{k}") for k in self.kept)


def deep_gemm_misfit(block: tuple[int, int], shape: Sequence[int]) -> str:
    """Why DeepGEMM has no product with a tile [..., N, K] in such blocks; empty where it has one."""
    if block != LIBRARY_BLOCK:
        return f"it takes blocks of {LIBRARY_BLOCK[0]}x{LIBRARY_BLOCK[1]}, found {block[0]}x{block[1]}"
    if shape[-2] % 8 or shape[-1] % 16:
        return f"it takes rows in eights and columns in sixteens, found {shape[-2]}x{shape[-1]}"
    return ""


def canonical(name: str) -> str:
    """The name under which `core/weights.py` knows a tensor: the text part of a larger model loses its prefix."""
    for prefix, plain in PREFIXES:
        if name.startswith(prefix):
            return plain + name.removeprefix(prefix)
    return name
