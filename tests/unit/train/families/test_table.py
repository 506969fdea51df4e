"""The table of model families that ships, and the page that shows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cai_ray.train.families.page import markdown
from cai_ray.train.families.table import (
    PLACE,
    STEPS,
    UNTESTED,
    architecture_of,
    families,
    from_json,
    result_of,
    to_json,
)
from tests.families import members

ROOT = Path(__file__).parents[4]
ROWS: dict[str, Any] = json.loads(PLACE.read_text(encoding="utf-8"))


def test_the_page_is_fresh() -> None:
    written = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert written == markdown(), "renew it: cai-ray config models > docs/models.md"


def test_the_table_has_a_row_for_each_family_that_is_tried() -> None:
    assert list(ROWS) == list(members.MEMBERS)
    assert {name: row["models"] for name, row in ROWS.items()} == {
        name: member.models for name, member in members.MEMBERS.items()
    }


@pytest.mark.parametrize("name", ROWS)
def test_every_row_is_whole_and_every_refusal_has_its_reason(name: str) -> None:
    family = from_json(ROWS[name])
    assert set(family.results) == set(STEPS) and to_json(family) == ROWS[name]
    for found in family.results.values():
        assert bool(found.why) == (found.status == "refused" or bool(found.needs))
        assert "/tmp" not in found.why and "\n" not in found.why


def test_the_embedded_model_is_of_a_family_that_works() -> None:
    assert all(
        found.status == "works" and not found.needs
        for found in families()["LlamaForCausalLM"].results.values()
    )


def test_what_is_not_in_the_table_is_untested() -> None:
    assert result_of("NonesuchForCausalLM", "ppo") == result_of("LlamaForCausalLM", "nonesuch") == UNTESTED


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"architectures": ["Phi3ForCausalLM"], "rope_scaling": None}, "Phi3ForCausalLM"),
        (
            {"architectures": ["Phi3ForCausalLM"], "rope_scaling": {"type": "longrope"}},
            "Phi3ForCausalLM with LongRoPE",
        ),
        (
            {"architectures": ["Phi3ForCausalLM"], "rope_parameters": {"rope_type": "longrope"}},
            "Phi3ForCausalLM with LongRoPE",
        ),
        (
            {"architectures": ["X"], "text_config": {"rope_parameters": {"full": {"rope_type": "longrope"}}}},
            "X with LongRoPE",
        ),
        (
            {"architectures": ["LlamaForCausalLM"], "rope_scaling": {"rope_type": "llama3"}},
            "LlamaForCausalLM",
        ),
        ({"architectures": []}, None),
        ({"architectures": None}, None),
        ({"architectures": "LlamaForCausalLM"}, None),
        ({}, None),
    ],
)
def test_the_row_of_a_model(config: dict[str, Any], name: str | None) -> None:
    assert architecture_of(config) == name
