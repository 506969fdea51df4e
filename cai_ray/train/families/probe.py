"""`--check --probe`: takes small copies of a run's models through the steps that its stages need."""

from __future__ import annotations

from collections.abc import Callable, Collection
from tempfile import TemporaryDirectory
from typing import Literal

from cai_ray.cluster.connect import uses_gpu
from cai_ray.errors import InputError
from cai_ray.prompts.load import load_templates
from cai_ray.storage.run import Run
from cai_ray.train.checks.families import Use, uses
from cai_ray.train.families.examine import Case, engine_of_a_copy, examine
from cai_ray.train.families.table import STEPS


def probe(run: Run, stages: Collection[str], say: Callable[[str], None]) -> None:
    """Tries every model of the run as a two-layer random copy with its own tokenizer.

    Args:
        say: gets a line for each step of each model.

    Raises:
        InputError: no copy of a model can be made, or a step that a stage needs does not work with it.
    """
    from cai_ray.train.families.miniature import save_miniature

    by_model: dict[str, list[Use]] = {}
    for use in uses(run, stages):
        by_model.setdefault(run.model(use.model), []).append(use)
    problems = []
    for model, of_model in by_model.items():
        needed = {use.step for use in of_model} | {"engine"}
        stage_of = {use.step: use.stage for use in of_model}
        say(f"probe: a small random copy of {model}")
        with TemporaryDirectory() as folder:
            save_miniature(model, folder)
            found = examine(
                _case(run, of_model[0], folder),
                [step for step in STEPS if step in needed],
                lambda step, why: say(f"probe: {_name(step)} {'works' if why is None else f'fails: {why}'}"),
            )
        problems += [
            f"{of_model[0].setting} {model}: {stage_of.get(step, step)} does not work with a small copy of it ({why})"
            for step, why in found.items()
            if why is not None
        ]
    if problems:
        more = f" and {len(problems) - 1} more, see above" if len(problems) > 1 else ""
        raise InputError(f"{problems[0]}{more}; give another model, or other settings")


def _case(run: Run, use: Use, folder: str) -> Case:
    config = run.config
    section = config.ppo if config.method == "ppo" else config.dpo
    template = load_templates(run.resolve_model(use.model).templates).chat_template
    dtype: Literal["float32", "bfloat16"] = "bfloat16" if section.dtype == "bfloat16" else "float32"
    return Case(folder, engine_of_a_copy(use.engine), dtype, template, uses_gpu(config))


def _name(step: str) -> str:
    stage, _, lora = step.partition("_")
    return f"{stage} with LoRA" if lora else stage
