"""The errors that a user sees, and the exit codes of the commands.

An `InputError` is for the user to mend: the command prints one line and exits with 2. A `Stopped` is a gate, an alarm
or a budget at work: exit code 3, and the run can be resumed. An `Unavailable` is nobody's mistake, such as a machine
that is too busy: one line, exit code 1. Anything else is a fault of this package and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

EXIT_DONE, EXIT_FAULT, EXIT_INPUT, EXIT_STOPPED, EXIT_INTERRUPTED = 0, 1, 2, 3, 130


class InputError(Exception):
    """The input is at fault: the message names the file, key or value, and the remedy."""


class Stopped(Exception):
    """A gate, an alarm or a budget ended the run; it can be resumed."""


class OverBudget(Stopped):
    """The budget is spent. In a training group every rank raises this at the same step."""


class Unavailable(Exception):
    """The machine or a service that a command needs is not ready; the same command may succeed later."""


class RowError(Exception):
    """One row cannot be processed. Its text goes to the row's `error` column, and the job goes on."""

    spent: tuple[int, ...] = ()
    """What the call that failed used all the same (`cluster.usage.Usage`)."""
    made: Mapping[str, Any] = MappingProxyType({})
    """Columns of the row that were made before it failed (`generate.chain.keeping`)."""


class Abstained(RowError):
    """The feedback model gives no vote on one principle. The other votes count; a row without any vote is an error."""
