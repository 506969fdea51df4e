"""Starts Ray on this machine, also when the machine is busy.

ray 2.60.0: how long a start may take is set by environment variables of Ray's own configuration (ray_config_def.h and
`ray/_private/node.py`), which have no public interface. A start that takes too long raises exceptions of no class of
its own, so their texts are compared. The processes of a failed start stay, so they are ended here.
"""

from __future__ import annotations

import os
from typing import Any

WAITS = {
    # Until the head service has written its port, and then until it answers. Ray's default is 30 s.
    "RAY_gcs_server_port_wait_time_s": "90",
    # Until this node is registered. Ray's default is 10 s, tried for 30 s.
    "RAY_raylet_start_wait_time_s": "90",
    # Until the object store can be reached, one attempt a second. Ray's default is 10.
    "RAY_raylet_client_num_connect_attempts": "60",
}
"""Ray reads them while it is imported. A value that is set already stays."""

_TIMED_OUT = ("timed out during startup", "Timed out waiting for file", "Failed to start GCS")


def wait_longer() -> None:
    """Gives Ray more time to start on this machine. Call it before Ray is imported.

    A wrong address of an existing cluster would take longer to fail, so this is for local starts only.
    """
    for name, value in WAITS.items():
        os.environ.setdefault(name, value)


def start_local(attempts: int, **options: Any) -> bool:
    """Starts Ray on this machine, and tries again when a start took too long.

    Args:
        options: for `ray.init`.

    Returns:
        Whether Ray runs: False if every attempt took too long.
    """
    import psutil
    import ray

    this_process = psutil.Process()
    others = set(this_process.children())
    for _ in range(attempts):
        try:
            ray.init(
                address="local", **options
            )  # not whatever cluster somebody else has started on this machine
            return True
        except Exception as e:
            if not any(text in str(e) for text in _TIMED_OUT):
                raise
        ray.shutdown()
        for process in set(this_process.children()) - others:
            process.kill()
            process.wait()
    return False
