"""An interrupt ends what it is meant to end, also where a library drops it."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress

import pytest

from cai_ray.cluster.interrupt import interruptible


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.01)  # the handler runs between two instructions


def test_an_interrupt_that_was_dropped_comes_again() -> None:
    def drop_and_wait() -> None:
        with suppress(KeyboardInterrupt):
            press()
        time.sleep(10)

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), interruptible(again_after=0.05):
        drop_and_wait()
    assert time.monotonic() - started < 5


def test_an_interrupt_dropped_at_the_end_counts() -> None:
    with pytest.raises(KeyboardInterrupt), interruptible(), suppress(KeyboardInterrupt):
        press()


def test_an_error_that_follows_from_it_is_the_interrupt() -> None:
    def wrap() -> None:
        try:
            press()
        except KeyboardInterrupt as e:
            raise RuntimeError("wrapped by a library") from e

    with pytest.raises(KeyboardInterrupt), interruptible():
        wrap()


def test_a_library_that_exits_with_success_is_an_interrupt() -> None:
    with pytest.raises(KeyboardInterrupt), interruptible():
        raise SystemExit(0)


def test_without_one_nothing_changes() -> None:
    before, threads = signal.getsignal(signal.SIGINT), threading.active_count()
    with pytest.raises(ZeroDivisionError), interruptible(again_after=0.01):
        _ = 1 / 0
    with interruptible(again_after=0.01):
        time.sleep(0.05)
    assert signal.getsignal(signal.SIGINT) is before
    time.sleep(0.05)
    assert threading.active_count() <= threads  # an earlier test's may end meanwhile


def test_a_thread_leaves_signals_alone() -> None:
    seen = []

    def work() -> None:
        with interruptible():
            seen.append(signal.getsignal(signal.SIGINT))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
