"""Who waits for a step hears news all the same; nothing that was put into a mailbox is missed."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import Future

import pytest
import torch

from tessera.run.host import Download
from tessera.run.mailbox import Mailbox, readable
from tessera.run.waiter import Watch

WAIT_S = 30.0
BRIEF_S = 0.05
DONE = Download([], torch.device("cpu"))


def results(number: int = 1) -> list[Future[Download]]:
    return [Future() for _ in range(number)]


@pytest.fixture
def news() -> Mailbox[int]:
    return Mailbox()


def test_a_step_is_over_when_all_its_ranks_are_and_not_before(news: Mailbox[int]) -> None:
    watch, step = Watch(), results(2)
    step[0].set_result(DONE)
    assert not watch.wait(step, news.there, BRIEF_S)
    threading.Timer(BRIEF_S, step[1].set_result, (DONE,)).start()
    assert watch.wait(step, news.there, WAIT_S)
    later = results()
    assert not watch.wait(later, news.there, BRIEF_S), "the end of one step was taken for that of the next"
    later[0].set_result(DONE)
    assert watch.wait(later, news.there, WAIT_S)
    watch.close()


def test_news_end_the_wait_and_the_step_is_waited_for_again(news: Mailbox[int]) -> None:
    watch, step = Watch(), results()
    threading.Timer(BRIEF_S, news.put, (1,)).start()
    assert not watch.wait(step, news.there, WAIT_S)
    assert news.take() == [1]
    step[0].set_result(DONE)
    assert watch.wait(step, news.there, WAIT_S)
    watch.close()


def test_steps_that_failed_or_were_cancelled_are_over(news: Mailbox[int]) -> None:
    watch = Watch()
    failed, cancelled, good = results(2), results(), results()
    failed[0].set_exception(ValueError("out of cheese"))
    failed[1].set_result(DONE)
    cancelled[0].cancel()
    good[0].set_result(DONE)
    for step in (failed, cancelled, good):
        assert watch.wait(step, news.there, WAIT_S)
    watch.close()


def test_without_news_nothing_is_waited_for_here_and_without_a_step_news_are(news: Mailbox[int]) -> None:
    watch = Watch()
    before = threading.active_count()
    assert watch.wait(results(), None, WAIT_S), "`collect` waits"
    began = time.monotonic()
    assert not watch.wait((), news.there, BRIEF_S)
    assert time.monotonic() - began >= BRIEF_S / 2
    news.put(1)
    assert not watch.wait((), news.there, WAIT_S)
    assert threading.active_count() == before, "a thread for nobody"
    watch.close()


def test_nothing_that_was_put_is_missed_or_out_of_order(news: Mailbox[int]) -> None:
    found: list[int] = []
    threads = [threading.Thread(target=lambda k=k: [news.put(1000 * k + i) for i in range(500)]) for k in range(4)]
    for thread in threads:
        thread.start()
    while len(found) < 2000:
        assert readable([news.there], WAIT_S), "what is there was not told"
        found += news.take()
    assert sorted(found) == [1000 * k + i for k in range(4) for i in range(500)]
    assert all([n for n in found if n // 1000 == k] == sorted(n for n in found if n // 1000 == k) for k in range(4))
    assert not readable([news.there], 0.0)


def test_the_file_of_a_mailbox_goes_with_it() -> None:
    box: Mailbox[int] = Mailbox()
    file = box.there
    box.put(1)
    del box
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(file)


def test_nobody_is_left_when_it_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Known fault: a thread that still freed a step's tensors while the interpreter ended aborted the process."""
    write = os.eventfd_write
    monkeypatch.setattr(os, "eventfd_write", lambda *args: (time.sleep(BRIEF_S), write(*args)))
    watch, step, news = Watch(), results(), Mailbox[int]()
    assert not watch.wait(step, news.there, BRIEF_S)
    step[0].set_result(DONE)
    watch.close()
    assert "tessera-waiter" not in {thread.name for thread in threading.enumerate()}
