"""All that a planner hears: what the front says, what ranks bring back, what becomes of hand-overs, and the time."""

from __future__ import annotations

from tessera.core.messages import Asked
from tessera.plan.handoff import Scored, Wire
from tessera.plan.step import Clock, StepDone

Event = Asked | StepDone | Wire | Scored | Clock
