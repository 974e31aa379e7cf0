"""Promise: a checkpoint loads exactly, in every form that it comes in, or is refused by file and tensor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from models.files import INDEX, State, assert_same, fused, made, quantised, tiles, unpacked, write
from tessera.core.errors import ModelError
from tessera.core.mesh import SINGLE, instance_mesh
from tessera.core.weights import weight_table
from tessera.models import load
from tessera.models.folder import open_source, read_model
from tessera.models.load import load_weights, stored_shapes

MOE, V3, HYBRID = "qwen3_moe-normalised", "deepseek_v3-yarn", "qwen3_5_moe_text-usual"


@pytest.mark.parametrize("case", [MOE, V3])
@pytest.mark.parametrize("together", [False, True], ids=["each-expert", "fused"])
def test_fp8_blocks_are_dequantised_at_any_cut(case: str, together: bool, tmp_path: Path) -> None:
    # Blocks that divide nothing: tiles of every rank begin inside one, and the last of a row and column are cut off.
    # gate | up of a fused tensor must meet at a block's border.
    block = (8, 24) if together else (7, 25)
    state, config = made(case, tmp_path / "whole")
    fp8, plain = quantised(state, block)
    assert any(t.dtype == torch.float8_e4m3fn for t in fp8.values())
    about = {"quant_method": "fp8", "weight_block_size": list(block), "activation_scheme": "dynamic"}
    write(tmp_path / "fp8", fused(fp8) if together else fp8, {**config, "quantization_config": about})
    write(tmp_path / "plain", plain, config)
    assert_same(tiles(tmp_path / "fp8"), tiles(tmp_path / "plain"))
    mesh = instance_mesh(tp=4, ep=2)
    for rank in range(mesh.size):
        assert_same(tiles(tmp_path / "fp8", mesh, rank), tiles(tmp_path / "plain", mesh, rank))


def test_a_gate_that_meets_up_inside_a_block_is_refused(tmp_path: Path) -> None:
    state, config = made(MOE, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    about = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    write(tmp_path, fused(quantised(state, (16, 16))[0]), {**config, "quantization_config": about})
    with pytest.raises(ModelError, match="inside a block"):
        tiles(tmp_path)


@pytest.mark.parametrize("transposed", [False, True])
def test_fused_experts_are_the_same_experts(transposed: bool, tmp_path: Path) -> None:
    state, config = made(MOE, tmp_path / "each")
    write(tmp_path / "fused", fused(state, transposed), config)
    mesh = instance_mesh(tp=4, ep=2)
    for rank in range(mesh.size):
        assert_same(tiles(tmp_path / "fused", mesh, rank), tiles(tmp_path / "each", mesh, rank))


def test_the_text_part_of_a_larger_model_loads(tmp_path: Path) -> None:
    state, config = made(HYBRID, tmp_path / "text")
    larger = {
        name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name: tensor
        for name, tensor in fused(state).items()
    }
    larger["model.visual.blocks.0.norm1.weight"] = torch.ones(4)
    outer = {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "model_type": "qwen3_5_moe",
        "text_config": config,
        "vision_config": {"depth": 1},
        "tie_word_embeddings": False,
    }
    write(tmp_path / "larger", larger, outer)
    assert_same(tiles(tmp_path / "larger"), tiles(tmp_path / "text"))


def _mtp_of(config: dict[str, Any], state: State) -> State:
    """The draft layer that a checkpoint would keep, made of copies of its own layers."""
    hidden, count = config["hidden_size"], config["num_hidden_layers"]
    if config["model_type"] == "deepseek_v3":
        new, names = f"model.layers.{count}.", ("enorm", "hnorm", "eh_proj", "shared_head.norm")
        source = {f"{new}{n}": t for n, t in _layer(state, count - 1).items()}
        source[f"{new}embed_tokens.weight"] = state["model.embed_tokens.weight"].clone()
        source[f"{new}shared_head.head.weight"] = state["lm_head.weight"].clone()
    else:
        new, names = "mtp.", ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm")
        source = {f"mtp.layers.0.{n}": t for n, t in _layer(state, count - 1).items()}
    for name in names:
        joins = name in ("eh_proj", "fc")
        source[f"{new}{name}.weight"] = torch.randn(hidden, 2 * hidden) if joins else torch.randn(hidden)
    return source


def _layer(state: State, i: int) -> State:
    prefix = f"model.layers.{i}."
    return {name.removeprefix(prefix): tensor.clone() for name, tensor in state.items() if name.startswith(prefix)}


@pytest.mark.parametrize(
    ("case", "field"),
    [
        (V3, "num_nextn_predict_layers"),
        (HYBRID, "mtp_num_hidden_layers"),
        ("qwen3_5_text-usual", "mtp_num_hidden_layers"),
        ("qwen3_next-usual", "num_nextn_predict_layers"),
    ],
)
def test_draft_layers_are_known_and_load_when_asked_for(case: str, field: str, tmp_path: Path) -> None:
    state, config = made(case, tmp_path / "plain")
    drafts = _mtp_of(config, state)
    write(tmp_path / "drafts", state | drafts, {**config, field: 1})
    assert_same(tiles(tmp_path / "drafts"), tiles(tmp_path / "plain"))
    loaded = tiles(tmp_path / "drafts", mtp=True)
    new = loaded.keys() - tiles(tmp_path / "plain").keys()
    assert {"mtp.0.join", "mtp.0.embedding_norm", "mtp.0.norm", "mtp.0.mlp_norm"} <= new
    (join,) = [t for n, t in drafts.items() if n.endswith(("fc.weight", "eh_proj.weight"))]
    assert torch.equal(loaded["mtp.0.join"], join)
    # Each of them is wanted: without it the folder is refused by its name.
    for name in [n for n in drafts if not n.endswith(("embed_tokens.weight", "shared_head.head.weight"))][::5]:
        write(tmp_path / "less", state | {n: t for n, t in drafts.items() if n != name}, {**config, field: 1})
        with pytest.raises(ModelError, match=name.replace(".", r"\.")):
            tiles(tmp_path / "less", mtp=True)


def test_a_tied_head_that_was_saved_all_the_same_is_passed_over(tmp_path: Path) -> None:
    state, config = made("qwen3-tied-yarn", tmp_path / "tied")
    write(tmp_path / "saved", {**state, "lm_head.weight": state["model.embed_tokens.weight"].clone()}, config)
    assert_same(tiles(tmp_path / "saved"), tiles(tmp_path / "tied"))


def _drop(name: str) -> Callable[[State], None]:
    return lambda state: state.__delitem__(name)


def _put(name: str, tensor: torch.Tensor) -> Callable[[State], None]:
    return lambda state: state.__setitem__(name, tensor)


UP, BIAS = "model.layers.1.mlp.experts.2.up_proj.weight", "model.layers.0.self_attn.q_proj.bias"


@pytest.mark.parametrize(
    ("change", "name", "why"),
    [
        (_drop(UP), UP, "found nothing, expected (24, 64)"),
        (_put(UP, torch.ones(24, 63)), UP, "found (24, 63), expected (24, 64)"),
        (_put(BIAS, torch.ones(64)), BIAS, "nothing here uses it"),
        (_put(UP, torch.ones(24, 64, dtype=torch.int8)), UP, "weights are floats"),
        (_put(UP, torch.ones(24, 64).to(torch.float8_e4m3fn)), UP, "no quantization_config"),
    ],
    ids=["missing", "misshapen", "unexpected", "integers", "fp8-unannounced"],
)
def test_a_tensor_that_does_not_fit_is_refused_by_file_and_name(
    change: Callable[[State], None], name: str, why: str, tmp_path: Path
) -> None:
    state, config = made(MOE, tmp_path / "good")
    before = write(tmp_path / "bad", state, config)
    change(state)
    files = write(tmp_path / "bad", state, config)
    if name not in files:  # the index still says where it should be
        index = json.loads((tmp_path / "bad" / INDEX).read_text())
        index["weight_map"][name] = files[name] = before[name]
        (tmp_path / "bad" / INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelError) as caught:
        tiles(tmp_path / "bad")
    for part in (name, files[name], why):
        assert part in str(caught.value)


def test_scales_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    state, config = made(MOE, tmp_path / "good")
    fp8, _ = quantised(state, (7, 25))
    about = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [7, 24]}}
    write(tmp_path / "wider", fp8 | {f"{UP}_scale_inv": torch.ones(4, 2)}, {**config, **about})
    with pytest.raises(ModelError, match=r"scale_inv.*found \(\d, \d\), expected"):
        tiles(tmp_path / "wider")
    write(tmp_path / "none", {n: t for n, t in fp8.items() if n != f"{UP}_scale_inv"}, {**config, **about})
    with pytest.raises(ModelError, match="found nothing, expected"):
        tiles(tmp_path / "none")


SCALES = """
k_scale v_scale kv_scale attn.k_scale attn.v_scale k_proj.k_scale v_proj.v_scale qkv_proj.k_scale qkv_proj.v_scale
qkqkv_proj.k_scale k_proj.output_scale v_proj.output_scale k_cache.scale v_cache.scale k_proj.kv_cache_scale
v_proj.kv_cache_scale kv_cache_scaling_factor key_scale value_scale attn.key_antiquant_scale
"""


@pytest.mark.parametrize("end", SCALES.split())
def test_scales_of_a_quantised_cache_are_one_or_refused_where_pages_are_fp8(end: str, tmp_path: Path) -> None:
    state, config = made(MOE, tmp_path / "plain")
    name = f"model.layers.1.self_attn.{end}"
    for scale in (1.0, 0.5):
        write(tmp_path / "scaled", {**state, name: torch.tensor(scale)}, config)
        assert_same(tiles(tmp_path / "scaled"), tiles(tmp_path / "plain"))
        if scale == 1:
            assert_same(tiles(tmp_path / "scaled", kv_dtype="float8_e4m3fn"), tiles(tmp_path / "plain"))
    with pytest.raises(ModelError, match=f"{name}' is 0.5; .* --kv-cache-dtype auto"):
        tiles(tmp_path / "scaled", kv_dtype="float8_e5m2")


@pytest.mark.parametrize("layer", ["mtp.layers.0", "model.layers.99", "model.visual.blocks.0"])
def test_scales_of_the_cache_of_layers_that_are_not_served_are_nobodys(layer: str, tmp_path: Path) -> None:
    """Known fault: those of draft layers made a checkpoint refused. Where drafts are served they count."""
    state, config = made(HYBRID, tmp_path / "plain")
    config["mtp_num_hidden_layers"] = 1
    name = f"{layer}.self_attn.k_scale"
    write(tmp_path / "scaled", {**state, **_mtp_of(config, state), name: torch.tensor(0.5)}, config)
    for dtype in ("", "float8_e4m3fn"):
        assert_same(tiles(tmp_path / "scaled", kv_dtype=dtype), tiles(tmp_path / "plain"))
    if layer.startswith("mtp"):
        with pytest.raises(ModelError, match=f"{name}' is 0.5"):
            tiles(tmp_path / "scaled", mtp=True, kv_dtype="float8_e4m3fn")


def test_a_scale_under_a_name_that_is_not_known_is_refused_whatever_pages_are(tmp_path: Path) -> None:
    state, config = made(MOE, tmp_path / "plain")
    for end in ("k_zero_point", "k_scale_of_keys", "scaling_factor", "q_proj.output_scale"):
        name = f"model.layers.1.self_attn.{end}"
        write(tmp_path / "unknown", {**state, name: torch.tensor(1.0)}, config)
        for dtype in ("", "float8_e5m2"):
            with pytest.raises(ModelError, match=f"{name}' .*: nothing here uses it"):
                tiles(tmp_path / "unknown", kv_dtype=dtype)


@pytest.mark.parametrize("block", [None, [128], [128, 0], [1.5, 2], "128"])
def test_a_block_size_that_is_none_is_refused(block: object, tmp_path: Path) -> None:
    _, config = made(MOE, tmp_path)
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": block}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="weight_block_size"):
        read_model(tmp_path)


def _cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 10)


def _cut_in_header(path: Path) -> None:
    os.truncate(path, 100)


def _no_json(path: Path) -> None:
    path.write_bytes((20).to_bytes(8, "little") + b"{" * 20)


def _text(path: Path) -> None:
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1 oid sha256")


def _gone(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("breakage", [_cut_short, _cut_in_header, _no_json, _text, _gone, Path.touch])
def test_a_broken_file_is_refused_by_name(breakage: Callable[[Path], None], tmp_path: Path) -> None:
    state, config = made("llama-gqa", tmp_path / "good")
    files = write(tmp_path / "bad", state, config)
    path = tmp_path / "bad" / files["model.norm.weight"]
    if breakage is Path.touch:
        path.write_bytes(b"")
    breakage(path)
    with pytest.raises(ModelError, match=path.name):
        tiles(tmp_path / "bad")


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', "{}"])
def test_a_broken_index_is_refused_by_name(text: str, tmp_path: Path) -> None:
    write(tmp_path, *made("llama-gqa", tmp_path))
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(ModelError, match=INDEX):
        tiles(tmp_path)


def test_a_folder_without_safetensors_says_what_to_do(tmp_path: Path) -> None:
    made("llama-gqa", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="--load-format dummy"):
        tiles(tmp_path)
    assert tiles(tmp_path, load_format="dummy")["embed"].shape == (99, 64)


def test_every_byte_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, _ = made(HYBRID, tmp_path)
    read = 0

    def counted(*args: Any) -> int:
        nonlocal read
        got = preadv(*args)
        read += got
        return got

    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", counted)
    tiles(tmp_path)
    assert read == sum(t.numel() * t.element_size() for t in state.values())


PEAK = """
import sys
from math import prod
from pathlib import Path
import torch
from tessera.core.mesh import SINGLE
from tessera.core.weights import weight_table
from tessera.models.folder import open_source, read_model
from tessera.models.load import load_weights
def peak():
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) << 10
folder = Path(sys.argv[1])
spec = read_model(folder)
table = weight_table(spec, SINGLE)
Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is held now
before = peak()
tiles = load_weights(open_source(folder, spec, table), table, SINGLE, 0, torch.bfloat16)
print(peak() - before)
"""


def test_a_checkpoint_is_never_held_twice(tmp_path: Path) -> None:
    _, config = made("llama-gqa", tmp_path)
    config |= {"hidden_size": 1024, "intermediate_size": 8192, "num_hidden_layers": 4, "head_dim": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").unlink()
    table = weight_table(read_model(tmp_path), SINGLE)
    state = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in stored_shapes(table).items()}
    sizes = [2 * prod(spec.layout.local_shape(SINGLE, 0)) for spec in table]
    total, largest = sum(sizes), max(sizes)
    save_file(state, tmp_path / "model.safetensors")
    del state
    ran = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.returncode == 0, ran.stderr
    grown = int(ran.stdout)
    # Besides: the buffer that is read into (8 MiB), code that runs for the first time, and where weights are packed
    # (that depends on the processor) one tensor in both forms.
    most = total + largest + (40 << 20)
    assert total * 0.9 < grown < most, f"{grown >> 20} MiB for {total >> 20} MiB of weights"


def test_ranks_that_are_threads_load_from_one_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(MOE, tmp_path)
    mesh = instance_mesh(tp=4, ep=2)
    expected = [tiles(tmp_path, mesh, rank) for rank in range(mesh.size)]
    preadv = os.preadv

    def slowly(*args: Any) -> int:
        got = preadv(*args)
        time.sleep(1e-4)  # the others read meanwhile
        return got

    monkeypatch.setattr(os, "preadv", slowly)
    spec = read_model(tmp_path)
    table = weight_table(spec, mesh)
    source = open_source(tmp_path, spec, table)
    with ThreadPoolExecutor(mesh.size) as ranks:
        found = list(
            ranks.map(lambda r: unpacked(load_weights(source, table, mesh, r, torch.float32)), range(mesh.size))
        )
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("case", [MOE, HYBRID])
def test_several_readers_load_what_one_does_and_what_stops_one_stops_all(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(case, tmp_path)
    expected = tiles(tmp_path)
    monkeypatch.setattr(load, "readers", lambda source, device: 4)
    assert_same(tiles(tmp_path), expected)
    preadv, reads = os.preadv, []

    def breaking(*args: Any) -> int:
        reads.append(threading.current_thread().name)
        if len(reads) == 9:
            return 0
        time.sleep(1e-3)
        return preadv(*args)

    monkeypatch.setattr(os, "preadv", breaking)
    with pytest.raises(ModelError, match="fetch the file again"):
        tiles(tmp_path)
    assert len({name for name in reads if name.startswith("tessera-load")}) > 1
    count = len(reads)
    time.sleep(0.05)
    assert len(reads) == count, "nobody reads on"
