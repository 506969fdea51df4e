"""What Ray knows about this process and its start.

ray 2.60.0: only `worker.mode` says whether a process is a worker of Ray, and the runtime context does not document
it. The port of Ray's own metrics can only be set through an underscored argument of `ray.init`.
"""

from __future__ import annotations

from typing import Any


def is_worker() -> bool:
    """Says whether Ray started this process to run tasks or an actor; False in a driver and without Ray."""
    import ray

    return ray.is_initialized() and ray.get_runtime_context().worker.mode == ray.WORKER_MODE


def metrics_port_option(port: int | None) -> dict[str, Any]:
    """The argument of `ray.init` that sets the port of a local cluster's metrics; None lets Ray choose one."""
    return {"_metrics_export_port": port}
