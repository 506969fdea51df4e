"""Checks of stage `sft`."""

from __future__ import annotations

from cai_ray.data.preflight import Preflight
from cai_ray.storage.run import Run


def check(run: Run, preflight: Preflight) -> None:
    """Raises InputError if the model to start from has no usable tokenizer."""
    preflight.renderer(run.config.sft.init)


def check_room(run: Run) -> None:
    """Raises InputError if the cluster will never have room for the workers."""
    from cai_ray.train.runtime.group import check_resources

    check_resources(run, run.config.sft)
