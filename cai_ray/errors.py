"""The errors a user sees, and the exit codes they end with.

An `InputError` is the user's to mend: the command prints its one line and exits with 2. A `Stopped` is a
gate, an alarm or a budget doing its work: exit code 3, and the run can be resumed. Anything else is ours,
and keeps its traceback.
"""

from __future__ import annotations

EXIT_DONE, EXIT_FAULT, EXIT_INPUT, EXIT_STOPPED, EXIT_INTERRUPTED = 0, 1, 2, 3, 130


class InputError(Exception):
    """The input is at fault: the message names the file, key or value, and the remedy."""


class Stopped(Exception):
    """A gate, an alarm or a budget ended the run; it can be resumed."""


class OverBudget(Stopped):
    """The budget is spent; every rank of a training group raises it alike."""


class RowError(Exception):
    """One row cannot be processed. The row keeps this text in its `error` column; the job goes on."""


class Abstained(RowError):
    """The feedback model says nothing by one principle. Others' votes still count; where all abstain, the row errs."""
