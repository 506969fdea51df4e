"""Raises errors of Ray's workers here as what they were there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from cai_ray.errors import InputError


@contextmanager
def worker_errors() -> Iterator[None]:
    """Raises a worker's InputError or OSError as such.

    Ray Data wraps a worker's errors, and keeps nothing of them but the text of the traceback.
    """
    from ray.exceptions import RayError

    try:
        yield
    except RayError as e:
        if error := input_error(str(e)):
            raise error from e
        refused = re.search(r"^\w+: \[Errno (\d+)\] ([^:\n]+)(?:: '(.+)')?$", str(e), re.MULTILINE)
        if refused is not None:
            raise OSError(int(refused[1]), refused[2], refused[3]) from e
        raise


def input_error(traceback: str) -> InputError | None:
    """The InputError that a worker's traceback ends with, if it ends with one."""
    match = re.search(r"^cai_ray\.errors\.InputError: (.+)$", traceback, re.MULTILINE)
    return InputError(match[1]) if match else None
