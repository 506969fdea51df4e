"""A trainer without the helpers that a local cluster does not need.

ray 2.60.0: TorchTrainer starts three actors of 120 MB each. One watches for the preemption of nodes, one removes the
placement group of a controller that died, one distributes datasets. On a cluster that is ours alone and ends with this
process, nodes are not preempted, nothing outlives the driver, and we pass no dataset. The second also asks the
dashboard, which such a cluster does not have, and delays the end of every run by 12 s. The first has an environment
variable; for the others the only way is the private list of callbacks.
"""

from __future__ import annotations

import os
from typing import Any

_NEEDLESS = ("PlacementGroupCleanerCallback", "DatasetsCallback")


def local_trainer_class() -> Any:
    """TorchTrainer for a cluster that this process started and that ends with it."""
    from ray.train.torch import TorchTrainer

    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")

    class LocalTrainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            return [c for c in super()._create_default_callbacks() if type(c).__name__ not in _NEEDLESS]

    return LocalTrainer
