"""The constitutions of a run's servers: the current one, and those before it.

They are kept in `RUN/serve/constitutions.json`. Whoever writes this file gives all servers of the run another
constitution: their ingresses read it every few seconds. Requests that have begun end with the one they began with.
"""

from __future__ import annotations

import time
from typing import Any

from cai_ray.constitution import Constitution, parse
from cai_ray.errors import InputError
from cai_ray.storage import files
from cai_ray.storage.run import Run

KEPT = 4
"""How many constitutions are kept: the current one, and the last ones to compare it with."""
RELOAD_EVERY_S = 2.0


def put(run: Run, document: Constitution) -> None:
    """Makes a constitution the current one of a run's servers.

    Raises:
        InputError: none of its principles is enabled.
        OSError: the run directory cannot be written.
    """
    if not document.enabled:
        raise InputError(f"constitution {document.name}: no principle is enabled; enable one")
    before = [d for d in read(run) if d.sha != document.sha]
    documents = [document, *before][:KEPT]
    files.write_json(_path(run), [d.model_dump(mode="json") for d in documents])


def read(run: Run) -> list[Constitution]:
    """The current constitution and those before it, the latest first. At the beginning this is the run's own.

    Raises:
        InputError: the file is damaged.
    """
    path = _path(run)
    if not files.exists(path):
        return [run.constitution()]
    try:
        data = files.read_json(path)
    except ValueError as e:
        raise InputError(f"{path}: is not valid JSON ({e}); delete it") from e
    if not isinstance(data, list) or not data:
        raise InputError(f"{path}: holds no constitutions; delete it")
    return [parse(d, path) for d in data]


class Constitutions:
    """The constitutions as one replica last read them."""

    def __init__(self, run: Run):
        self.run = run
        self.read_at = time.monotonic()
        self.documents = read(run)

    @property
    def current(self) -> Constitution:
        return self.documents[0]

    @property
    def stale(self) -> bool:
        return time.monotonic() - self.read_at > RELOAD_EVERY_S

    def reload(self) -> None:
        """Reads the file again. If it cannot be read, nothing changes."""
        self.read_at = time.monotonic()
        self.documents = read(self.run)

    def find(self, name: str) -> Constitution:
        """The constitution called `current` or `previous`, or whose hash begins with `name`.

        Raises:
            InputError: there is no such constitution.
        """
        if name == "current":
            return self.current
        if name == "previous" and len(self.documents) > 1:
            return self.documents[1]
        matches = [d for d in self.documents if len(name) >= 4 and d.sha.startswith(name)]
        if matches:
            return matches[0]
        hashes = ", ".join(d.sha for d in self.documents)
        raise InputError(f"no constitution {name!r} here; there are (the current one first): {hashes}")


def identity(document: Constitution) -> dict[str, Any]:
    """How answers identify a constitution."""
    return {"name": document.name, "version": document.version, "sha": document.sha}


def _path(run: Run) -> str:
    return run.path("serve", "constitutions.json")
