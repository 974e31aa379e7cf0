"""`tessera serve`: a model over HTTP, until a signal."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from importlib import import_module

from tessera.commands.settings import flags
from tessera.commands.terminal import progress
from tessera.serve.launch import launch


def run(options: Namespace, asked: Mapping[str, object], environ: Mapping[str, str]) -> int:
    """Serves; `--plan` prints what would be served and ends."""
    if options.plan:
        plan = import_module("tessera.commands.plan")  # torch, which the front of a server does not need
        plan.show(flags(options, asked), environ)
        return 0
    return launch(flags(options, asked), environ, progress)
