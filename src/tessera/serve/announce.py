"""What the server says of itself: the choices it made, and that it is ready, with a call to try."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence

import msgspec

from tessera.core.config import Resolved
from tessera.run.stages import Stages
from tessera.serve.replica import Replica
from tessera.serve.server import Server

log = logging.getLogger(__name__)
READY = "The server is fired up and ready to roll!"  # what scripts made for SGLang wait for


def decisions(resolved: Resolved) -> None:
    """Every choice made for the user, whatever the log level."""
    lines = [f"  {decision}" for decision in resolved.decisions]
    sys.stderr.write("\n".join([f"Serving {resolved.config.model.served_name} with:", *lines, ""]))
    sys.stderr.flush()


def ready(server: Server, url: str, seconds: float) -> None:
    """What the start took, where it is, how to call it, and the line that scripts wait for. `seconds`: until now."""
    log.info("Start: %s", started(server.client.replicas).line())
    log.info(
        "Serving %s at %s after %.1f s. Try:\n%s", server.options.served_model_name, url, seconds, hint(server, url)
    )
    log.info(READY)


def started(replicas: Sequence[Replica]) -> Stages:
    """The stages of the start; of replicas that start side by side the slowest."""
    stages = Stages()
    for replica in replicas:
        told = msgspec.convert(replica.info.get("start", {}), Stages)
        stages.follow([told, Stages({"first token": replica.first_s})])
    return stages


# The packaged models know questions of this form; larger ones answer it too.
QUESTION = "Ann has 17 apples. Ann buys 25 more. Ben gives Ann 8. How many apples does Ann have now?"


def hint(server: Server, url: str) -> str:
    """A call that this server answers; where it answers nobody by itself, what does."""
    if server.reader.limits.role == "prefill":
        return f"  tessera router --prefill {url} --decode URL"
    body: dict[str, object] = {"model": server.options.served_model_name}
    path = "/v1/completions"
    if server.reader.tokenizer is None:
        body["prompt"] = [1, 2, 3]
    elif server.reader.template is None:
        body["prompt"] = "Hello"
    else:
        path, body["messages"] = "/v1/chat/completions", [{"role": "user", "content": QUESTION}]
    key = " -H 'authorization: Bearer KEY'" if server.options.api_key else ""
    return f"  curl {url}{path}{key} -H 'content-type: application/json' -d '{json.dumps(body)}'"
