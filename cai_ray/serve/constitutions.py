"""The constitutions that a server asks by: the current one, and those before it, kept beside the run.

`RUN/serve/constitutions.json` is the one place. Whoever writes it puts another constitution into all servers of the
run: their ingresses look at it every few seconds, and requests that have begun end by the one they began with.
"""

from __future__ import annotations

import time
from typing import Any

from cai_ray.constitution import Constitution, parse
from cai_ray.errors import InputError
from cai_ray.storage import files
from cai_ray.storage.run import Run

# So many are kept: the current one, and the last ones to compare it with.
KEPT = 4
LOOK_EVERY_S = 2.0


def put(run: Run, document: Constitution) -> None:
    """Makes a constitution the current one of a run's servers.

    Raises:
        InputError: all its principles are off.
        OSError: the run directory cannot be written.
    """
    if not document.enabled:
        raise InputError(f"constitution {document.name}: no principle is enabled; enable one")
    before = [d for d in read(run) if d.sha != document.sha]
    kept = [document, *before][:KEPT]
    files.write_json(_path(run), [d.model_dump(mode="json") for d in kept])


def read(run: Run) -> list[Constitution]:
    """The current constitution, and those before it, the last first. Without any other it is the run's own.

    Raises:
        InputError: the file is damaged.
    """
    path = _path(run)
    if not files.exists(path):
        return [run.constitution()]
    try:
        data = files.read_json(path)
    except ValueError as e:
        raise InputError(f"{path}: is no JSON ({e}); delete it") from e
    if not isinstance(data, list) or not data:
        raise InputError(f"{path}: holds no constitutions; delete it")
    return [parse(d, path) for d in data]


class Constitutions:
    """What one replica knows of them."""

    def __init__(self, run: Run):
        self.run = run
        self.looked = time.monotonic()
        self.documents = read(run)

    @property
    def current(self) -> Constitution:
        return self.documents[0]

    @property
    def stale(self) -> bool:
        return time.monotonic() - self.looked > LOOK_EVERY_S

    def look(self) -> None:
        """Reads them again. What cannot be read changes nothing."""
        self.looked = time.monotonic()
        self.documents = read(self.run)

    def find(self, name: str) -> Constitution:
        """By `current`, `previous`, or how its hash begins.

        Raises:
            InputError: there is none of this name.
        """
        if name == "current":
            return self.current
        if name == "previous" and len(self.documents) > 1:
            return self.documents[1]
        found = [d for d in self.documents if len(name) >= 4 and d.sha.startswith(name)]
        if found:
            return found[0]
        known = ", ".join(d.sha for d in self.documents)
        raise InputError(f"no constitution {name!r} here; there are, the current one first: {known}")


def named(document: Constitution) -> dict[str, Any]:
    """What answers say of a constitution."""
    return {"name": document.name, "version": document.version, "sha": document.sha}


def _path(run: Run) -> str:
    return run.path("serve", "constitutions.json")
