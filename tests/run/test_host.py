"""The executor of a rank: what builds on work that failed fails too, and is never done."""

from __future__ import annotations

import pytest

from tessera.run.host import Worker


def test_nothing_is_done_after_work_that_failed() -> None:
    done: list[int] = []
    told: list[BaseException] = []
    worker = Worker("worker", told.append)
    before = worker.submit(lambda: done.append(1))
    failed = worker.submit(lambda: done[1])
    after = worker.submit(lambda: done.append(2))
    assert before.result(5) is None
    for future in (failed, after):
        with pytest.raises(IndexError):
            future.result(5)
    worker.close()
    assert done == [1]
    assert len(told) == 1
