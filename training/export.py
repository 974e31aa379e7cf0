"""A trained model as a Hugging Face checkpoint and back: bfloat16, one matrix per expert, the two configs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from configs import GENERATION
from model import Model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state under its Hugging Face names; `experts.gate_proj` [E, I, M] becomes `experts.0.gate_proj.weight` ..."""
    out: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        value = value.detach().cpu().to(torch.bfloat16)
        if ".experts." in name:
            head, matrix = name.rsplit(".", 1)
            out |= {f"{head}.{i}.{matrix}.weight": part.contiguous() for i, part in enumerate(value)}
        else:
            out[name] = value.contiguous()
    return out


def write(model: nn.Module, config: dict[str, Any], tokenizer: Path, out: Path) -> None:
    """`tokenizer`: the folder that holds `tokenizer.json` and `tokenizer_config.json`."""
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors(model), out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (out / "generation_config.json").write_text(json.dumps(GENERATION, indent=2, sort_keys=True) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (out / name).exists():
            shutil.copyfile(tokenizer / name, out / name)


def restore(path: Path) -> Model:
    """The training module with a checkpoint's weights, in float32."""
    model = Model(json.loads((path / "config.json").read_text()))
    held = load_file(path / "model.safetensors")
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        head, matrix = name.rsplit(".", 1)
        if ".experts." in name:
            state[name] = torch.stack([held.pop(f"{head}.{i}.{matrix}.weight") for i in range(len(value))])
        else:
            state[name] = held.pop(name)
    assert not held, f"left over: {sorted(held)}"
    model.load_state_dict(state)
    return model
