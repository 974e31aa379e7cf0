"""`tessera serve --node-rank N` on hosts after the first: the ranks of this host, for the engine on the first."""

from __future__ import annotations

from collections.abc import Mapping

from tessera.run.nodes import follow
from tessera.run.startup import prepare
from tessera.serve import announce, logs


def run(asked: Mapping[str, object], environ: Mapping[str, str]) -> int:
    """Blocks until the engine ends them, or a signal; the exit code. Raises what `prepare` and `follow` raise."""
    logs.configure()
    prepared = prepare(asked, environ)
    logs.configure(prepared.resolved.config.logging.level)
    announce.decisions(prepared.resolved)
    follow(prepared)
    return 0
