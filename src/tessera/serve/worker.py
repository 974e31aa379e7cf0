"""The engine process of one instance: `python -m tessera.serve.worker FOLDER PARENT`, started by `serve/process.py`."""

from __future__ import annotations

import sys

import torch

from tessera.core.weights import weight_table
from tessera.models.folder import open_source
from tessera.run.core import EngineCore
from tessera.run.hardware import cores
from tessera.run.startup import prepare
from tessera.serve import logs
from tessera.serve.host import LoadingReports, Tell, host
from tessera.serve.wire import Begin, Starting


def build(begin: Begin, tell: Tell) -> EngineCore:
    """Resolves what was asked, says so, and loads the model. Raises `ConfigError` and `ModelError`."""
    prepared = prepare(begin.asked, begin.environ)
    config, spec = prepared.resolved.config, prepared.spec
    logs.configure(config.logging.level)
    # torch counts the host's cores; a container may use fewer. OMP_NUM_THREADS, which it has read, may be lower still.
    torch.set_num_threads(min(torch.get_num_threads(), cores()))
    tell(Starting(prepared.resolved, str(prepared.folder), spec.vocab_size))
    table = weight_table(spec, config.mesh.mesh)
    source = open_source(prepared.folder, spec, table, config.model.load_format, config.model.seed)
    return EngineCore(prepared.resolved, spec, source, tell, LoadingReports(tell))


if __name__ == "__main__":
    sys.exit(host(sys.argv[1:], build))
