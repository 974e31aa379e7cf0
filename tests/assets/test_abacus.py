"""The packaged models: other programs load them, sixteen ranks can hold them, they answer, and damage shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from assets.abacus import MODELS, Fault, model, prefilled, prompt, questions, served
from models.harness import make_rank
from tessera.core.mesh import Mesh
from tessera.core.weights import weight_table
from tessera.evals.tasks import TASKS
from tessera.models.folder import find_model, packaged_models
from tiny import resolved

HYBRID, MLA = MODELS
NUM_ASKED = 24
COST = 0.2  # of the right answers: what each kind of damage must cost, at the least
DELTA_HEAD = 64  # channels of a head of the delta rule


def test_the_package_holds_them() -> None:
    assert packaged_models() == sorted(MODELS)
    for name in MODELS:
        files = {path.name: path.stat().st_size for path in find_model(name).iterdir()}
        assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} < files.keys()
        assert 4e6 < files["model.safetensors"] < 12e6


@pytest.mark.parametrize("name", MODELS)
def test_transformers_computes_the_same(name: str) -> None:
    folder = find_model(name)
    theirs, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert all(key.startswith("mtp.") for key in info["unexpected_keys"])
    asked = questions("recall", 1)[0]
    tokens = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [{"role": "user", "content": asked.prompt}], add_generation_prompt=True, return_dict=False
    )
    assert tokens == prompt(name, asked)
    rank = make_rank(model(name).spec, model(name).source, length=len(tokens))
    with torch.no_grad():
        expected = theirs(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(rank.run([(0, tokens)]), expected, rtol=1e-5, atol=5e-4)  # logits of up to 35


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "flags",
    [
        {"tp_size": 4},
        {"tp_size": 16, "dp_size": 4, "enable_dp_attention": True},
        {"tp_size": 16, "dp_size": 4, "enable_dp_attention": True, "ep_size": 16, "enable_dp_lm_head": True},
    ],
    ids=lambda flags: " ".join(f"{k}={v}" for k, v in flags.items()),
)
def test_the_sizes_can_be_cut_without_padding(name: str, flags: dict[str, int]) -> None:
    spec = model(name).spec
    mesh: Mesh = resolved(spec, **flags).config.mesh.mesh
    assert mesh.size == flags["tp_size"]
    for tensor in weight_table(spec, mesh, mtp=True):
        shapes = {tensor.layout.local_shape(mesh, rank) for rank in range(mesh.size)}
        assert len(shapes) == 1, f"{tensor.name}: some ranks hold more than others"


def test_the_sizes_are_those_that_kernels_take() -> None:
    hybrid, mla = (json.loads((find_model(name) / "config.json").read_text()) for name in MODELS)
    assert (hybrid["head_dim"], hybrid["num_key_value_heads"]) == (64, 2)
    assert {hybrid["linear_key_head_dim"], hybrid["linear_value_head_dim"]} <= {64, 128}
    assert hybrid["mtp_num_hidden_layers"] == 1
    assert (mla["kv_lora_rank"], mla["qk_rope_head_dim"]) == (512, 64)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", MODELS)
def test_an_engine_answers_held_out_questions(name: str, task: str) -> None:
    assert served(name, task, NUM_ASKED) >= 0.9


def zero_states(caches: dict[str, Tensor]) -> None:
    """The delta rule's memory of the prompt is lost."""
    for name, pool in caches.items():
        if name.endswith(".state"):
            pool.zero_()


def shift_channels(caches: dict[str, Tensor]) -> None:
    """Conv windows read one head too far."""
    for name, pool in caches.items():
        if name.endswith(".conv"):
            pool.copy_(pool.roll(DELTA_HEAD, 1))


def swap_heads(caches: dict[str, Tensor]) -> None:
    """The two KV heads change places."""
    for name, pool in caches.items():
        if name.endswith(".kv"):
            pool.copy_(pool.flip(2))


def halves_of_latent(caches: dict[str, Tensor]) -> None:
    """The two halves of every latent change places."""
    for name, pool in caches.items():
        if name.endswith(".latent"):
            pool[..., :512] = pool[..., :512].roll(256, -1)


def rope_order(caches: dict[str, Tensor]) -> None:
    """The roped part as pairs side by side, read as two halves."""
    for name, pool in caches.items():
        if name.endswith(".latent"):
            pool[..., 512:] = pool[..., 512:].unflatten(-1, (32, 2)).mT.flatten(-2)


FAULTS = [
    (HYBRID, "recall", zero_states),
    (HYBRID, "gpqa", zero_states),
    (HYBRID, "recall", shift_channels),
    (HYBRID, "gpqa", shift_channels),
    (HYBRID, "recall", swap_heads),
    *((MLA, task, damage) for task in TASKS for damage in (halves_of_latent, rope_order)),
]


@pytest.mark.parametrize(("name", "task", "fault"), FAULTS, ids=lambda value: getattr(value, "__name__", value))
def test_damage_after_the_prefill_costs_answers(name: str, task: str, fault: Fault) -> None:
    prompts = prefilled(name, task, NUM_ASKED)
    assert prompts.accuracy() >= 0.9
    assert prompts.accuracy(fault) <= prompts.accuracy() - COST


def test_every_kind_of_cache_has_its_damage() -> None:
    touched: dict[str, set[str]] = {name: set() for name in MODELS}
    for name, task, fault in FAULTS:
        caches = prefilled(name, task, NUM_ASKED).rank.caches
        before = {key: pool.clone() for key, pool in caches.items()}
        fault(caches)
        touched[name] |= {key for key, pool in caches.items() if not torch.equal(pool, before[key])}
        for key, pool in before.items():
            caches[key].copy_(pool)
    for name in MODELS:
        assert touched[name] == prefilled(name, "recall", NUM_ASKED).rank.caches.keys()


def test_the_chat_template_is_in_both() -> None:
    for name in MODELS:
        settings = json.loads(Path(find_model(name), "tokenizer_config.json").read_text())
        assert "<|im_start|>" in settings["chat_template"]
        assert model(name).spec.eos == tuple(
            json.loads((find_model(name) / "generation_config.json").read_text())["eos_token_id"]
        )
