"""Makes sure that Ctrl-C ends a stage, whatever the libraries that run it do with the signal."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def interruptible(again_after: float = 5.0) -> Iterator[None]:
    """Makes a Ctrl-C during the block leave it as KeyboardInterrupt.

    Ray Data loses an interrupt that arrives while it starts: raised inside a callback, it is printed and dropped. Ray
    Train's handler exits with code 0, as if all were done, and stays in place after training. So an interrupt is
    raised again until it has ended the block, an exit becomes an interrupt, and the previous handler is restored.

    Args:
        again_after: seconds until a lost interrupt is raised once more.
    """
    main = threading.main_thread()
    if threading.current_thread() is not main:  # only the main thread gets signals
        yield
        return
    assert main.ident is not None
    thread, pressed, left = main.ident, threading.Event(), threading.Event()

    def interrupt(number: int, frame: Any) -> None:
        pressed.set()
        raise KeyboardInterrupt

    def insist() -> None:
        pressed.wait()
        while not left.wait(again_after):
            signal.pthread_kill(thread, signal.SIGINT)

    threading.Thread(target=insist, daemon=True).start()
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except BaseException as e:
        if pressed.is_set() or isinstance(e, SystemExit):
            raise KeyboardInterrupt from e
        raise
    else:
        if pressed.is_set():
            raise KeyboardInterrupt
    finally:
        left.set()
        pressed.set()  # lets the thread end
        signal.signal(signal.SIGINT, before)
