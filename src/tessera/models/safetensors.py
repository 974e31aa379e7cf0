"""Safetensors files, read box by box with plain reads: no mapping, so no page of a file stays with the process.

Format: https://github.com/huggingface/safetensors (8 bytes length, a JSON header, then the bytes of all tensors).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessera.core.errors import ModelError

INDEX = "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


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

    def bytes(self, length: int) -> int:
        """Bytes from the first to the last element of `length` neighbouring rows."""
        return ((length - 1) * self.pitch + self.columns) * self.dtype.itemsize

    def read(self, start: int, length: int, buffer: Tensor) -> Tensor:
        """Stored rows `start .. start + length - 1` as [length, columns]: a view of `buffer` (bytes).

        Raises `ModelError` when the file ends.
        """
        taken = buffer[: self.bytes(length)]
        view, at = memoryview(taken.numpy()), self.offset + start * self.pitch * self.dtype.itemsize
        with self.path.open("rb", buffering=0) as file:
            while view:
                got = os.preadv(file.fileno(), [view], at)
                if got <= 0:
                    raise ModelError(f"{self.path} ends at byte {at}, inside a tensor; fetch the file again")
                view, at = view[got:], at + got
        return taken.view(self.dtype).as_strided((length, self.columns), (self.pitch, 1))

    def whole(self) -> Tensor:
        """All stored rows, in memory of their own."""
        return self.read(0, self.rows, torch.empty(self.bytes(self.rows), dtype=torch.uint8))


@dataclass(frozen=True, slots=True)
class Folder:
    """The tensors of a folder by their names in its files, and the file where its index expects each."""

    entries: dict[str, Entry]
    expected: dict[str, Path]


def read_folder(folder: Path) -> Folder:
    """The headers of all safetensors files of a folder. Raises `ModelError` naming the file that is no good."""
    expected = _index(folder)
    paths = sorted(set(expected.values())) or sorted(folder.glob("*.safetensors"))
    if not paths:
        raise ModelError(f"{folder} holds no *.safetensors; only that format is read (or use --load-format dummy)")
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise ModelError(f"{folder}: {INDEX} names {len(missing)} missing files: {', '.join(missing[:5])}")
    return Folder({name: entry for path in paths for name, entry in _header(path)}, expected)


def _index(folder: Path) -> dict[str, Path]:
    """The file of each tensor as the index says; nothing where a folder has none."""
    path = folder / INDEX
    if not path.is_file():
        return {}
    try:
        return {str(name): folder / str(file) for name, file in json.loads(path.read_text())["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is no index of safetensors files ({error}); fetch it again") from error


def _header(path: Path) -> Iterator[tuple[str, Entry]]:
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= size - 8:
                raise ValueError(f"its header of {length} bytes does not fit into {size} bytes")
            header: dict[str, dict[str, Any]] = json.loads(file.read(length))
        for name, about in header.items():
            if name != "__metadata__":
                yield name, _entry(path, name, about, 8 + length, size)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{path} cannot be read as safetensors: {error}; if it was cut short, fetch it again"
        ) from error


def _entry(path: Path, name: str, about: dict[str, Any], base: int, size: int) -> Entry:
    shape, (start, end) = tuple(about["shape"]), about["data_offsets"]
    dtype = DTYPES.get(about["dtype"])
    if dtype is None:
        raise ValueError(f"tensor '{name}' is {about['dtype']}; this build reads: {', '.join(DTYPES)}")
    if end - start != prod(shape) * dtype.itemsize or base + end > size:
        raise ValueError(f"tensor '{name}' {shape} is given bytes {start} to {end} of {size - base}")
    rows, columns = (shape[0] if shape else 1), prod(shape[1:])
    return Entry(path, dtype, shape, base + start, rows, columns, columns)
