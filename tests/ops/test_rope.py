"""Rotary embeddings: frequencies against transformers for every scaling, rotations against complex numbers."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tessera.core.fields import Fields, read_rope
from tessera.core.spec import RopeSpec
from tessera.ops.rope import RopeTables, rope_tables, rotate

SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    "yarn_betas": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 16,
        "beta_slow": 2,
    },
    "yarn_mscale": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "mscale": 0.707,
        "mscale_all_dim": 1.2,
    },
    "yarn_factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "attention_factor": 1.5,
    },
    "yarn_whole": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "truncate": False},
}


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("theta", [1e4, 1e6])
def test_scalings_are_those_of_transformers(theta: float, name: str) -> None:
    scaling = SCALINGS[name]
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=1, max_position_embeddings=1024,
        rope_parameters={"rope_theta": theta, **scaling},
    )  # fmt: skip
    frequencies, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, "cpu")
    rope, _ = read_rope(Fields({"rope_parameters": {"rope_theta": theta, **scaling}}), 64)
    tables = rope_tables(rope, 300, torch.float64)
    angles = torch.arange(300)[:, None] * frequencies.double()
    torch.testing.assert_close(tables.cos, angles.cos() * factor, atol=1e-4, rtol=0)
    torch.testing.assert_close(tables.sin, angles.sin() * factor, atol=1e-4, rtol=0)


def test_without_a_scaling() -> None:
    tables = rope_tables(RopeSpec(8, 1e4), 50, torch.float64)
    angles = torch.tensor([[p * 1e4 ** (-2 * i / 8) for i in range(4)] for p in range(50)], dtype=torch.float64)
    torch.testing.assert_close(tables.cos, angles.cos())
    torch.testing.assert_close(tables.sin, angles.sin())
    assert tables.dim == 8
    assert rope_tables(RopeSpec(8, 1e4), 5, torch.bfloat16).cos.dtype == torch.float32


def _complex(x: torch.Tensor, positions: torch.Tensor, theta: float, interleaved: bool) -> torch.Tensor:
    """Multiplies pairs, as complex numbers, by exp(i * angle)."""
    half = x.shape[-1] // 2
    pairs = x.unflatten(-1, (half, 2)) if interleaved else x.unflatten(-1, (2, half)).mT
    angle = positions[:, None, None] * theta ** (-torch.arange(half, dtype=x.dtype) / half)
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angle), angle))
    return turned.flatten(-2) if interleaved else turned.mT.flatten(-2)


def _at(x: torch.Tensor, positions: torch.Tensor, tables: RopeTables, interleaved: bool = False) -> torch.Tensor:
    return rotate(x, *(table[positions][:, None] for table in (tables.cos, tables.sin)), interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_is_a_complex_product(interleaved: bool) -> None:
    x, positions = torch.randn(7, 3, 16, dtype=torch.float64), torch.tensor([0, 1, 5, 5, 99, 2, 30])
    tables = rope_tables(RopeSpec(16, 1e4), 100, torch.float64)
    expected = _complex(x, positions.double(), 1e4, interleaved)
    torch.testing.assert_close(_at(x, positions, tables, interleaved), expected)


@pytest.mark.parametrize("interleaved", [False, True])
def test_only_the_rotated_dims_change(interleaved: bool) -> None:
    x, positions = torch.randn(5, 2, 16), torch.arange(5)
    tables = rope_tables(RopeSpec(8, 1e4), 5)
    found = _at(x, positions, tables, interleaved)
    torch.testing.assert_close(found[..., :8], _at(x[..., :8], positions, tables, interleaved))
    assert torch.equal(found[..., 8:], x[..., 8:])


def test_rounded_once() -> None:
    x, tables = torch.randn(9, 2, 16).bfloat16(), rope_tables(RopeSpec(16, 1e4), 9)
    found = _at(x, torch.arange(9), tables)
    assert torch.equal(found, _at(x.float(), torch.arange(9), tables).bfloat16())


def test_angles_depend_on_distance_alone() -> None:
    tables = rope_tables(RopeSpec(16, 1e4), 200, torch.float64)
    q, k = torch.randn(2, 1, 1, 16, dtype=torch.float64)

    def score(at: int, other: int) -> float:
        turned = [rotate(x, *(t[p : p + 1, None] for t in (tables.cos, tables.sin))) for x, p in ((q, at), (k, other))]
        return float((turned[0] * turned[1]).sum())

    assert score(150, 143) == pytest.approx(score(7, 0))
    assert isinstance(tables, RopeTables)
