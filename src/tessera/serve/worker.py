"""The engine process of one instance: `python -m tessera.serve.worker FOLDER PARENT`, started by `serve/process.py`."""

from __future__ import annotations

import sys
from pathlib import Path

from tessera.models.folder import read_model
from tessera.run.core import EngineCore, prepared_core
from tessera.run.progress import Seldom
from tessera.run.stages import Stages
from tessera.run.startup import Prepared, prepare
from tessera.serve import logs
from tessera.serve.host import Tell, host
from tessera.serve.wire import Begin, Loading, Starting


def build(begin: Begin, tell: Tell) -> EngineCore:
    """Resolves what was asked, says so, and loads the model. Raises `ConfigError` and `ModelError`."""
    stages = Stages()
    stages.imported()
    if begin.known is None:
        prepared = prepare(begin.asked, begin.environ, stages=stages)
    else:
        folder = Path(begin.known.folder)
        prepared = Prepared(folder, read_model(folder), begin.known.resolved, stages).as_replica(begin.replica)
    mesh = prepared.resolved.config.mesh
    logs.configure(prepared.resolved.config.logging.level, f"replica {mesh.replica}: " if mesh.replicas > 1 else "")
    tell(Starting(prepared.resolved, str(prepared.folder), prepared.spec.vocab_size))
    return prepared_core(prepared, tell, Seldom(lambda done, total: tell(Loading(done, total))))


if __name__ == "__main__":
    sys.exit(host(sys.argv[1:], build))
