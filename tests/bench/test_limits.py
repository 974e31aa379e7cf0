"""Promise: what a benchmark measures the card with does not count as taken when an engine measures what is free."""

from __future__ import annotations

import pytest
import torch
from tests.bench.scripts import script

limits = script("limits")

pytestmark = pytest.mark.gpu


def test_measuring_the_card_leaves_its_memory_as_it_was() -> None:
    torch.ones(8, 8, device="cuda") @ torch.ones(8, 8, device="cuda")  # the handles of the products stay
    torch.cuda.empty_cache()
    before, _ = torch.cuda.mem_get_info()
    card = limits.measure_card()
    after, _ = torch.cuda.mem_get_info()
    assert before - after < limits.COPIED / 8
    assert card.bytes_per_s > 0
    assert card.flops_per_s > 0
