"""The type of what layers are: generators that wait on the wire by `yield`."""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

from torch import Tensor

from tessera.comm.base import Handle

Result = TypeVar("Result")
Waits = Generator[Handle, Tensor, Result]  # yields what it waits for, is sent the tensor, returns a Result
