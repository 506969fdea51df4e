"""What a command that fails prints, and the exit code that it ends with."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from errno import EACCES, EDQUOT, EFBIG, ENOSPC, EROFS
from typing import Any, TypeVar

from typer import TyperException

from cai_ray.errors import (
    EXIT_DONE,
    EXIT_FAULT,
    EXIT_INPUT,
    EXIT_INTERRUPTED,
    EXIT_STOPPED,
    InputError,
    Stopped,
    Unavailable,
)

T = TypeVar("T")


def usage_line(error: TyperException, group: Any, arguments: list[str]) -> str:
    """The line for a wrong command, option or argument, with the nearest names and the help to read."""
    text = " ".join(error.format_message().split())
    # Typer's sentence, its hints and the prefix of pydantic's errors in the form of all other lines.
    text = re.sub(r"^Invalid value for '(.*?)': (Value error, )?", r"\1: ", text)
    text = re.sub(r"^(Missing \w+|No such option:) '?([^' ]+?)'?(?=\.? |\.?$)", r"\1 \2", text)
    text = text.replace("No such option: ", "no such option ")
    if names := sorted(getattr(error, "possibilities", None) or []):
        text = f"{text.partition(' (')[0]} (did you mean {' or '.join(names)}?)"
    text = re.sub(r"\. Did you mean (.*)\?$", r" (did you mean \1?)", text)
    help_command = " ".join(["cai-ray", *_command_words(group, arguments), "--help"])
    return f"cai-ray: {text[:1].lower()}{text[1:].rstrip('.')}; see `{help_command}`"


def _command_words(group: Any, arguments: list[str]) -> list[str]:
    """The arguments that name a command: `town build` of `town build --out DIR`."""
    words = []
    for word in arguments:
        group = getattr(group, "commands", {}).get(word)
        if group is None:
            break
        words.append(word)
    return words


def report_failure(error: BaseException) -> int:
    """Prints one line about an error that a user can mend, and returns the exit code. Raises all others again."""
    if isinstance(error, InputError):
        return _print(" ".join(str(error).split()), EXIT_INPUT)
    if isinstance(error, Stopped):
        return _print(f"stopped: {error}", EXIT_STOPPED)
    if isinstance(error, Unavailable):
        return _print(str(error), EXIT_FAULT)
    if isinstance(error, KeyboardInterrupt):
        return _print("interrupted; the same command goes on from here", EXIT_INTERRUPTED)
    if isinstance(error, BrokenPipeError):  # whoever read the output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE
    if refused := first_in_chain(error, _refused_by_system):
        name = refused.filename  # Ray puts other texts there
        place = f" ({name})" if isinstance(name, str) and os.path.isabs(name) else ""
        return _print(
            f"the output cannot be written{place}: {os.strerror(refused.errno or 0)}; "
            "free space or choose another --out, and run the same command again",
            EXIT_INPUT,
        )
    from cai_ray.storage.object_stores import refusal

    if storage_problem := first_in_chain(error, refusal):
        return _print(f"{storage_problem}; the same command goes on from here", EXIT_INPUT)
    raise error


def _print(text: str, exit_code: int) -> int:
    print(f"cai-ray: {text}", file=sys.stderr)
    return exit_code


def _refused_by_system(error: BaseException) -> OSError | None:
    """The error if the system refused to write: the disk is full, over quota, read-only or forbidden."""
    codes = (ENOSPC, EDQUOT, EROFS, EACCES, EFBIG)
    return error if isinstance(error, OSError) and error.errno in codes else None


def first_in_chain(error: BaseException, check: Callable[[BaseException], T | None]) -> T | None:
    """The first result of `check` for an error, for its causes, and for the errors that Ray wrapped in it."""
    checked: list[Any] = []
    queue: list[Any] = [error]
    while queue:
        e = queue.pop()
        if not isinstance(e, BaseException) or any(e is other for other in checked):
            continue
        if (result := check(e)) is not None:
            return result
        checked.append(e)
        # Ray's errors of a task, of training workers (by rank) and of its training controller.
        workers = getattr(e, "worker_failures", None) or {}
        queue += [e.__cause__, getattr(e, "cause", None), getattr(e, "controller_failure", None)]
        queue += workers.values()
    return None
