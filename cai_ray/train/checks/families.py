"""What the table of model families says of a run's models, before any work."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from cai_ray.cluster.connect import uses_gpu
from cai_ray.config.engine import EngineConfig
from cai_ray.errors import InputError
from cai_ray.stages import ROLES, STAGES
from cai_ray.storage.models import model_config
from cai_ray.storage.run import Run
from cai_ray.train.families.table import UNTESTED, StepResult, architecture_of, result_of

ROOM = "docs/models.md lists what works"


class Use(NamedTuple):
    """A stage that needs a model of a family that can take a step of the table."""

    stage: str
    step: str
    setting: str
    """The setting that names the model."""
    model: str
    """A role, folder or id, as `Run.locate` takes it."""
    engine: EngineConfig
    """The engine that the step has."""


def check_families(run: Run, stages: Collection[str], given: Mapping[str, Any] | None = None) -> list[str]:
    """Checks that the families of the run's models can take the stages that are about to run.

    Args:
        given: the fields of the base model's config.json, if the models are not on this machine.

    Returns:
        A line for each model of a family that nobody has tried in these stages.

    Raises:
        InputError: a stage does not work with the family of its model, or not with these settings.
    """
    untested: dict[tuple[str, str, str], dict[str, None]] = {}
    configs: dict[str, dict[str, Any] | None] = {}
    for use in uses(run, stages):
        place = run.locate(use.model)
        if place not in configs:
            configs[place] = model_config(place) if given is None else _described(given, use.model)
        config = configs[place]
        architecture = architecture_of(config) if config else None
        if config is None or architecture is None:
            continue
        if STAGES[use.stage].kind == "trains" and (method := quantised(config)):
            raise InputError(
                f"{use.setting} {place}: its weights are quantised ({method}), and {use.stage} trains whole ones; "
                "give the folder of the model that was quantised"
            )
        found = _result(run, use, architecture)
        if found.status == "refused":
            raise InputError(
                f"{use.setting} {place}: {use.stage} does not work with {architecture} ({found.why}); "
                f"{_remedy(run, use, architecture)}; {ROOM}"
            )
        if missing := unmet(found.needs, use.engine, config, uses_gpu(run.config)):
            key = (
                "ppo.dtype" if use.stage == "ppo" and "dtype" in missing else f"engine.{next(iter(missing))}"
            )
            raise InputError(
                f"{use.setting} {place}: {use.stage} works with {architecture} only with {key}="
                f"{_shown(next(iter(missing.values())))} (otherwise: {found.why}); set that; {ROOM}"
            )
        if found.status == "untested":
            untested.setdefault((use.setting, place, architecture), {})[use.stage] = None
    return [
        f"warning: {setting} {place}: {architecture} is untested in {', '.join(of_model)}; --check --probe takes a "
        "small copy of it through all steps, in a minute or two"
        for (setting, place, architecture), of_model in untested.items()
    ]


def uses(run: Run, stages: Collection[str]) -> Iterator[Use]:
    """What the stages that are about to run do with models, in the order of the stages."""
    config = run.config
    asked = {
        "redteam": [config.redteam.model],
        "revise": ["base"],
        "compare": ["sl"],
        "evaluate": ["base", "sl"],
    }
    for stage in (name for name in STAGES if name in stages):
        if STAGES[stage].kind == "trains":
            section = getattr(config, stage)
            model = run.starts_from(getattr(section, "init", "sl"))
            setting = _setting(f"{stage}.init" if hasattr(section, "init") else "sft.init", model)
            step = f"{stage}_lora" if section.lora else stage
            yield Use(stage, step, setting, model, config.rollout_engine)
        elif config.engine.kind == "vllm":
            for model in map(run.starts_from, asked.get(stage, [])):
                yield Use(stage, "engine", _setting("sft.init", model), model, config.engine)
        for key, served in _prompted(run, stage):
            resolved = run.resolve_model(served)
            if resolved.engine.kind == "vllm":
                model = run.starts_from(served.model)
                yield Use(stage, "engine", _setting(f"{key}.model", model), model, resolved.engine)


def quantised(config: Mapping[str, Any]) -> str | None:
    """How a model's weights are quantised, from its config.json; None if they are not."""
    method = config.get("quantization_config")
    return str(method.get("quant_method", "quantization_config")) if isinstance(method, Mapping) else None


def unmet(
    needs: Mapping[str, Any], engine: EngineConfig, config: Mapping[str, Any], gpu: bool
) -> dict[str, Any]:
    """The settings among `needs` that an engine does not have, with the values that it should have."""
    missing: dict[str, Any] = {}
    for key, value in needs.items():
        if key == "dtype":
            if engine.dtype != value and not (engine.dtype == "auto" and gpu):
                missing[key] = value
        elif key == "max_model_len":
            most = value if isinstance(value, int) else number_in(config, value)
            if most and (engine.max_model_len is None or engine.max_model_len > most):
                missing[key] = most
        elif any(engine.extra.get(name) != wanted for name, wanted in value.items()):
            missing[key] = value
    return missing


def _described(given: Mapping[str, Any], model: str) -> dict[str, Any] | None:
    """config.json of the base model as `check.model` gives it; None for other models."""
    if model != "base":
        return None
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

    named = CLASSES.get(given.get("model_type"))
    return {"architectures": [named], **given} if named else dict(given)


def _result(run: Run, use: Use, architecture: str) -> StepResult:
    """What the table says; on GPUs, engines that do not work on CPUs are untested: the table was found on CPUs."""
    found = result_of(architecture, use.step)
    if uses_gpu(run.config) and use.step in ("engine", "ppo", "ppo_lora"):
        engine = result_of(architecture, "engine")
        if engine.status == "refused" or "extra" in engine.needs:
            return UNTESTED
    return found


def _remedy(run: Run, use: Use, architecture: str) -> str:
    """What to change: the least that the table says works."""

    def works(step: str) -> bool:
        return result_of(architecture, step).status == "works"

    if use.step == "engine" or use.stage == "sft":
        if use.step == "sft_lora" and works("sft"):
            return "train all weights (without sft.lora)"
        return "give a model of another family"
    if use.step.endswith("_lora") and works(use.stage):
        return f"train all weights (without {use.stage}.lora)"
    if use.stage == "rm" and works("ppo"):
        other = ", or use method: dpo" if works("dpo") else ""
        return f"set rm.init to a model of a family that can be a reward model{other}"
    if use.stage in ("rm", "ppo") and works("dpo_lora" if run.config.dpo.lora else "dpo"):
        return "use method: dpo"
    if not use.step.endswith("_lora") and works(f"{use.stage}_lora"):
        return f"train an adapter ({use.stage}.lora)"
    return "give a model of another family"


def _prompted(run: Run, stage: str) -> Iterator[tuple[str, Any]]:
    """The settings of models that a stage asks beside the policy."""
    config = run.config
    if stage == "revise" and config.revise.reviser:
        yield "revise.reviser", config.revise.reviser
    if stage == "label":
        yield "label.judge", config.label.judge
    if stage == "ppo" and config.ppo.watch.asks_judge:
        yield "ppo.watch.judge" if config.ppo.watch.judge else "label.judge", config.watch_judge
    if stage == "evaluate":
        yield "evaluate.judge" if config.evaluate.judge else "label.judge", config.evaluation_judge


def _setting(key: str, model: str) -> str:
    """The setting to name in a message: that of the run's own model, unless another one is given."""
    return "model" if model in ROLES else key


def number_in(config: Mapping[str, Any], name: str) -> int | None:
    """A number of a config.json by its name, wherever it stands in it."""
    if isinstance(config.get(name), int):
        return int(config[name])
    inner = (value for value in config.values() if isinstance(value, Mapping))
    return next((found for value in inner if (found := number_in(value, name))), None)


def _shown(value: Any) -> str:
    import json

    return value if isinstance(value, str) else json.dumps(value)
