"""Capability of each policy, on tasks of lm-evaluation-harness (Gao et al. 2021, doi 10.5281/zenodo.5371628).

The library is the extra `lm-eval`. It loads the models with transformers and without the run's template set, so its
results are comparable with published ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from cai_ray.cluster.connect import prepare_engine, uses_gpu
from cai_ray.cluster.holder import holding
from cai_ray.config.evaluation import HarnessConfig
from cai_ray.errors import InputError
from cai_ray.storage import files
from cai_ray.storage.run import Run


def check(config: HarnessConfig | None) -> None:
    """Checks that the library and the tasks are there.

    Raises:
        InputError: the library is not installed, or knows no such task.
    """
    if config is None:
        return
    if find_spec("lm_eval") is None:
        raise InputError(
            "evaluate.harness: lm-evaluation-harness is not installed; pip install 'cai_ray[lm-eval]', or leave "
            "`harness` out"
        )
    if config.include_path and not files.list_files(config.include_path, ".yaml", recursive=True):
        raise InputError(
            f"evaluate.harness.include_path={config.include_path}: holds no task files (.yaml); name their folder"
        )
    available = set(_tasks(config).all_tasks)
    for task in config.tasks:
        if task not in available:
            raise InputError(
                f"evaluate.harness.tasks: lm-evaluation-harness has no task {task!r}; `lm-eval ls tasks` lists its "
                "own, and `include_path` names a folder with others"
            )


def evaluate(run: Run, policies: Sequence[str]) -> dict[str, Any]:
    """Each policy's {task: {metric: {value, stderr}}}, measured one after the other, each in a process of its own."""
    if run.config.evaluate.harness is None:
        return {}
    import ray

    task = ray.remote(num_cpus=1, num_gpus=1 if uses_gpu(run.config) else 0, max_calls=1)(_metered)
    return {policy: ray.get(task.remote(run, policy)) for policy in policies}


def _metered(run: Run, policy: str) -> dict[str, Any]:
    with holding():
        prepare_engine(run.config.engine, uses_gpu(run.config))
        return _measure(run, policy)


def _measure(run: Run, policy: str) -> dict[str, Any]:
    import lm_eval

    harness, gpu, dtype = run.config.evaluate.harness, uses_gpu(run.config), run.config.engine.dtype
    assert harness is not None
    seeds = dict.fromkeys(
        ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), run.config.seed
    )
    measured = lm_eval.simple_evaluate(
        model="hf",
        model_args={
            "pretrained": run.model(policy),
            "dtype": "float32" if dtype == "auto" and not gpu else dtype,
            "trust_remote_code": False,
        },
        tasks=list(harness.tasks),
        task_manager=_tasks(harness),
        num_fewshot=harness.num_fewshot,
        limit=harness.limit,
        batch_size=harness.batch_size,
        device="cuda" if gpu else "cpu",
        log_samples=False,
        **seeds,
    )
    return {task: results(values) for task, values in measured["results"].items()}


def results(values: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """A task's metrics from the library's keys, such as `acc,none` and `acc_stderr,none`.

    The name of a filter stays part of the metric's name, unless it is `none`. A standard error of "N/A" is None.
    """
    metrics = {}
    for key, value in values.items():
        metric, comma, chain = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            name = metric if chain == "none" else key
            metrics[name] = {
                "value": _number(value),
                "stderr": _number(values.get(f"{metric}_stderr,{chain}")),
            }
    return metrics


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _tasks(config: HarnessConfig) -> Any:
    from lm_eval.tasks import TaskManager

    folder = config.include_path
    return TaskManager(include_path=files.local_folder(folder) if folder else None)
