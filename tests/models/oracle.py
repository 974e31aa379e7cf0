"""Random tiny models of every family, saved by transformers, and its logits: the oracle of the parity tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel


def make_model(model_type: str, fields: dict[str, Any], seed: int = 0) -> PreTrainedModel:
    """A random model: matrices well above the usual spread, so that gates and routers matter, and norms that differ."""
    config = AutoConfig.for_model(
        model_type, **{"attn_implementation": "eager", "experts_implementation": "eager", **fields}
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, weight in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" in name:
                continue
            if "e_score_correction_bias" in name:
                weight.normal_(0, 0.2)
            elif name.endswith("A_log"):
                weight.normal_(-2, 1)  # states that last
            elif name.endswith("dt_bias") or "norm" in name:
                weight.add_(torch.randn_like(weight) * 0.3)
            else:
                weight.normal_(0, 1.2 * weight.shape[-1] ** -0.5)
    return model


def save(model: PreTrainedModel, folder: Path) -> Path:
    """The model as transformers writes it."""
    model.save_pretrained(folder)
    return folder


def logits(model: PreTrainedModel, tokens: list[int]) -> Tensor:
    """[T, V] of one prefill."""
    with torch.inference_mode():
        return model(torch.tensor([tokens]), use_cache=False).logits[0]
