"""The table of model families: what works with which architecture.

`make test-families` finds it with tiny random models (examine.py), and fails where the table that ships differs from
what was found. `--check` reads it (train/checks/families.py), and docs/models.md shows it (page.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from cai_ray.stages import stages_that

PLACE = Path(__file__).with_name("families.json")

_TRAINING = stages_that("trains")
STEPS = ("engine", *_TRAINING, *(f"{name}_lora" for name in _TRAINING))
"""What is tried with a family: an engine that generates, and each training stage with all weights and with LoRA."""

LONGROPE = " with LongRoPE"


class StepResult(NamedTuple):
    """What was found about one step of a family."""

    status: Literal["works", "refused", "untested"]
    why: str = ""
    """The reason why it is refused; or, if it works with some settings alone, why it does not with the others."""
    needs: Mapping[str, Any] = {}
    """Settings of `engine` without which it does not work. `max_model_len` may name a field of config.json."""


UNTESTED = StepResult("untested")


class Family(NamedTuple):
    """A row of the table."""

    models: str
    """Well-known models of this architecture."""
    results: Mapping[str, StepResult]
    """By step; steps that are missing are untested."""


@cache
def families() -> dict[str, Family]:
    """The table that ships, by architecture (`architecture_of`)."""
    return {name: from_json(row) for name, row in json.loads(PLACE.read_text(encoding="utf-8")).items()}


def result_of(architecture: str, step: str) -> StepResult:
    """What is known about a step of an architecture."""
    family = families().get(architecture)
    return family.results.get(step, UNTESTED) if family else UNTESTED


def architecture_of(config: Mapping[str, Any]) -> str | None:
    """The name of a model's row, from its config.json; None if that names no architecture.

    It is the class in `architectures`. A model with LongRoPE has a row of its own: vLLM and transformers choose its
    factors in different ways.
    """
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        return None
    return names[0] + (LONGROPE if "longrope" in _rope_types(config) else "")


def _rope_types(config: Mapping[str, Any]) -> set[str]:
    """Kinds of rotary positions that a configuration names, in any of the forms in which they are written."""
    kinds: set[str] = set()
    for key in ("rope_scaling", "rope_parameters", "text_config"):
        inner = config.get(key)
        parts = (
            [inner, *inner.values()] if isinstance(inner, Mapping) else []
        )  # perhaps one for each kind of layer
        for part in (part for part in parts if isinstance(part, Mapping)):
            kinds |= {str(part[name]) for name in ("rope_type", "type") if name in part}
            kinds |= _rope_types(part)
    return kinds


def from_json(row: Mapping[str, Any]) -> Family:
    """A row from the table's file."""
    results = {}
    for step, cell in row["steps"].items():
        if isinstance(cell, str):
            results[step] = StepResult(cell)  # type: ignore[arg-type]
        elif "refused" in cell:
            results[step] = StepResult("refused", cell["refused"])
        else:
            results[step] = StepResult("works", cell["otherwise"], cell["needs"])
    return Family(row["models"], results)


def to_json(family: Family) -> dict[str, Any]:
    """A row as the table's file holds it."""
    cells: dict[str, Any] = {}
    for step in STEPS:
        found = family.results.get(step, UNTESTED)
        if found.status == "refused":
            cells[step] = {"refused": found.why}
        elif found.needs:
            cells[step] = {"needs": dict(found.needs), "otherwise": found.why}
        else:
            cells[step] = found.status
    return {"models": family.models, "steps": cells}
