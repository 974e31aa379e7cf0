"""No silent change: whatever a configuration holds is read by somebody, and kernels are those that were named."""

from __future__ import annotations

import itertools
import re
from dataclasses import fields
from typing import get_type_hints

import pytest

from core.test_config import DENSE, HYBRID, config_of, decided, resolved, spec_of
from house.source import PACKAGE
from tessera.core.config import Config
from tessera.ops.backend import BACKENDS, chosen

COMPARES = PACKAGE / "run" / "hosts.py"  # names fields and uses none
READERS = [p for p in sorted(PACKAGE.rglob("*.py")) if "config" not in p.relative_to(PACKAGE).parts and p != COMPARES]
SOURCE = "\n".join(p.read_text() for p in READERS)
FIELDS = [f"{group}.{f.name}" for group, kind in get_type_hints(Config).items() for f in fields(kind)]

# What nobody reads, and why that is no flag passed over.
EXCUSED = {
    "model.revision": "the model has been found before",
    "model.download_dir": "the model has been found before",
    "mesh.ep": "part of mesh.mesh",
    "mesh.dense_tp": "part of mesh.mesh",
    "mesh.dp_lm_head": "part of mesh.mesh",
    "mesh.all_to_all": "part of mesh.mesh",
    "memory.page_bytes": "part of memory.kv_bytes",
    "memory.slot_bytes": "part of memory.state_bytes",
    "memory.conv_dtype": "part of memory.dtypes",
    "memory.state_dtype": "part of memory.dtypes",
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_is_read_or_excused(field: str) -> None:
    read = re.search(rf"\b{field}\b", SOURCE) is not None
    assert read != (field in EXCUSED), "read it, or excuse it" if not read else "delete its excuse"


def test_excuses_are_about_fields() -> None:
    assert EXCUSED.keys() <= set(FIELDS)


def test_every_choice_of_kernels_is_what_runs() -> None:
    flags = ("attention_backend", "linear_attn_backend", "moe_runner_backend", "sampling_backend")
    for names in itertools.product(BACKENDS, repeat=4):
        backend = chosen(config_of(spec_of(HYBRID), **dict(zip(flags, names, strict=True))).kernels)
        attention, delta, moe, sampling = (BACKENDS[name] for name in names)
        assert (backend.paged_attention, backend.mla_absorbed, backend.pack) == (
            attention.paged_attention,
            attention.mla_absorbed,
            attention.pack,
        )
        assert (backend.delta_net, backend.draw) == (delta.delta_net, sampling.draw)
        assert (backend.route, backend.experts) == (moe.route, moe.experts)


def test_kernels_that_nobody_chose_follow_the_attention_and_are_told() -> None:
    result = resolved(spec_of(HYBRID), attention_backend="reference", moe_runner_backend="torch")
    kernels = result.config.kernels
    assert (kernels.attention, kernels.delta, kernels.moe, kernels.sampling) == (
        "reference",
        "reference",
        "torch",
        "reference",
    )
    assert decided(result, "linear-attn-backend").value == "reference"
    assert not [d for d in result.decisions if d.what == "moe-runner-backend"]
    assert not [d for d in resolved().decisions if d.what in ("linear-attn-backend", "moe-runner-backend")]
    assert config_of(sampling_backend="pytorch", attention_backend="torch_native").kernels.sampling == "torch"


@pytest.mark.parametrize(
    ("model", "flags", "why"),
    [
        (DENSE, {"linear_attn_backend": "reference"}, "the model has no recurrent state"),
        (DENSE, {"mamba_ssm_dtype": "bfloat16"}, "the model has no recurrent state"),
        (DENSE, {"max_mamba_cache_size": 2}, "the model has no recurrent state"),
        (DENSE, {"moe_runner_backend": "reference"}, "the model has no experts"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) and len(value) == 1 else "",
)
def test_what_the_model_has_nothing_for_is_told_and_changes_nothing(
    model: dict[str, object], flags: dict[str, object], why: str
) -> None:
    (name,) = flags
    told = decided(resolved(spec_of(model), **flags), f"--{name.replace('_', '-')}")
    assert (told.value, told.why) == ("ignored", why)
    assert config_of(spec_of(model), **flags) == config_of(spec_of(model))
    assert not [d for d in resolved(spec_of(HYBRID), **flags).decisions if d.value == "ignored"]
