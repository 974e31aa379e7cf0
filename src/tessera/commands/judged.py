"""Everything that is wrong with what was asked, once something is: bad values and bad combinations in one round.

Flags alone are read within a tenth of a second. What their combinations come to takes the model and the hardware, so
it is asked only when a command would start anyway, or here, when it will not.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from importlib import import_module

from tessera.commands.settings import flags
from tessera.core.config import canonical, layered
from tessera.core.errors import ConfigError, Conflict, LayoutError, ModelError


def everything(
    options: Namespace, asked: Mapping[str, object], environ: Mapping[str, str], wrong: Sequence[Conflict]
) -> list[Conflict]:
    """`wrong`, found in the flags alone, and after it what else a start would refuse."""
    settings = vars(options)
    if any(settings.get(name) for name in ("url", "host", "port")):  # no engine is to be started
        return list(wrong)
    told = {canonical(conflict.flags[0].split()[0]) for conflict in wrong}
    unknown = {conflict.flags[0]: True for conflict in wrong if conflict.flags[0] == canonical(conflict.flags[0])}
    try:
        given = layered(flags(options, asked), unknown)
        plan = import_module("tessera.commands.plan")  # torch, as all below
        hardware = plan.planned(options, given) if settings.get("device_memory") else None
        plan.prepare(given, environ, hardware, weights=False)
    except ConfigError as error:
        more = [c for c in error.conflicts if len(c.flags) > 1 or canonical(c.flags[0].split()[0]) not in told]
        return [*wrong, *more]
    except (ModelError, LayoutError):  # what no value can be blamed for is told by itself, once the rest is mended
        pass
    return list(wrong)
