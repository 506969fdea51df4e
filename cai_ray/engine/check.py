"""Checks an engine's settings against the device that it runs on."""

from __future__ import annotations

from cai_ray.cluster.connect import on_gpu
from cai_ray.config.engine import EngineConfig
from cai_ray.errors import InputError


def check_engine(engine: EngineConfig, key: str = "engine") -> None:
    """Checks the settings of an engine against the device that it runs on.

    Args:
        key: the setting that errors name.

    Raises:
        InputError: vLLM cannot run with these settings on CPU.
    """
    layers_split, odd_block = engine.pipeline_parallel > 1, bool(engine.block_size and engine.block_size % 32)
    if not (layers_split or odd_block) or on_gpu(engine):  # asked last: it imports torch
        return
    if layers_split:
        raise InputError(
            f"{key}.pipeline_parallel={engine.pipeline_parallel}: vLLM splits layers over GPUs only; "
            "leave it out on CPU"
        )
    raise InputError(
        f"{key}.block_size={engine.block_size}: on CPU vLLM takes multiples of 32; use 32, or leave it out"
    )
