"""Logits in the parts that they come in, and the likeliest token of each row.

N rows, G parts of the vocabulary side by side, W tokens of a part, V tokens: what lies behind them is padding.
"""

from __future__ import annotations

from torch import Tensor


def whole(parts: Tensor, vocab_size: int) -> Tensor:
    """Logits [N, G, W] -> [N, V]; a copy only where the parts do not lie side by side."""
    return parts.flatten(1)[:, :vocab_size]


def greedy(parts: Tensor, vocab_size: int) -> Tensor:
    """Logits [N, G, W] -> the likeliest token [N] int64 of each row, the first of those that are equal."""
    return whole(parts, vocab_size).argmax(-1)
