"""Promise: hosts of one instance compute one model in one way, or start-up is refused with what differs."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import zmq

from assets.abacus import model
from tessera.core.config.types import Config
from tessera.core.errors import ConfigError
from tessera.models.folder import find_model
from tessera.run.hosts import Placed, conflicts, identity
from tessera.run.hub import Hub
from tessera.run.wire import End, Failed, Hello, decode_down, encode
from tiny import resolved

NAME = "abacus-mla"


def config(folder: Path, node: int = 0, **flags: Any) -> Config:
    hosts = {"tp": 2, "nnodes": 2, "node_rank": node, "dist_init_addr": "h:1", "collectives": "gloo"}
    return resolved(model(NAME).spec, model_path=str(folder), **hosts, **flags).config


def found(folder: Path, **flags: Any) -> list[str]:
    """What is said of a second host; the first has the packaged model and no other flags."""
    first = config(find_model(NAME))
    return [str(conflict) for conflict in conflicts(config(folder, 1, **flags), first, identity(first))]


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(find_model(NAME), tmp_path / "elsewhere"))


def test_another_folder_with_the_same_model_is_the_same(copied: Path) -> None:
    assert found(copied) == []
    assert found(copied, max_total_tokens=64, chunked_prefill_size=32, port=1) == [], "the first host's hold"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"dtype": "float16"}, "--dtype of host 1: found float16, the first host has bfloat16. Start every host"),
        ({"dp": 2, "enable_dp_attention": True}, "--dp-size of host 1: found 2, the first host has 1."),
        ({"load_format": "dummy"}, "--load-format of host 1: found dummy, the first host has auto."),
        ({"attention_backend": "reference"}, "--attention-backend of host 1: found reference, the first host has "),
        ({"parts_dtype": "float32"}, "--parts-dtype of host 1: found float32, the first host has model."),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_flags_are_named(flags: dict[str, Any], said: str) -> None:
    assert any(text.startswith(said) for text in found(find_model(NAME), **flags))


def test_other_weights_of_the_same_shape_are_seen(copied: Path) -> None:
    (file,) = copied.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    (text,) = found(copied)
    assert text.startswith(f"--model-path {copied} of host 1: its weights are not those of the first host's.")


def test_all_that_differs_is_told_at_once(copied: Path) -> None:
    shutil.copy(find_model("abacus-hybrid") / "config.json", copied)
    said = found(copied, dtype="float16", page_size=8)
    assert len(said) >= 3
    assert [text.split(" of host")[0] for text in said][-1].startswith("--model-path")


HERE = Placed(3, 3, 0, "a")
WRONG = {
    "two hosts with one rank": (
        Placed(3, 3, 1, "c"),
        "--node-rank 1: two hosts have it: b and c. Give each host its own",
    ),
    "another number of ranks": (Placed(6, 3, 1, "c"), "--tp-size of host 1: found 6, the first host has 3"),
    "another number of hosts": (Placed(3, 2, 1, "c"), "--nnodes of host 1: found 2, the first host has 3"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("met", [False, True])
def test_a_host_that_was_started_wrongly_is_told_why(name: str, met: bool) -> None:
    """While ranks meet that ends the start; one that comes to an instance that serves is turned away from it."""
    (there, said), hub, context = WRONG[name], Hub(3, None, HERE), zmq.Context()
    try:
        with context.socket(zmq.DEALER) as one, context.socket(zmq.DEALER) as other:
            for link, routing_id in ((one, b"1/00000000000000aa"), (other, b"1/00000000000000bb")):
                link.routing_id = routing_id
                link.connect(hub.address)
            one.send(encode(Hello(Placed(3, 3, 1, "b"))))
            assert hub.receive(60.0) is not None
            if met:
                hub.met()
            other.send(encode(Hello(there)))
            if met:
                other.send(encode(Failed("ConfigError", "as told")))
                assert hub.receive(1.0) is None
                hub.send(End(), [1])
            else:
                with pytest.raises(ConfigError, match=re.escape(said)):
                    hub.receive(60.0)
                hub.close(0)
            told = {link: decode_down(link.recv()) for link in (one, other) if link.poll(10_000)}
            assert any(said in str(conflict) for conflict in told[other].why)
            assert bool(told[one].why) is not met
    finally:
        hub.close(0)
        context.term()
