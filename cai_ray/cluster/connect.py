"""Joins the Ray cluster, or starts one on this machine. Whether it is large enough is checked in placement.py."""

from __future__ import annotations

import logging
import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from cai_ray.cluster.object_store import object_store_bytes
from cai_ray.cluster.threads import Crowd, use_threads
from cai_ray.compat.ray_core import metrics_port_option
from cai_ray.compat.ray_start import start_local, wait_longer
from cai_ray.config.engine import EngineConfig
from cai_ray.config.run import RunConfig
from cai_ray.errors import InputError, Unavailable

WORKER_ENV = {
    # What computes takes more (threads.py). Several processes that spin on the same two cores are 4 to 20 times slower.
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
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


_CPU_ONLY = ("DS_ACCELERATOR", "TORCH_COMPILE_DISABLE")

START_ATTEMPTS = 2
"""How often Ray is started on this machine before it counts as too busy."""


def connect(config: RunConfig, metrics_port: int | None = None, env: Mapping[str, str] | None = None) -> None:
    """Connects to the configured cluster, the job's own, or a new local one; a second call does nothing.

    Args:
        env: environment variables of the worker processes, instead of those of `worker_env`.

    Raises:
        InputError: no cluster answers at the configured address, or it could not start a worker.
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
    env = dict(worker_env(config) if env is None else env)
    if address:
        check_shell_path(address)
        try:
            ray.init(address=address, runtime_env={"env_vars": env}, **options)
        except (ConnectionError, ValueError) as e:
            raise InputError(
                f"ray.address={address}: no cluster answers there ({str(e).splitlines()[0]})"
            ) from e
        return
    # Workers inherit the environment that Ray is started with. A runtime environment would start each of them through
    # one more process, and through a shell.
    with environment(env):
        started = start_local(
            START_ATTEMPTS,
            # Logical CPUs are bookkeeping here: Ray Data's own actors ask for one each, while the machine's cores
            # are shared by whoever has work.
            num_cpus=config.ray.cpus or max(16, os.cpu_count() or 1),
            include_dashboard=False,
            runtime_env=quoted_interpreter(),
            object_store_memory=object_store_bytes(config),
            **metrics_port_option(metrics_port),
            **options,
        )
    if not started:
        load, cores = os.getloadavg()[0], os.cpu_count() or 1
        raise Unavailable(
            f"Ray did not start in time, in {START_ATTEMPTS} attempts: this machine is busy (load average {load:.0f} "
            f"on {cores} {'core' if cores == 1 else 'cores'}); run the same command again when it has less to do"
        )


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Sets environment variables of this process within the block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def quoted_interpreter() -> dict[str, str] | None:
    """The runtime environment of a local cluster: none, unless a shell would break this interpreter's path.

    Ray's own libraries give some of their actors runtime environments, and the workers of these are started through a
    shell, in whose command line the path of Python has no quotes (ray 2.60.0).
    """
    quoted = shlex.quote(sys.executable)
    return None if quoted == sys.executable else {"py_executable": quoted}


def check_shell_path(address: str) -> None:
    """Checks that an existing cluster can start workers with a runtime environment (see `quoted_interpreter`).

    Raises:
        InputError: the path of Python, which is the same on its nodes as here, has a character that a shell reads.
    """
    if not address.startswith("ray://") and (found := re.search(r"[^\w@%+=:,./~-]", sys.executable)):
        raise InputError(
            f"ray.address={address}: Ray cannot start workers with {sys.executable}, because its path has "
            f"{found[0]!r} in it; install cai_ray in a folder without such characters"
        )


def cluster_address(config: RunConfig) -> str | None:
    """The address of an existing cluster; None if a local one is to be started."""
    return config.ray.address or os.environ.get("RAY_ADDRESS") or None


def worker_env(config: RunConfig) -> dict[str, str]:
    """Environment variables of every worker process."""
    return process_env(uses_gpu(config))


def process_env(gpu: bool) -> dict[str, str]:
    """Environment variables of a process that holds an engine or a trainer."""
    return {name: value for name, value in WORKER_ENV.items() if not (gpu and name in _CPU_ONLY)}


def prepare_engine(engine: EngineConfig, gpu: bool, crowd: Crowd | None = None) -> None:
    """Prepares this process to hold an engine. Call it before vllm is imported.

    Its environment is that of all workers, which the device of the run's own engine decided.

    Args:
        crowd: who computes in the stage; None if the process has its node to itself.
    """
    for name in _CPU_ONLY:
        if gpu:
            os.environ.pop(name, None)
        else:
            os.environ[name] = WORKER_ENV[name]
    if engine.threads == "auto" and gpu:
        use_threads(1)  # the GPU does all of the work
    else:
        use_threads(engine.threads, crowd, engine.span)


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
