"""Profiles: what SGLang's and vLLM's `/start_profile` ask for, for an engine that is served and for a library's."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Mapping
from typing import Any

from tessera.core.errors import DeadlineError, RequestError
from tessera.core.messages import EndProfile, Profile
from tessera.serve.checks import Check, Fields, Refused, bad, boolean, integer, listed, one_of, string
from tessera.serve.client import EngineClient

ENDS_S = 600.0  # until all traces are written
STARTS_S = 60.0
MOST_STEPS = 1 << 31
ONE_TRACE = "every process writes a trace of its own; open them together"


def _plain(value: Any, field: str) -> str:
    """Part of a file's name."""
    name = string(value, field)
    if not name or len(name) > 128 or not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
        raise bad(field, value, "letters, digits, '-', '_' and '.'")
    return name


def _folder(value: Any, field: str) -> str:
    name = string(value, field)
    if not name:
        raise bad(field, value, "the name of a folder")
    return name


_activities: Check = listed(one_of("CPU", "GPU"), 2)
FIELDS = Fields(
    honoured={
        "output_dir": _folder,
        "start_step": integer(0, MOST_STEPS),
        "num_steps": integer(1, MOST_STEPS),
        "activities": _activities,
        "with_stack": boolean,
        "record_shapes": boolean,
        "profile_prefix": _plain,
        "profile_id": _plain,
    },
    refused={
        "profile_by_stage": Refused("a trace has all kinds of steps; use num_steps while only one kind runs", (False,)),
        "profile_stages": Refused("a trace has all kinds of steps; leave it out"),
        "merge_profiles": Refused(ONE_TRACE, (False,)),
    },
)


async def start(client: EngineClient, body: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """Starts a profile in every engine; `folder`: where nobody named one. Raises `RequestError` that says why not."""
    values = FIELDS.read(body)
    name = values.get("profile_id", f"{time.time():.3f}")
    if "profile_prefix" in values:
        name = f"{values['profile_prefix']}-{name}"
    asked = Profile(
        uuid.uuid4().hex,
        values.get("output_dir", folder),
        name,
        values.get("start_step", 0),
        values.get("num_steps", 0),
        values.get("activities") or ("CPU", "GPU"),
        values.get("with_stack", False),
        values.get("record_shapes", False),
    )
    await _answered(client, asked, STARTS_S)
    until = f"{asked.num_steps} steps have run" if asked.num_steps else "/stop_profile"
    said = f"the profile '{name}' runs until {until}; its traces go to {asked.folder}"
    return {"success": True, "message": said, "output_dir": asked.folder, "profile_id": name}


async def end(client: EngineClient) -> dict[str, Any]:
    """Ends the profile of every engine, once its traces are written. Raises `RequestError` that says why not."""
    files = await _answered(client, EndProfile(uuid.uuid4().hex), ENDS_S)
    return {"success": True, "message": f"{len(files)} trace(s) are written", "files": files}


async def _answered(client: EngineClient, message: Profile | EndProfile, seconds: float) -> list[str]:
    """The files that all engines tell."""
    waiting = [replica.ask(message) for replica in client.replicas if replica.failure is None]
    try:
        answers = await asyncio.wait_for(asyncio.gather(*waiting), seconds)
    except TimeoutError:
        raise DeadlineError(f"no answer about the profile within {seconds:g} s") from None
    errors = [answer.error for answer in answers if answer.error is not None]
    if errors:
        raise RequestError("; ".join(dict.fromkeys(errors)))
    return [file for answer in answers for file in answer.files]
