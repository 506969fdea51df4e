"""Joins or starts the Ray cluster; whether it is large enough is placement.py's."""

from __future__ import annotations

import logging
import os
from typing import Any

from cai_ray.compat.ray_core import metrics_port_option
from cai_ray.config.engine import EngineConfig
from cai_ray.config.run import RunConfig
from cai_ray.errors import InputError

# One thread per process: several processes that spin on the same two cores are 4 to 20 times slower.
WORKER_ENV = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "DS_ACCELERATOR": "cpu",
    # vLLM compiles its scoring code at the first request; on CPU that costs seconds per process and gains nothing.
    "TORCH_COMPILE_DISABLE": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
}


def connect(config: RunConfig, metrics_port: int | None = None) -> None:
    """Connects to the configured cluster, the job's own, or a new local one; a second call does nothing."""
    # Ray's own notices go to its log files; what a person should read on stderr is ours.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray

    if ray.is_initialized():
        return
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    address = joined(config)
    if address:
        try:
            ray.init(address=address, runtime_env={"env_vars": worker_env(config)}, **options)
        except (ConnectionError, ValueError) as e:
            raise InputError(
                f"ray.address={address}: no cluster answers there ({str(e).splitlines()[0]})"
            ) from e
    else:
        # Logical CPUs are bookkeeping here: Ray Data's own actors ask for one each, while the machine's cores
        # are shared by whoever has work.
        ray.init(
            address="local",  # not whatever cluster somebody else has started on this machine
            num_cpus=config.ray.cpus or max(16, os.cpu_count() or 1),
            include_dashboard=False,
            runtime_env={"env_vars": worker_env(config)},
            object_store_memory=512 << 20,
            **metrics_port_option(metrics_port),
            **options,
        )


def joined(config: RunConfig) -> str | None:
    """The address of a cluster that somebody else has started; None where one is started here."""
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
