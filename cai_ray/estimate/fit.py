"""Checks that a run's stages fit in memory, and finds settings that would fit (`cai-ray run --check`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from cai_ray.cluster.connect import uses_gpu
from cai_ray.config.run import RunConfig
from cai_ray.errors import InputError
from cai_ray.estimate.memory import GIB, MemoryNeed, memory_needs
from cai_ray.estimate.shape import Shape, shape_of
from cai_ray.stages import STAGES

# Share of a GPU that vLLM takes.
_ENGINE_SHARE = 0.92
_NAMES = {"trainer": "training worker", "engine": "engine", "rollouts": "rollout engine"}


def memory_lines(config: RunConfig) -> list[str]:
    """The memory of every process as lines to print.

    Raises:
        InputError: a stage does not fit on the GPUs (or into this machine), or a model's config.json cannot be found.
    """
    gpu = uses_gpu(config)
    shapes = partial(shape_of, config)
    needs = memory_needs(config, shapes, gpu)
    base = shapes("base")
    lines = [
        f"{config.model}: {base.params / 1e9:.3g} B parameters, {base.layers} layers, context {base.context}"
    ]
    if gpu:
        lines += _gpu_lines(config, needs, shapes)
    else:
        lines += _cpu_lines(needs)
    return lines


def _gpu_lines(config: RunConfig, needs: list[MemoryNeed], shapes: Callable[[str], Shape]) -> list[str]:
    count, gib = _gpus(config)
    lines = []
    for need in needs:
        line = _line(need)
        if gib is not None:
            line += f" of {gib:.0f} GiB"
            if need.role != "trainer":
                line += f", {_sequences(need, shapes, config, gib)} sequences at once"
        lines.append(line)
    if count is None or gib is None:
        return [*lines, "set check.gpus and check.gpu_gib to compare this with the cluster's GPUs"]
    if problems := misfits(needs, count, gib):
        raise InputError(f"{problems[0]}; {_remedies(config, shapes, needs, count, gib)}")
    return [*lines, f"fits on {count} GPUs of {gib:.0f} GiB"]


def misfits(needs: list[MemoryNeed], gpus: int, gib: float) -> list[str]:
    """A line for each stage or process that does not fit on so many GPUs of so many GiB."""
    problems = []
    for stage in dict.fromkeys(n.stage for n in needs):
        of_stage = [n for n in needs if n.stage == stage]
        needed = sum(n.processes * n.gpus for n in of_stage)
        if needed > gpus:
            problems.append(f"{stage} needs {needed} GPUs, and there are {gpus}")
        for need in of_stage:
            room = gib * (_ENGINE_SHARE if need.role != "trainer" else 1.0)
            if need.total > room * GIB:
                parts = " + ".join(f"{k} {v / GIB:.1f}" for k, v in need.parts.items() if v >= 0.05 * GIB)
                problems.append(
                    f"{stage}: each {_NAMES[need.role]} needs {need.total / GIB:.1f} GiB ({parts}) on each GPU, "
                    f"and there are {room:.1f}"
                )
    return problems


def _remedies(
    config: RunConfig, shapes: Callable[[str], Shape], needs: list[MemoryNeed], gpus: int, gib: float
) -> str:
    """Which settings would fit, found by trying."""
    stage = next(
        n.stage for n in needs if misfits([n], gpus, gib) or misfits(_of_stage(needs, n.stage), gpus, gib)
    )
    fitting = []
    for section, values in _candidates(config, stage, gpus):
        changed = _changed(config, section, values)
        if changed and not misfits(_of_stage(memory_needs(changed, shapes, True), stage), gpus, gib):
            current = getattr(config, section).model_dump()
            new = {k: v for k, v in values.items() if current.get(k) != v}
            fitting.append(" ".join(f"{section}.{k}={json.dumps(v)}" for k, v in new.items()))
    return "what fits: " + ", or ".join(fitting) if fitting else "use a smaller model or larger GPUs"


def _candidates(config: RunConfig, stage: str, gpus: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Changes that may make a stage fit: a section of the configuration, and values in it."""
    if stage not in STAGES or STAGES[stage].kind != "trains":  # a judge or reviser has a part of its own
        yield from (
            ("engine", {"tensor_parallel": n, "max_actors": gpus // n}) for n in (2, 4, 8) if n <= gpus
        )
        return
    per_rollout_engine = config.engine.tensor_parallel if stage == "ppo" else 0
    for workers in range(1, gpus + 1):
        change: dict[str, Any] = {"workers": workers, "zero_stage": 3, "gradient_checkpointing": True}
        if per_rollout_engine:
            change["rollout_engines"] = (gpus - workers) // per_rollout_engine
        yield stage, change
    yield stage, {"zero_stage": 3, "gradient_checkpointing": True, "offload_optimizer": True}
    yield stage, {"lora": {"rank": 64}, "gradient_checkpointing": True}


def _of_stage(needs: list[MemoryNeed], stage: str) -> list[MemoryNeed]:
    return [n for n in needs if n.stage == stage]


def _changed(config: RunConfig, section: str, values: dict[str, Any]) -> RunConfig | None:
    data = config.model_dump()
    data[section].update(values)
    try:
        return RunConfig.model_validate(data)
    except ValueError:  # such as a batch that so many workers cannot share
        return None


def _gpus(config: RunConfig) -> tuple[int | None, float | None]:
    """Number and memory (GiB) of the GPUs: as configured, or this machine's."""
    count, gib = config.check.gpus, config.check.gpu_gib
    if count is None or gib is None:
        import torch

        if torch.cuda.is_available():
            count = count or torch.cuda.device_count()
            gib = gib or torch.cuda.get_device_properties(0).total_memory / GIB
    return count, gib


def _sequences(need: MemoryNeed, shapes: Callable[[str], Shape], config: RunConfig, gib: float) -> int:
    """Sequences of full length that the KV cache has room for."""
    room = gib * GIB * _ENGINE_SHARE - need.total
    return max(0, 1 + int(room / need.parts["kv cache"]))


def _cpu_lines(needs: list[MemoryNeed]) -> list[str]:
    import psutil

    available = psutil.virtual_memory().total
    lines = [_line(need) for need in needs]
    for stage in dict.fromkeys(n.stage for n in needs):
        total = sum(n.processes * n.total for n in needs if n.stage == stage)
        if total > available:
            raise InputError(
                f"{stage} needs {total / GIB:.1f} GiB, and this machine has {available / GIB:.1f}; "
                "use fewer workers or actors, a smaller micro_batch_tokens, or a smaller model"
            )
    return [*lines, f"fits into this machine's {available / GIB:.0f} GiB"]


def _line(need: MemoryNeed) -> str:
    parts = " + ".join(f"{name} {size / GIB:.1f}" for name, size in need.parts.items() if size >= 0.05 * GIB)
    spread = f" over {need.gpus} GPUs" if need.gpus > 1 else ""
    return f"{need.stage:9}{need.role:9}{need.processes:3} x{spread} {parts} = {need.total / GIB:.1f}"
