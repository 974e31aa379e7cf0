"""Checkpoints on disk in the forms that the hub knows: in shards with an index, fp8 in blocks, fused experts."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.configs import CASES
from models.oracle import make_model
from tessera.core.mesh import SINGLE, Mesh
from tessera.core.weights import weight_table
from tessera.models.folder import open_source, read_model
from tessera.models.load import load_weights
from tessera.models.parts import Tile
from tessera.ops.fp8 import Fp8Weight
from tessera.ops.linear import PackedLinear

State = dict[str, Tensor]
INDEX = "model.safetensors.index.json"


def made(case: str, folder: Path, **fields: Any) -> tuple[State, dict[str, Any]]:
    """A parity case with other `fields`, saved in `folder` in one file: its tensors and its config."""
    model_type, chosen = next((kind, {**f, **fields}) for name, kind, f in CASES if name == case)
    make_model(model_type, chosen).save_pretrained(folder)
    return load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())


def write(folder: Path, state: State, config: dict[str, Any], shards: int = 3) -> dict[str, str]:
    """Writes a checkpoint in `shards` files with an index: the file of each tensor."""
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.safetensors"):
        old.unlink()
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(state)
    files = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({n: state[n].contiguous() for n in names if files[n] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": files}))
    return files


def tiles(folder: Path, mesh: Mesh = SINGLE, rank: int = 0, mtp: bool = False, **options: Any) -> dict[str, Tensor]:
    """What a rank loads of a folder, in float32, unpacked."""
    spec = read_model(folder)
    table = weight_table(spec, mesh, mtp)
    return unpacked(load_weights(open_source(folder, spec, table, **options), table, mesh, rank, torch.float32))


def unpacked(loaded: Mapping[str, Tile]) -> dict[str, Tensor]:
    """The tiles as plain tensors."""
    plain = {}
    for name, tile in loaded.items():
        assert not isinstance(tile, Fp8Weight), f"{name} is in fp8"
        plain[name] = tile.weight if isinstance(tile, PackedLinear) else tile
    return plain


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """To the bit."""
    assert found.keys() == expected.keys()
    for name, tile in expected.items():
        assert torch.equal(found[name], tile), name


def quantised(state: State, block: tuple[int, int]) -> tuple[State, State]:
    """Every projection as fp8 with a scale per block; and the same dequantised."""
    fp8, plain = {}, {}
    for name, weight in state.items():
        fp8[name] = plain[name] = weight
        if not re.search(r"(_proj(_with_mqa)?|in_proj_(qkv|qkvz|z))\.weight$", name):
            continue
        height, width = block
        rows, columns = (-(-n // b) for n, b in zip(weight.shape, block, strict=True))
        spread = torch.zeros(rows * height, columns * width)
        spread[: weight.shape[0], : weight.shape[1]] = weight
        scales = spread.view(rows, height, columns, width).abs().amax((1, 3)) / 448
        grid = scales.repeat_interleave(height, 0).repeat_interleave(width, 1)[: weight.shape[0], : weight.shape[1]]
        fp8[name] = (weight / grid).to(torch.float8_e4m3fn)
        fp8[f"{name}_scale_inv"] = scales
        plain[name] = fp8[name].float() * grid
    return fp8, plain


def fused(state: State, transposed: bool = False) -> State:
    """The experts of each layer as `experts.gate_up_proj` [E, 2I, H] and `experts.down_proj` [E, H, I] (and scales)."""
    out: State = {}
    experts: dict[str, dict[tuple[int, str], Tensor]] = {}
    for name, tensor in state.items():
        found = re.fullmatch(r"(.*\.experts\.)(\d+)\.(gate|up|down)_proj\.weight(_scale_inv)?", name)
        if found is None:
            out[name] = tensor
            continue
        base, number, part, scale = found.groups()
        experts.setdefault(f"{base}|{scale or ''}", {})[int(number), part] = tensor.float()
    for key, parts in experts.items():
        base, scale = key.split("|")
        dtype = torch.float32 if scale else next(t for n, t in state.items() if n.startswith(base)).dtype
        count = 1 + max(e for e, _ in parts)
        gate_up = torch.stack([torch.cat([parts[e, "gate"], parts[e, "up"]]) for e in range(count)])
        down = torch.stack([parts[e, "down"] for e in range(count)])
        for name, tensor in (("gate_up_proj", gate_up), ("down_proj", down)):
            out[f"{base}{name}{scale}"] = (tensor.transpose(1, 2) if transposed else tensor).contiguous().to(dtype)
    return out
