"""Starts vLLM's engine process on a CPU from a fork server.

vllm 0.29.0: an engine beside an asynchronous front end is a process of its own. vLLM spawns it when this process has
imported everything, and it imports everything again. A fork server has it imported by then, which halves the start. (A
fork of this process would copy the locks of Ray's threads.) vLLM knows no such method by name, and inside an actor of
Ray it spawns whatever it was told, so its function that chooses the method is replaced for a moment.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess

UNIPROC = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
"""vLLM's executor that works in the engine's own process, by the name that its arguments take."""


def import_for_engine() -> None:
    """Starts a fork server that imports vllm for the engine's process while this process imports it."""
    multiprocessing.set_forkserver_preload(
        [__name__, "vllm.v1.engine.core", "vllm.v1.executor.uniproc_executor", "vllm.v1.worker.cpu_worker"]
    )
    forkserver.ensure_running()


class _EngineProcess(ForkServerProcess):
    """Ends with the process that asked for it: its parent is the fork server, so nobody else would end it."""

    def run(self) -> None:
        threading.Thread(target=_end_with_parent, daemon=True).start()
        super().run()


class _EngineContext(ForkServerContext):
    Process = _EngineProcess  # type: ignore[assignment]


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextmanager
def engine_from_fork_server() -> Iterator[None]:
    """An engine that is made within takes its process from the fork server."""
    from vllm.v1.engine import utils

    usual = utils.get_mp_context
    utils.get_mp_context = _EngineContext
    try:
        yield
    finally:
        utils.get_mp_context = usual
