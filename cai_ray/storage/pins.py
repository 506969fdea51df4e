"""One commit for everything that a run takes from the Hugging Face hub.

A configuration names models and datasets by branch or tag, which move. Before a run's first stage they are replaced by
the commits that they stand for then. run.json keeps these commits, and every later start takes them from there.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any, NamedTuple

from cai_ray.config.judge import PromptedModel
from cai_ray.config.ppo import JUDGE
from cai_ray.config.run import RunConfig
from cai_ray.config.section import COMPARED_BY, S, Section, marks
from cai_ray.errors import InputError
from cai_ray.stages import ROLES
from cai_ray.storage import hub
from cai_ray.storage.files import exists, read_object
from cai_ray.storage.run import Run

COMMITS = "commits"
"""The key in run.json: the commit of each model and dataset, by its name in the configuration."""
_NOT_OF_THE_HUB = (*ROLES, JUDGE, "town")


class Pinned(NamedTuple):
    """A configuration whose models and datasets of the hub are named by commit."""

    config: RunConfig
    commits: dict[str, str]
    """The commits by the names that stood in the configuration."""


def pin(config: RunConfig, models: bool = True) -> Pinned:
    """Names everything of the hub by commit: the one in run.json, or else the current one.

    Args:
        models: False leaves models as they are, where they are to be seen on another machine alone.

    Raises:
        InputError: a model or dataset is not on the hub, or cannot be reached.
    """
    run, commits = Run(config), {}
    with suppress(InputError):  # it is damaged, and will be written again
        commits = dict((read_object(run.path("run.json"), "") or {}).get(COMMITS) or {})
    return Pinned(pin_section(config, commits, models), commits)


def pin_section(section: S, commits: dict[str, str], models: bool = True) -> S:
    """The same for one section and those in it.

    Args:
        commits: those that are known; others are added.
    """
    changes: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        value, kind = getattr(section, name), marks(field).get(COMPARED_BY)
        if isinstance(value, Section):
            changes[name] = pin_section(value, commits, models)
        elif isinstance(value, tuple) and any(isinstance(part, Section) for part in value):
            changes[name] = tuple(pin_section(part, commits, models) for part in value)
        elif isinstance(value, str) and (repo := _named(section, kind, value, models)):
            changes[name] = str(_pin(repo, commits))
    return section.model_copy(update={k: v for k, v in changes.items() if v != getattr(section, k)})


def _named(section: Section, kind: str | None, value: str, models: bool) -> hub.Repo | None:
    """The hub's repository that a setting names; None if it names none."""
    if kind == "files" and value.startswith("hf://"):
        return hub.parse_dataset(value)
    served = isinstance(section, PromptedModel) and section.engine and section.engine.kind == "openai"
    if kind != "model" or not models or served or value in _NOT_OF_THE_HUB or "://" in value or exists(value):
        return None
    return hub.parse_model(value)


def _pin(repo: hub.Repo, commits: dict[str, str]) -> hub.Repo:
    if repo.pinned:
        return repo
    name = str(repo.whole)
    if name not in commits:
        commits[name] = str(hub.pin(repo).revision)
    return repo._replace(revision=commits[name])
