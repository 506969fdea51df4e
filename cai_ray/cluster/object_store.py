"""The size of a local cluster's object store: PPO sends its weights to the engines through it."""

from __future__ import annotations

import os

from cai_ray.config.run import RunConfig
from cai_ray.storage.models import weight_bytes
from cai_ray.storage.run import Run

LEAST = 512 << 20
"""Bytes that rows, prompts and small models need."""


def object_store_bytes(config: RunConfig) -> int:
    """The size that fits this run, within a third of the free memory and what /dev/shm has room for.

    Where even `LEAST` does not fit into /dev/shm, Ray puts the store on disk.
    """
    import psutil

    shared = os.statvfs("/dev/shm") if os.path.isdir("/dev/shm") else None
    room = min(
        psutil.virtual_memory().available // 3, shared.f_bavail * shared.f_frsize * 9 // 10 if shared else 0
    )
    return max(LEAST, min(room, LEAST + _sent_bytes(config)))


def _sent_bytes(config: RunConfig) -> int:
    """Most bytes of weights in the store at a time: one version, while the next one is sent."""
    if config.method != "ppo" or config.ppo.weight_sync != "ray":
        return 0
    run = Run(config)
    # A folder in bfloat16 becomes twice as large if it is sent in float32. The size of a model that is not here yet
    # is not known.
    largest = weight_bytes(run.locate("base"))
    return 1 << 62 if largest is None else 2 * 2 * largest
