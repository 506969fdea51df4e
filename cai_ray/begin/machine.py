"""What this machine has, as far as a first run depends on it."""

from __future__ import annotations

import os
from typing import NamedTuple

GIB = 2**30


class Machine(NamedTuple):
    """Cores, memory and GPUs of this machine."""

    cores: int
    memory_gib: float
    gpus: int
    gpu_gib: float
    """Memory of each GPU; 0 without one."""

    def __str__(self) -> str:
        cores = f"{self.cores} core{'s' if self.cores > 1 else ''}, {self.memory_gib:.0f} GiB"
        return f"{cores}, {self.gpus} GPUs of {self.gpu_gib:.0f} GiB" if self.gpus else f"{cores}, no GPU"


def this_machine() -> Machine:
    """This machine, as this process may use it."""
    import psutil
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gib = torch.cuda.get_device_properties(0).total_memory / GIB if gpus else 0.0
    return Machine(len(os.sched_getaffinity(0)), psutil.virtual_memory().total / GIB, gpus, gib)
