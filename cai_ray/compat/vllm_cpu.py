"""Starts vLLM's engine on a CPU in half the time, from a fork server.

Written for vLLM 0.29. By itself vLLM spawns the engine's process once this one is ready, and that process imports
everything again. A fork server imports it while this process does. (A fork of this process would copy the locks of
Ray's threads.) vLLM has no setting for this start method, and inside an actor of Ray it always spawns, so the
function that chooses the method is replaced while an engine starts.
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
"""The executor that does its work in the engine's own process."""


def preload_engine() -> None:
    """Begins to import vllm for the engine's process; call it before this process imports vllm."""
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
    """Makes vLLM start its engine from the fork server within the block."""
    from vllm.v1.engine import utils

    usual = utils.get_mp_context
    utils.get_mp_context = _EngineContext
    try:
        yield
    finally:
        utils.get_mp_context = usual
