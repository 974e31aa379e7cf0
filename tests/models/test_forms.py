"""Which form of latent attention a step takes."""

from __future__ import annotations

import numpy as np
import pytest

from ops.cases import for_a_graph
from tessera.models.forms import ABSORB_RECORDED, ABSORB_UP_TO, choose_forms
from tessera.ops.segments import make_segments


def _segments(lengths):
    tables = np.ones((len(lengths), -(-max(lengths) // 16)), np.int32)
    return make_segments(np.zeros(len(lengths)), np.array(lengths), tables, np.zeros(len(lengths)), 16)


@pytest.mark.parametrize(
    ("lengths", "runs"),
    [
        ([1, 1, 1], ((0, 3, "absorbed"),)),
        ([ABSORB_UP_TO + 1, 100], ((0, 2, "expanded"),)),
        ([100, ABSORB_UP_TO, 1], ((0, 1, "expanded"), (1, 3, "absorbed"))),
    ],
)
def test_known_lengths_are_cut_where_long_ranges_end(lengths, runs):
    assert choose_forms(_segments(lengths)).mla == runs


@pytest.mark.parametrize(("longest", "form"), [(ABSORB_RECORDED, "absorbed"), (ABSORB_RECORDED + 1, "expanded")])
def test_what_is_recorded_takes_one_form(longest, form):
    """The one of fewer launches, until expanding costs less than attending its own tokens in latent space."""
    recorded = for_a_graph(_segments([50, 1, 1]), pages=9, longest=longest)
    assert choose_forms(recorded).mla == ((0, recorded.num_segments, form),)
