"""Engines that CI does without are tested only when `-m` names them: `make test-engines`."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips tests marked `engines` unless they were asked for."""
    if "engines" in (config.option.markexpr or ""):
        return
    for item in items:
        if item.get_closest_marker("engines"):
            item.add_marker(pytest.mark.skip(reason="make test-engines runs it"))
