"""Environment variables: the only place below the command line that knows any.

Names of SGLang and of Mooncake are known under `TESSERA_` too. A variable that sets a flag counts less than a file,
which counts less than the command line. One that means nothing here is listed at start-up as ignored.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from tessera.core.config.types import Decision

OURS = "TESSERA_"
THEIRS = ("SGLANG_", "MC_")
POOLS = "caches are registered as they are allocated; no pool of Mooncake's own is used"
ONE_WIRE = "steps go to the ranks over ZeroMQ; there is no other way to choose"
NO_COMPARING = "ranks are not compared by their free memory, so there is no such check to switch off"
OWN_CACHE = "DeepGEMM, where it is chosen (--fp8-gemm-backend), reads DG_JIT_CACHE_DIR by itself"


@dataclass(frozen=True, slots=True)
class Variable:
    """`name` without the `prefix` of whoever named it. It sets flag `flag`, or is ignored because of `reason`."""

    prefix: str
    name: str
    flag: str | None = None
    reason: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """Full names, ours first: it wins over the other."""
        return tuple(dict.fromkeys((OURS + self.name, self.prefix + self.name)))


VARIABLES = (
    Variable(OURS, "API_KEY", "api_key"),
    Variable(OURS, "DEBUG_CHECKS", "debug_checks"),
    Variable(OURS, "HOST", "host"),
    Variable(OURS, "LOG_EVENTS", "log_events"),
    Variable(OURS, "LOG_LEVEL", "log_level"),
    Variable(OURS, "MODEL_PATH", "model_path"),
    Variable(OURS, "PORT", "port"),
    Variable("SGLANG_", "DISAGGREGATION_HEARTBEAT_INTERVAL", "disaggregation_heartbeat_interval"),
    Variable("SGLANG_", "DISAGGREGATION_HEARTBEAT_MAX_FAILURE", "disaggregation_heartbeat_max_failure"),
    Variable("SGLANG_", "DISAGGREGATION_BOOTSTRAP_TIMEOUT", "disaggregation_bootstrap_timeout"),
    Variable("SGLANG_", "DISAGGREGATION_WAITING_TIMEOUT", "disaggregation_waiting_timeout"),
    Variable("SGLANG_", "DECODE_BOOTSTRAP_TIMEOUT", "disaggregation_decode_bootstrap_timeout"),
    Variable("SGLANG_", "TORCH_PROFILER_DIR", "torch_profiler_dir"),
    Variable("SGLANG_", "HACK_SEQ_BOOTSTRAP_ROOM", reason="every request brings its own bootstrap_room"),
    Variable("SGLANG_", "MOONCAKE_CUSTOM_MEM_POOL", reason=POOLS),
    Variable("SGLANG_", "USE_MESSAGE_QUEUE_BROADCASTER", reason=ONE_WIRE),
    Variable("SGLANG_", "DISABLE_TP_MEMORY_INBALANCE_CHECK", reason=NO_COMPARING),
    Variable("SGLANG_", "DG_CACHE_DIR", reason=OWN_CACHE),
    Variable("MC_", "FORCE_MNNVL", reason=POOLS),
)


@dataclass(frozen=True, slots=True)
class Environment:
    """Flags that variables set, and the variables that are ignored."""

    asked: Mapping[str, object]
    ignored: tuple[Decision, ...]


def current() -> Mapping[str, str]:
    """The environment of this process."""
    return dict(os.environ)


def read_environment(environ: Mapping[str, str]) -> Environment:
    """Reads every variable with a prefix of ours, SGLang's or Mooncake's; none is passed over in silence."""
    by_name = {name: (rank, v) for v in VARIABLES for rank, name in enumerate(v.names)}
    asked: dict[str, object] = {}
    ignored: list[Decision] = []
    # Ours (rank 0) comes last, so that it wins.
    for name in sorted(environ, key=lambda n: (-by_name.get(n, (9, None))[0], n)):
        if not name.startswith((OURS, *THEIRS)):
            continue
        variable = by_name[name][1] if name in by_name else None
        if variable is None:
            ignored.append(Decision(name, "ignored", "this build knows no such variable"))
        elif variable.flag is None:
            ignored.append(Decision(name, "ignored", variable.reason))
        else:
            asked[variable.flag] = environ[name]
    return Environment(asked, tuple(sorted(ignored, key=lambda d: d.what)))
