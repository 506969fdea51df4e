"""The reference of all settings is complete, and is what the declarations say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cai_ray.config.load import load_config
from cai_ray.config.schema import json_schema, markdown

ROOT = Path(__file__).parents[3]
SCHEMA = json_schema()
OBJECTS = {"RunConfig": SCHEMA, **SCHEMA["$defs"]}


def test_the_reference_is_fresh() -> None:
    written = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert written == markdown(), "renew it: cai-ray config docs > docs/configuration.md"


@pytest.mark.parametrize("name", OBJECTS)
def test_every_setting_says_what_it_does(name: str) -> None:
    settings: dict[str, Any] = OBJECTS[name]["properties"]
    for key, setting in settings.items():
        text = setting.get("description", "")
        assert text.endswith("."), f"{name}.{key}: write a docstring of whole sentences"
        dangling = text.split()[0] in ("Of", "As", "By", "Whether", "For", "So")
        assert not dangling, f"{name}.{key}: {text!r} begins in the middle"
        assert setting["x-changes"] in ("result", "operational")


def test_the_schema_has_defaults_bounds_and_marks() -> None:
    sft = OBJECTS["SftConfig"]["properties"]
    assert sft["workers"] == {
        "default": 1,
        "description": "Training workers, each with one GPU if there are GPUs.",
        "exclusiveMinimum": 0,
        "type": "integer",
        "x-changes": "operational",
    }
    assert sft["dtype"]["enum"] == ["float32", "bfloat16", "auto"] and sft["dtype"]["x-changes"] == "result"
    assert sft["zero_stage"]["x-checkpoints"] == "layout" and sft["init"]["x-compared-by"] == "model"
    assert SCHEMA["required"] == ["name", "model", "constitution", "prompts"]


def test_every_setting_has_a_row_in_the_reference() -> None:
    keys = {key for settings in OBJECTS.values() for key in settings["properties"]}
    rows = {line.split("`")[1] for line in markdown().splitlines() if line.startswith("| `")}
    assert rows == keys
    assert set(load_config("errand-town").model_dump()) <= rows
