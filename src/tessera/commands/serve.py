"""`tessera serve`: a model over HTTP, until a signal."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from importlib import import_module

from tessera.commands.settings import flags
from tessera.commands.terminal import progress
from tessera.core.config import Notes, layered, read, read_environment
from tessera.serve.launch import launch


def run(options: Namespace, asked: Mapping[str, object], environ: Mapping[str, str]) -> int:
    """Serves; `--plan` prints what would be served and ends. On hosts after the first: only ranks."""
    if options.plan:
        plan = import_module("tessera.commands.plan")  # torch, which the front of a server does not need
        plan.show(flags(options, asked), environ)
        return 0
    given = flags(options, asked)
    if _node_rank(given, environ) > 0:
        node = import_module("tessera.serve.node")  # torch again
        return node.run(given, environ)
    return launch(given, environ, progress)


def _node_rank(asked: Mapping[str, object], environ: Mapping[str, str]) -> int:
    """Which host this is; whatever is wrong is refused by whoever is started."""
    return read(layered(read_environment(environ).asked, asked), Notes()).number("node_rank")
