"""Joins the Ray cluster, or starts one on this machine. Whether it is large enough is checked in placement.py."""

from __future__ import annotations

import logging
import os
from typing import Any

from cai_ray.compat.ray_core import metrics_port_option
from cai_ray.compat.ray_start import start_local, wait_longer
from cai_ray.config.engine import EngineConfig
from cai_ray.config.run import RunConfig
from cai_ray.errors import InputError, Unavailable

# One thread per process: several processes that spin on the same two cores are 4 to 20 times slower.
WORKER_ENV = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "DS_ACCELERATOR": "cpu",
    # vLLM compiles its scoring code at the first request. On CPU this costs seconds per process and gains nothing.
    "TORCH_COMPILE_DISABLE": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
}


START_ATTEMPTS = 2
"""How often Ray is started on this machine before it counts as too busy."""


def connect(config: RunConfig, metrics_port: int | None = None) -> None:
    """Connects to the configured cluster, the job's own, or a new local one; a second call does nothing.

    Raises:
        InputError: no cluster answers at the configured address.
        Unavailable: this machine is too busy to start Ray.
    """
    # Ray's notices go to its log files. What a person should read on stderr is ours.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    address = cluster_address(config)
    if address is None:
        wait_longer()
    import ray

    if ray.is_initialized():
        return
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address:
        try:
            ray.init(address=address, runtime_env={"env_vars": worker_env(config)}, **options)
        except (ConnectionError, ValueError) as e:
            raise InputError(
                f"ray.address={address}: no cluster answers there ({str(e).splitlines()[0]})"
            ) from e
    elif not start_local(
        START_ATTEMPTS,
        # Logical CPUs are bookkeeping here: Ray Data's own actors ask for one each, while the machine's cores
        # are shared by whoever has work.
        num_cpus=config.ray.cpus or max(16, os.cpu_count() or 1),
        include_dashboard=False,
        runtime_env={"env_vars": worker_env(config)},
        object_store_memory=512 << 20,
        **metrics_port_option(metrics_port),
        **options,
    ):
        load, cores = os.getloadavg()[0], os.cpu_count() or 1
        raise Unavailable(
            f"Ray did not start in time, in {START_ATTEMPTS} attempts: this machine is busy (load average {load:.0f} "
            f"on {cores} {'core' if cores == 1 else 'cores'}); run the same command again when it has less to do"
        )


def cluster_address(config: RunConfig) -> str | None:
    """The address of an existing cluster; None if a local one is to be started."""
    return config.ray.address or os.environ.get("RAY_ADDRESS") or None


def worker_env(config: RunConfig) -> dict[str, str]:
    """Environment variables of every worker process."""
    return engine_env(config.engine)


def engine_env(engine: EngineConfig) -> dict[str, str]:
    """Environment variables of a process that holds an engine."""
    env = dict(WORKER_ENV)
    if on_gpu(engine):
        del env["DS_ACCELERATOR"], env["TORCH_COMPILE_DISABLE"]
    return env


def uses_gpu(config: RunConfig) -> bool:
    """Whether engines and training run on GPUs: as configured, by default if this machine has one."""
    return on_gpu(config.engine)


def on_gpu(engine: EngineConfig) -> bool:
    """Whether an engine runs on GPUs: as configured, by default if this machine has one."""
    if engine.kind == "openai":
        return False
    if engine.device == "auto":
        import torch

        return torch.cuda.is_available()
    return engine.device == "gpu"


def disconnect() -> None:
    import ray

    if ray.is_initialized():
        ray.shutdown()
