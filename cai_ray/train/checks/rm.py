"""Checks of stage `rm`."""

from __future__ import annotations

from cai_ray.data.preflight import Preflight
from cai_ray.storage.run import Run
from cai_ray.train.checks.comparisons import note_comparisons


def check(run: Run, preflight: Preflight) -> None:
    """Raises InputError if the model to start from or the human comparisons cannot be used."""
    preflight.renderer(run.config.rm.init)
    note_comparisons(run, run.config.rm, preflight)


def check_room(run: Run) -> None:
    """Raises InputError if the cluster will never have room for the workers."""
    from cai_ray.train.runtime.group import check_resources

    check_resources(run, run.config.rm)
