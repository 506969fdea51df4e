"""Takes a model folder through all steps of the table, whatever becomes of one of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Literal, NamedTuple

from cai_ray.cluster.connect import process_env
from cai_ray.config.engine import EngineConfig
from cai_ray.train.families.process import Remote, StepError
from cai_ray.train.families.table import STEPS

STEPS_FACTORY = "cai_ray.train.families.steps:Steps"
STEP_TIMEOUT_S = 300.0
"""The most seconds that one step may take, the start of an engine included."""


class Case(NamedTuple):
    """A folder to take through the steps, and how."""

    folder: str
    engine: EngineConfig
    dtype: Literal["float32", "bfloat16"]
    """Precision of training and of PPO's engine."""
    chat_template: str | None = None
    gpu: bool = False


def engine_of_a_copy(engine: EngineConfig) -> EngineConfig:
    """An engine's settings for a small copy of its model: one device, few sequences, and room for its context."""
    one = {"tensor_parallel": 1, "pipeline_parallel": 1, "max_num_seqs": 8, "kv_cache_mb": 512}
    return engine.model_copy(update={**one, "quantization": None})


def examine(
    case: Case, steps: Sequence[str] = STEPS, say: Callable[[str, str | None], None] = lambda step, why: None
) -> dict[str, str | None]:
    """Tries the steps one after the other, in a process of its own, which is begun again when a step crashes it.

    Args:
        say: called after each step with its name and the reason why it does not work, or None.

    Returns:
        By step, the reason why it does not work; None if it works.
    """
    found: dict[str, str | None] = {}
    left = list(steps)
    while left:
        try:
            env = process_env(case.gpu)
            process = Remote(STEPS_FACTORY, (case,), STEP_TIMEOUT_S, env)
        except StepError as e:
            for step in left:
                found[step] = str(e)
                say(step, str(e))
            break
        with closing(process):
            while left and process.usable:
                step = left.pop(0)
                found[step] = _try(process, step, found)
                say(step, found[step])
    return found


def _try(process: Remote, step: str, found: dict[str, str | None]) -> str | None:
    if step.startswith("ppo") and (why := found.get("engine")):
        return f"the engine does not work: {why}"
    try:
        process.call("run", step)
    except StepError as e:
        return str(e)
    return None
