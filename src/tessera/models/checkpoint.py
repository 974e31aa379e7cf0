"""A checkpoint folder as a `Source`: canonical names, experts one by one, fp8 blocks dequantised."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tessera.core.errors import ModelError
from tessera.core.quantization import canonical
from tessera.models.cache_scales import OF_CACHE
from tessera.models.safetensors import Entry, read_folder
from tessera.models.source import Span, blocks

SCALE = "_scale_inv"
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
FUSED = {"gate": ("gate_up_proj", 0), "up": ("gate_up_proj", 1), "down": ("down_proj", 0)}


class _Reading(threading.local):
    """What a thread reads into: ranks that are threads load from one checkpoint at once."""

    def __init__(self) -> None:
        self.buffer = torch.empty(0, dtype=torch.uint8)


class Checkpoint:
    """The tensors of a folder under the names of `core/weights.py`.

    `block`: rows and columns of a block of fp8 weights that share a scale. Raises `ModelError` when the folder holds no
    safetensors or a file is broken.
    """

    waits = True

    def __init__(self, folder: Path, block: tuple[int, int] | None = None) -> None:
        self.folder, self.block = folder, block
        found = read_folder(folder)
        self._entries = {canonical(name): entry for name, entry in found.entries.items()}
        self._expected = {canonical(name): path for name, path in found.expected.items()}
        self._found = set(self._entries)
        self._scales: dict[str, Tensor] = {}
        self._parts: dict[str, str] = {}  # an expert's tensor -> the fused tensor that it is a part of
        self._reading = _Reading()
        self._split_experts()

    def shape(self, name: str) -> tuple[int, ...] | None:
        """See `Source.shape`."""
        entry = self._entries.get(name)
        return None if entry is None else entry.shape

    def where(self, name: str) -> str:
        """See `Source.where`: the file that holds the tensor, or should."""
        entry = self._entries.get(name)
        return str(entry.path if entry is not None else self._expected.get(name, self.folder))

    def copy(self, name: str, rows: Span, columns: Span, out: Tensor) -> None:
        """See `Source.copy`. fp8 weights are multiplied by the scales of their global blocks, at any cut."""
        entry = self._entries[name]
        if entry.transposed:
            rows, columns, out = columns, rows, out.T
        for start, box, part in self._boxes(entry, rows, columns, out):
            part.copy_(self._plain(name, entry, box, start, columns[0]))

    def fp8(self, name: str, rows: Span, columns: Span, out: Tensor) -> Tensor:
        """See `Source.fp8`. Raises `ModelError` when the tensor is not stored so."""
        entry = self._entries[name]
        if entry.dtype != torch.float8_e4m3fn:
            raise ModelError(
                f"{entry.path}: tensor '{name}' is {entry.dtype}, where config.json says that it is fp8; name its "
                "module in modules_to_not_convert, or use --fp8-gemm-backend dequantize"
            )
        scales, (height, width) = self._scale(name, entry), self._block(name, entry)
        if entry.transposed:
            if height != width:
                raise ModelError(
                    f"{entry.path}: '{name}' is transposed in blocks of {height}x{width}; only square ones are read "
                    "so: use --fp8-gemm-backend dequantize"
                )
            rows, columns, out = columns, rows, out.T
        for _, box, part in self._boxes(entry, rows, columns, out):
            part.copy_(box)
        touched = scales[_touched(rows, height)][:, _touched(columns, width)]
        return touched.T if entry.transposed else touched

    def _boxes(self, entry: Entry, rows: Span, columns: Span, out: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """A stored box, some rows at a time: the first of them, what is stored, and where in `out` it goes.

        In the one buffer of this thread, so the next rows overwrite them: buffers that come and go would leave the
        allocator holding more than a model is. It is pinned where a device copies from it.
        """
        done = 0
        for start, length in blocks(rows, entry.pitch * entry.dtype.itemsize):
            if (size := entry.bytes(length)) > len(self._reading.buffer):
                self._reading.buffer = torch.empty(size, dtype=torch.uint8, pin_memory=out.is_cuda)
            box = entry.read(start, length, self._reading.buffer)
            yield start, box.narrow(1, *columns), out[done : done + length]
            done += length

    def leftovers(self, used: Iterable[str]) -> list[str]:
        """See `Source.leftovers`."""
        known = set(used)
        known |= {self._parts[name] for name in known if name in self._parts}
        return sorted(name for name in self._found if name.removesuffix(SCALE) not in known)

    def refuse_cache_scales(self, unserved: Callable[[str], bool]) -> None:
        """Raises `ModelError` where keys or values are to be scaled before they are rounded to fp8 pages.

        `unserved`: whether a tensor belongs to a layer that has no pages.
        """
        for name, entry in self._entries.items():
            if OF_CACHE.search(name) and not unserved(name):
                found = entry.whole().float()
                if (found != 1).any():
                    raise ModelError(
                        f"{entry.path}: '{name}' is {found.flatten()[0].item():g}; fp8 pages hold keys and values as "
                        "they are, scaled by 1: serve this checkpoint with --kv-cache-dtype auto"
                    )

    def _plain(self, name: str, entry: Entry, box: Tensor, row: int, column: int) -> Tensor:
        """What a stored box stands for; its first element is stored at (row, column)."""
        if entry.dtype in FLOATS:
            return box
        if entry.dtype != torch.float8_e4m3fn:
            raise ModelError(
                f"{entry.path}: tensor '{name}' is {entry.dtype}; weights are floats, or fp8 e4m3 in blocks"
            )
        scales, (height, width) = self._scale(name, entry), self._block(name, entry)
        rows = torch.arange(row, row + box.shape[0]) // height
        columns = torch.arange(column, column + box.shape[1]) // width
        return box.float() * scales[rows][:, columns]

    def _block(self, name: str, entry: Entry) -> tuple[int, int]:
        if self.block is None:
            raise ModelError(
                f"{entry.path}: tensor '{name}' is fp8, but config.json has no quantization_config with its block size"
            )
        return self.block

    def _scale(self, name: str, entry: Entry) -> Tensor:
        """The scales of a weight [row blocks, column blocks], as stored; read once."""
        if name not in self._scales:
            found, block = self._entries.get(name + SCALE), self._block(name, entry)
            expected = tuple(-(-n // b) for n, b in zip((entry.rows, entry.columns), block, strict=True))
            if found is None or (found.rows, found.columns) != expected:
                shape = "nothing" if found is None else (found.rows, found.columns)
                where = self.where(name + SCALE)
                raise ModelError(
                    f"{where}: scales '{name}{SCALE}' of an fp8 weight: found {shape}, expected {expected}"
                )
            self._scales[name] = found.whole().float()
        return self._scales[name]

    def _split_experts(self) -> None:
        """Adds a name per expert for the fused `experts.gate_up_proj` and `experts.down_proj`, and for their scales.

        Both orientations exist: [E, 2I, H] with [E, H, I], and their transposes. The second of the pair tells them
        apart: gate_up shares H with down, and I is half of the other.
        """
        for name in [n for n in self._entries if n.endswith(".experts.gate_up_proj")]:
            base = name.removesuffix("gate_up_proj")
            fused, down = self._entries[name], self._entries.get(f"{base}down_proj")
            if down is None or len(fused.shape) != 3 or len(down.shape) != 3:
                raise ModelError(f"{fused.path}: '{name}' {fused.shape} needs '{base}down_proj', both of three dims")
            transposed = fused.shape[1:] != (2 * down.shape[2], down.shape[1])
            if transposed and fused.shape[1:] != (down.shape[2], 2 * down.shape[1]):
                raise ModelError(
                    f"{fused.path}: '{name}' {fused.shape} does not go with '{base}down_proj' {down.shape}"
                )
            for part, (tensor, half) in FUSED.items():
                self._split(base, part, base + tensor, half, transposed)

    def _split(self, base: str, part: str, tensor: str, half: int, transposed: bool) -> None:
        halved, dim = part != "down", 2 if transposed else 1
        fused, scales = self._entries[tensor], self._entries.get(tensor + SCALE)
        if scales is not None and halved and (self.block is None or fused.shape[dim] // 2 % self.block[dim - 1]):
            raise ModelError(
                f"{fused.path}: in '{tensor}' {fused.shape} gate and up meet inside a block of {self.block}"
            )
        for entry, suffix in ((fused, ""), *([(scales, SCALE)] if scales is not None else [])):
            for e in range(entry.shape[0]):
                expert = f"{base}{e}.{part}_proj.weight{suffix}"
                self._entries[expert] = _expert(entry, e, half, halved, transposed)
                self._parts[expert] = tensor + suffix


def _touched(span: Span, size: int) -> slice:
    """The blocks of `size` that a span touches."""
    start, length = span
    return slice(start // size, -(-(start + length) // size))


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
