"""Promise: the logits are those of transformers, for every family, however a sequence is cut into ranges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from models.configs import CASES
from models.harness import make_rank
from models.oracle import logits, make_model, save
from tessera.core.mesh import SINGLE
from tessera.core.weights import weight_table
from tessera.models.folder import open_source, read_model

PROMPT, DECODED = 70, 4
TOLERANCE = 1e-4


@pytest.mark.parametrize(("name", "model_type", "fields"), CASES, ids=[name for name, *_ in CASES])
def test_logits_equal_those_of_transformers(name: str, model_type: str, fields: dict[str, Any], tmp_path: Path) -> None:
    model = make_model(model_type, fields)
    tokens = torch.randint(0, fields["vocab_size"], (PROMPT + DECODED,)).tolist()
    expected = logits(model, tokens)
    assert expected.std() > 0.3, "a model whose logits are all alike would prove nothing"
    folder = save(model, tmp_path)
    spec = read_model(folder)
    source = open_source(folder, spec, weight_table(spec, SINGLE))
    rank = make_rank(spec, source, sequences=4)
    for sequence, size in enumerate((PROMPT, 1, 3, 64)):
        prefill = rank.chunks(sequence, tokens[:PROMPT], size)
        decode = rank.chunks(sequence, tokens[PROMPT:], 1)
        worst = (torch.cat([prefill, decode]) - expected).abs().max()
        assert worst < TOLERANCE, f"{name}, ranges of {size}: {worst}"
