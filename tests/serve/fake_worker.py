"""An engine process around the fake engine: what `serve/worker.py` is around the real one, without torch.

The environment handed to `launch` says what goes wrong: FAULT=refuse, prepare, load (fails), slow (never loads),
sleep (never says anything), again (only the first start goes well), late (later starts take their time); PATIENCE:
seconds that a start may be silent; DELAY: seconds of a step; HOLD: a file, while which exists nothing steps.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

from tessera.core.config import Hardware, Notes, layered, read, resolve
from tessera.core.errors import ModelError
from tessera.core.families import read_spec
from tessera.serve.host import Tell, host
from tessera.serve.wire import Begin, Loading, Starting

sys.path.insert(0, str(Path(__file__).parents[1]))
from serve.fake_engine import FakeEngine
from serve.processes import CONFIG


def build(begin: Begin, tell: Tell) -> FakeEngine:
    """See `Build`."""
    fault = begin.environ.get("FAULT")
    if fault == "sleep":
        time.sleep(60)
    if fault == "again" and begin.known is not None:  # only the first start goes well
        raise ValueError("the checkpoint is gone")
    if fault == "late" and begin.known is not None:
        time.sleep(4)
    asked = layered(begin.asked, {"tp_size": 64} if fault == "refuse" else {})
    spec = read_spec(CONFIG)
    resolved = resolve(asked, spec, Hardware("cpu", 1 << 31))
    if (patience := begin.environ.get("PATIENCE")) is not None:
        serving = replace(resolved.config.serving, start_timeout=float(patience))
        resolved = replace(resolved, config=replace(resolved.config, serving=serving))
    if fault == "prepare":
        raise ModelError("the model cannot be found")
    if begin.known is not None:
        resolved = begin.known.resolved
    tell(Starting(resolved, read(asked, Notes()).word("model_path"), spec.vocab_size))
    tell(Loading(1, 2))
    if fault == "load":
        raise ValueError("the checkpoint is broken")
    if fault == "slow":
        time.sleep(60)
    held = begin.environ.get("HOLD")
    return FakeEngine(tell, float(begin.environ.get("DELAY", "0.001")), Path(held) if held else None)


if __name__ == "__main__":
    sys.exit(host(sys.argv[1:], build))
