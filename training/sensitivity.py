"""What a broken hand-over costs: accuracy after the cache of a prefilled prompt was damaged in a known way.

`python training/sensitivity.py src/tessera/assets/abacus-hybrid`. The first token comes from the prefill and the conv
window touches only the first three decoded tokens: the tasks are made so that decoded tokens 2 to 4 decide. A fault
that cost nothing would be a fault that an accuracy run cannot see.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from evaluate import Fault, accuracy, load, say
from transformers import DynamicCache, PretrainedConfig

from tessera.evals.tasks import TASKS


def zero_states(cache: DynamicCache, config: PretrainedConfig) -> None:
    """All delta-rule states lost."""
    for layer, kind in zip(cache.layers, config.layer_types, strict=True):
        if kind == "linear_attention":
            layer.recurrent_states[0].zero_()


def cut_conv(cache: DynamicCache, config: PretrainedConfig) -> None:
    """Two ranks' `q_r|k_r|v_r` laid end to end and read as `q|k|v`: the wrong cut, where only the offset matters."""
    key = config.linear_num_key_heads * config.linear_key_head_dim
    value = config.linear_num_value_heads * config.linear_value_head_dim
    q, k, v = torch.arange(2 * key + value).split([key, key, value])
    order = torch.cat([part.chunk(2)[rank] for rank in range(2) for part in (q, k, v)])
    for layer, kind in zip(cache.layers, config.layer_types, strict=True):
        if kind == "linear_attention":
            layer.conv_states[0].copy_(layer.conv_states[0][:, order])


def shift_conv(cache: DynamicCache, config: PretrainedConfig) -> None:
    """Conv windows read one head too far."""
    for layer, kind in zip(cache.layers, config.layer_types, strict=True):
        if kind == "linear_attention":
            layer.conv_states[0].copy_(layer.conv_states[0].roll(config.linear_key_head_dim, 1))


def swap_heads(cache: DynamicCache, config: PretrainedConfig) -> None:
    """The two KV heads of every cached key and value exchanged."""
    for layer, kind in zip(cache.layers, config.layer_types, strict=True):
        if kind == "full_attention":
            layer.keys, layer.values = layer.keys.flip(1), layer.values.flip(1)


FAULTS = {
    "delta-rule states zeroed": zero_states,
    "conv channels one head off": shift_conv,
    "conv channels of two ranks": cut_conv,
    "KV heads swapped": swap_heads,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--num", type=int, default=100, help="held-out questions of each task")
    args = parser.parse_args()
    model, tokenizer = load(args.checkpoint)
    faults: dict[str, Fault | None] = {"none": None}
    for name, fault in FAULTS.items():
        faults[name] = lambda cache, fault=fault: fault(cache, model.config)
    say(f"{'fault':28}" + "".join(f"{name:>10}" for name in TASKS))
    for name, fault in faults.items():
        shares = [
            accuracy(model, tokenizer, task, task.questions("heldout", args.num, seed=0), fault)
            for task in TASKS.values()
        ]
        say(f"{name:28}" + "".join(f"{100 * share:8.1f} %" for share in shares))


if __name__ == "__main__":
    main()
