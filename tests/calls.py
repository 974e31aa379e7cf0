"""HTTP calls of tests: httpx's own, which give up after five seconds, with the patience of a test."""

from __future__ import annotations

from functools import partial

import httpx

from waits import PATIENCE_S

get, post, stream = (partial(call, timeout=PATIENCE_S) for call in (httpx.get, httpx.post, httpx.stream))
