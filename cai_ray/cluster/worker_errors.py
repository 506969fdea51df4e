"""Errors of Ray's workers as the errors that they are."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from cai_ray.errors import InputError


@contextmanager
def worker_errors() -> Iterator[None]:
    """An InputError in a worker of Ray Data, or what the system refused it, is one here: Ray keeps its text alone, in
    the worker's traceback."""
    from ray.exceptions import RayError

    try:
        yield
    except RayError as e:
        if at_fault := input_error(str(e)):
            raise at_fault from e
        told = re.search(r"^\w+: \[Errno (\d+)\] ([^:\n]+)(?:: '(.+)')?$", str(e), re.MULTILINE)
        if told is not None:
            raise OSError(int(told[1]), told[2], told[3]) from e
        raise


def input_error(traceback: str) -> InputError | None:
    """The one that a worker's traceback ends with."""
    told = re.search(r"^cai_ray\.errors\.InputError: (.+)$", traceback, re.MULTILINE)
    return InputError(told[1]) if told else None
