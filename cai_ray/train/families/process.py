"""An object in a process of its own, which may crash or hang without harm to this one."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


class StepError(Exception):
    """What does not work, in one line."""


class Remote:
    """Makes an object in a new process and calls its methods there.

    Args:
        factory: what makes the object, as `module:name`. It is imported in the new process.
        arguments: what the factory is called with.
        timeout_s: the most seconds that the start, and each call, may take.
        env: environment variables that the process has beside those of this one.

    Raises:
        StepError: from a call, or from the start. The object raised an error, or its process ended or is late.
    """

    def __init__(
        self, factory: str, arguments: tuple[Any, ...], timeout_s: float, env: Mapping[str, str] = {}
    ):
        self._timeout = timeout_s
        self.usable = True
        """Whether further calls make sense: it never failed to answer."""
        context = multiprocessing.get_context("spawn")
        served = factory, arguments, dict(env)
        self._log = tempfile.NamedTemporaryFile(prefix="cai-ray-", suffix=".log")  # noqa: SIM115
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._log.name, *served))
        self._process.start()
        theirs.close()
        try:
            self._answer("start")
        except StepError:
            self.close()
            raise

    def call(self, method: str, *arguments: Any) -> Any:
        """What a method of the object returns."""
        try:
            self._connection.send((method, arguments))
        except OSError as e:
            raise self._ended() from e
        return self._answer(method)

    def close(self) -> None:
        """Ends the process and all that it started."""
        import psutil

        self._connection.close()
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(self._process.pid)
            for child in [*process.children(recursive=True), process]:
                with suppress(psutil.NoSuchProcess):
                    child.kill()
        self._process.join()
        self._log.close()

    def _answer(self, what: str) -> Any:
        if not self._connection.poll(self._timeout):
            self.usable = False
            raise StepError(f"{what}: no answer within {self._timeout:.0f} s")
        try:
            fine, value = self._connection.recv()
        except (EOFError, OSError) as e:
            raise self._ended() from e
        if not fine:
            raise StepError(value)
        return value

    def _ended(self) -> StepError:
        self.usable = False
        self._process.join(5)
        lines = [line.strip() for line in Path(self._log.name).read_text(errors="replace").splitlines()]
        last = next((line for line in reversed(lines) if line), "")
        said = f" ({last[:160]})" if last else ""
        return StepError(f"its process ended with exit code {self._process.exitcode}{said}")


def one_line(error: BaseException) -> str:
    """An error's text in one line of moderate length, with its type unless the text is meant for people."""
    from cai_ray.errors import InputError, Stopped

    text = " ".join(str(error).split())
    plain = isinstance(error, InputError | Stopped | StepError)
    named = text if plain and text else f"{type(error).__name__}: {text}" if text else type(error).__name__
    return named if len(named) <= 240 else f"{named[:239]}…"


def _serve(
    connection: Connection, log: str, factory: str, arguments: tuple[Any, ...], env: dict[str, str]
) -> None:
    """Makes the object and answers calls until the other side is gone."""
    os.environ.update(env)  # before the libraries are imported that read it
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    try:
        module, _, name = factory.partition(":")
        made = getattr(importlib.import_module(module), name)(*arguments)
        connection.send((True, None))
    except Exception as e:
        connection.send((False, one_line(e)))
        os._exit(0)
    with suppress(EOFError, OSError):
        while True:
            method, values = connection.recv()
            try:
                answer = True, getattr(made, method)(*values)
            except Exception as e:
                answer = False, one_line(e)
            connection.send(answer)
    os._exit(0)  # libraries may hang when they end
