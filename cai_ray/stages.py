"""The stages of a run and the models that they make: the one table that every other module reads."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

Method = Literal["ppo", "dpo"]
Policy = Literal["base", "sl", "rl"]
"""Roles of models that answer prompts."""
Kind = Literal["generates", "trains", "reads"]
"""`generates` asks engines, on generation nodes; `trains` runs a training group; `reads` needs no Ray cluster."""


class Stage(NamedTuple):
    """One step of a run, which writes one folder of the run directory."""

    help: str
    """One line for the command of the same name."""
    module: str
    """The module of `run(run)`, which makes the stage and returns what its manifest says."""
    kind: Kind
    needs: tuple[str, ...] = ()
    """Stages whose artifacts it reads. Those of the other method are left out of a run."""
    reads: tuple[str, ...] = ()
    """Sections of the configuration that change its result."""
    method: Method | None = None
    """The method that has this stage; None: both have it."""
    before: bool = False
    """The stage prepares inputs of a run and is no part of it: `cai-ray run` leaves it out."""
    training_data: bool = False
    """It reads prompts or comparisons of people that are trained on."""
    checks: str = ""
    """The module of `check(run, preflight)` and `check_room(run)`: a light one of its own if `module` imports torch.
    Empty: there is nothing to check."""


class Role(NamedTuple):
    """A model of a run, by what it is for."""

    title: str
    stages: tuple[str, ...] = ()
    """The stages that make it, of which a run has one at most. None: the model is given."""


STAGES: dict[str, Stage] = {
    "redteam": Stage(
        "more red-team prompts, written by a model after the run's own",
        "cai_ray.generate.redteam",
        "generates",
        checks="cai_ray.generate.redteam",
        reads=(
            "redteam",
            "prompts",
            "evaluate",
            "model",
            "engine",
            "templates",
            "template_args",
            "chat_template",
            "thinking",
        ),
        before=True,
    ),
    "revise": Stage(
        "responses, critiques and revisions of the helpful model",
        "cai_ray.generate.revise",
        "generates",
        checks="cai_ray.generate.revise",
        reads=(
            "revise",
            "prompts",
            "model",
            "engine",
            "templates",
            "template_args",
            "chat_template",
            "thinking",
            "constitution",
        ),
        training_data=True,
    ),
    "sft": Stage(
        "the SL-CAI policy, fine-tuned on the revisions",
        "cai_ray.train.sft",
        "trains",
        checks="cai_ray.train.checks.sft",
        needs=("revise",),
        reads=("sft", "model", "templates", "template_args", "chat_template"),
    ),
    "compare": Stage(
        "pairs of samples of the SL-CAI policy",
        "cai_ray.generate.compare",
        "generates",
        checks="cai_ray.generate.compare",
        needs=("sft",),
        reads=("compare", "prompts", "engine", "templates", "template_args", "chat_template", "thinking"),
        training_data=True,
    ),
    "label": Stage(
        "the feedback model's soft preferences",
        "cai_ray.generate.label",
        "generates",
        checks="cai_ray.generate.label",
        needs=("compare",),
        reads=("label", "model", "templates", "template_args", "chat_template", "constitution"),
    ),
    "rm": Stage(
        "the reward model, on AI labels and human helpfulness comparisons",
        "cai_ray.train.rm",
        "trains",
        checks="cai_ray.train.checks.rm",
        needs=("sft", "label"),
        reads=("rm", "model", "templates", "template_args", "chat_template"),
        method="ppo",
        training_data=True,
    ),
    "ppo": Stage(
        "the RL-CAI policy",
        "cai_ray.train.ppo.stage",
        "trains",
        checks="cai_ray.train.checks.ppo",
        needs=("sft", "rm"),
        reads=("ppo", "prompts", "engine", "templates", "template_args", "chat_template"),
        method="ppo",
        training_data=True,
    ),
    "dpo": Stage(
        "the policy by direct preference optimisation, in the place of rm and ppo (method: dpo)",
        "cai_ray.train.dpo",
        "trains",
        checks="cai_ray.train.checks.dpo",
        needs=("sft", "label"),
        reads=("dpo", "templates", "template_args", "chat_template"),
        method="dpo",
        training_data=True,
    ),
    "evaluate": Stage(
        "base, SL-CAI and final policy on held-out prompts",
        "cai_ray.evaluate.stage",
        "generates",
        checks="cai_ray.evaluate.stage",
        needs=("sft", "label", "rm", "ppo", "dpo"),
        reads=(
            "evaluate",
            "model",
            "engine",
            "templates",
            "template_args",
            "chat_template",
            "thinking",
            "constitution",
        ),
    ),
    "report": Stage(
        "report.json and one HTML page",
        "cai_ray.report.stage",
        "reads",
        needs=("revise", "sft", "compare", "label", "rm", "ppo", "dpo", "evaluate"),
    ),
}
"""By name, in the order in which a run makes them."""

ROLES: dict[str, Role] = {
    "base": Role("base"),
    "sl": Role("SL-CAI", ("sft",)),
    "rm": Role("reward model", ("rm",)),
    "rl": Role("RL-CAI", ("ppo", "dpo")),
}
"""By the name that settings and options use, in the order in which the models come about."""

POLICIES: tuple[str, ...] = get_args(Policy)


def has_stage(method: str, name: str) -> bool:
    """Says whether a run of this method can have the stage."""
    return STAGES[name].method in (None, method)


def stages_of(method: str) -> list[str]:
    """The stages of a run of this method, in order."""
    return [name for name, stage in STAGES.items() if has_stage(method, name) and not stage.before]


def needs_of(name: str, method: str) -> list[str]:
    """The stages whose artifacts a stage reads in a run of this method."""
    return [need for need in STAGES[name].needs if has_stage(method, need)]


def upstream_of(name: str, method: str) -> list[str]:
    """All stages that a stage rests on, directly or not, in order; the stage itself is left out."""
    reached: set[str] = set()
    waiting = needs_of(name, method)
    while waiting:
        if (stage := waiting.pop()) not in reached:
            reached.add(stage)
            waiting += needs_of(stage, method)
    return [stage for stage in STAGES if stage in reached]


def stages_that(*kinds: Kind) -> list[str]:
    """The stages of these kinds, of both methods, in order."""
    return [name for name, stage in STAGES.items() if stage.kind in kinds]


def maker_of(role: str, method: str) -> str | None:
    """The stage that makes the model of a role in a run of this method, or None if no stage does."""
    return next((stage for stage in ROLES[role].stages if has_stage(method, stage)), None)


def roles_before(name: str) -> list[str]:
    """The roles whose models exist when a stage begins."""
    order = list(STAGES)
    return [
        role
        for role, made in ROLES.items()
        if all(order.index(stage) < order.index(name) for stage in made.stages)
    ]


def models_of(method: str) -> dict[str, str]:
    """The roles whose models a run of this method trains, each with the stage that makes it."""
    return {role: stage for role in ROLES if (stage := maker_of(role, method))}
