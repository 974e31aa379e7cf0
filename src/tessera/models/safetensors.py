"""A checkpoint folder of safetensors files, read box by box with plain reads: no mapping, so no page of a file stays.

Format: https://github.com/huggingface/safetensors (8 bytes length, a JSON header, then the bytes of all tensors).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessera.core.errors import ModelError
from tessera.models.source import Span, blocks

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}
INDEX = "model.safetensors.index.json"
SCALE = "_scale_inv"
FUSED = {"gate": ("gate_up_proj", 0), "up": ("gate_up_proj", 1), "down": ("down_proj", 0)}


@dataclass(frozen=True, slots=True)
class Entry:
    """A matrix [rows, columns] inside a file: element (r, c) at `offset + (r * pitch + c) * itemsize`.

    `transposed`: what is stored is the transpose of what the name stands for.
    """

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    rows: int
    columns: int
    pitch: int
    transposed: bool = False


class Checkpoint:
    """The tensors of a folder under their canonical names; fp8 blocks are dequantised, fused experts are taken apart.

    `block`: rows and columns of a block of fp8 weights. Raises `ModelError` when the folder holds no safetensors or a
    file is broken.
    """

    def __init__(self, folder: Path, block: tuple[int, int] | None = None) -> None:
        self.block = block
        self._entries: dict[str, Entry] = {}
        self._files: dict[Path, int] = {}
        self._scales: dict[str, Tensor] = {}
        for path in _files(folder):
            for name, entry in _entries(path):
                self._entries[canonical(name)] = entry
        self._found = set(self._entries)
        self._parts: dict[str, str] = {}  # an expert's tensor -> the fused tensor that it is a part of
        self._split_experts()

    def close(self) -> None:
        """Closes the files."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def shape(self, name: str) -> tuple[int, ...] | None:
        """See `Source.shape`."""
        entry = self._entries.get(name)
        return None if entry is None else entry.shape

    def copy(self, name: str, rows: Span, columns: Span, out: Tensor) -> None:
        """See `Source.copy`. fp8 weights are multiplied by the scales of their global blocks, at any cut."""
        entry = self._entries[name]
        if entry.transposed:
            rows, columns, out = columns, rows, out.T
        done = 0
        for start, length in blocks(rows, entry.pitch * entry.dtype.itemsize):
            box = self._read(entry, start, length).narrow(1, *columns)
            if entry.dtype == torch.float8_e4m3fn:
                box = self._dequantised(name, box, start, columns[0])
            out[done : done + length].copy_(box)
            done += length

    def leftovers(self, used: Iterable[str]) -> list[str]:
        """See `Source.leftovers`."""
        known = set(used)
        known |= {self._parts[name] for name in known if name in self._parts}
        return sorted(name for name in self._found if name.removesuffix(SCALE) not in known)

    def _read(self, entry: Entry, start: int, length: int) -> Tensor:
        """Stored rows `start ..` as [length, columns]."""
        size = entry.dtype.itemsize
        count = (length - 1) * entry.pitch + entry.columns
        buffer = torch.empty(count * size, dtype=torch.uint8)
        view, at = memoryview(buffer.numpy()), entry.offset + start * entry.pitch * size
        while view:
            got = os.preadv(self._open(entry.path), [view], at)
            if got <= 0:
                raise ModelError(f"{entry.path} ends at byte {at}, inside a tensor; fetch the file again")
            view, at = view[got:], at + got
        return buffer.view(entry.dtype).as_strided((length, entry.columns), (entry.pitch, 1))

    def _open(self, path: Path) -> int:
        if path not in self._files:
            self._files[path] = os.open(path, os.O_RDONLY)
        return self._files[path]

    def _dequantised(self, name: str, box: Tensor, row: int, column: int) -> Tensor:
        if self.block is None:
            raise ModelError(f"tensor '{name}' is fp8, but config.json has no quantization_config with its block size")
        height, width = self.block
        scales = self._scale(name)
        rows = torch.arange(row, row + box.shape[0]) // height
        columns = torch.arange(column, column + box.shape[1]) // width
        return box.float() * scales[rows][:, columns]

    def _scale(self, name: str) -> Tensor:
        if name not in self._scales:
            found, entry = self._entries.get(name + SCALE), self._entries[name]
            expected = tuple(-(-n // b) for n, b in zip((entry.rows, entry.columns), self.block or (), strict=True))
            if found is None or (found.rows, found.columns) != expected:
                shape = None if found is None else found.shape
                raise ModelError(f"tensor '{name}{SCALE}' of an fp8 weight: found {shape}, expected {expected}")
            self._scales[name] = self._read(found, 0, found.rows).float()
        return self._scales[name]

    def _split_experts(self) -> None:
        """Adds a name per expert for the fused `experts.gate_up_proj` and `experts.down_proj`.

        Both orientations exist: [E, 2I, H] with [E, H, I], and their transposes. The second of the pair tells them
        apart: gate_up shares H with down, and I is half of the other.
        """
        for name in [n for n in self._entries if n.endswith(".experts.gate_up_proj")]:
            base = name.removesuffix("gate_up_proj")
            fused, down = self._entries[name], self._entries.get(f"{base}down_proj")
            if down is None or len(fused.shape) != 3 or len(down.shape) != 3:
                raise ModelError(f"'{name}' {fused.shape} needs '{base}down_proj', both of three dims")
            transposed = fused.shape[1:] != (2 * down.shape[2], down.shape[1])
            if transposed and fused.shape[1:] != (down.shape[2], 2 * down.shape[1]):
                raise ModelError(f"'{name}' {fused.shape} does not go with '{base}down_proj' {down.shape}")
            for e in range(fused.shape[0]):
                for part, (tensor, half) in FUSED.items():
                    expert = f"{base}{e}.{part}_proj.weight"
                    self._entries[expert] = _expert(self._entries[base + tensor], e, half, part != "down", transposed)
                    self._parts[expert] = base + tensor


def _expert(fused: Entry, e: int, half: int, halved: bool, transposed: bool) -> Entry:
    """Expert `e` of a fused tensor: all of its matrix, or half `half` of the rows (columns where transposed)."""
    rows, columns = fused.shape[1:]
    size = fused.dtype.itemsize
    offset, pitch = fused.offset + e * rows * columns * size, columns
    if halved and transposed:
        columns //= 2
        offset += half * columns * size
    elif halved:
        rows //= 2
        offset += half * rows * columns * size
    shape = (columns, rows) if transposed else (rows, columns)
    return replace(fused, shape=shape, offset=offset, rows=rows, columns=columns, pitch=pitch, transposed=transposed)


def canonical(name: str) -> str:
    """The name under which `core/weights.py` knows a tensor: the text part of a larger model loses its prefix."""
    for prefix, plain in (("model.language_model.", "model."), ("language_model.model.", "model.")):
        if name.startswith(prefix):
            return plain + name.removeprefix(prefix)
    return name.removeprefix("language_model.")


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        paths = [folder / name for name in names]
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            raise ModelError(f"{folder}: {INDEX} names {len(missing)} missing files: {', '.join(missing[:5])}")
        return paths
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise ModelError(f"{folder} holds no *.safetensors; only that format is read (or use --load-format dummy)")
    return paths


def _entries(path: Path) -> list[tuple[str, Entry]]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ModelError(f"{path} is no safetensors file, or it was cut short; fetch it again")
        header: dict[str, Any] = json.loads(file.read(length))
    entries = []
    for name, about in header.items():
        if name == "__metadata__":
            continue
        dtype = DTYPES.get(about["dtype"], torch.uint8)  # integers are never asked for by a table
        shape = tuple(about["shape"])
        rows = shape[0] if shape else 1
        columns = prod(shape[1:])
        entries.append((name, Entry(path, dtype, shape, 8 + length + about["data_offsets"][0], rows, columns, columns)))
    return entries
