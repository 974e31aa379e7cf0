"""What travels to the experts arrives as it was sent, whatever the widths and however few the rows."""

from __future__ import annotations

import pytest
import torch

from tessera.comm.dispatch import _pack, _unpack


@pytest.mark.parametrize("rows", [0, 1, 2, 5])
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_rows_that_are_packed_come_out_as_they_were(rows: int, k: int, dtype: torch.dtype) -> None:
    columns = torch.randn(rows, 5, dtype=dtype), torch.randint(0, 9, (rows, k)), torch.randn(rows, k)
    packed = _pack(*columns)
    assert packed.shape[0] == rows
    for sent, found in zip(columns, _unpack(packed, *columns), strict=True):
        assert found.dtype == sent.dtype
        assert torch.equal(found, sent)
