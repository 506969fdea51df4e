"""The configurations under jobs/ are valid, and what they name in the repository is there."""

from __future__ import annotations

from pathlib import Path

import pytest

from cai_ray import constitution
from cai_ray.config.load import load_config

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("path", sorted((ROOT / "jobs" / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_a_configuration_is_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load_config(path, [])
    assert config.document.enabled and config.name == path.stem.removesuffix("-8gpu")


@pytest.mark.parametrize(
    "path", sorted((ROOT / "jobs" / "constitutions").glob("*.yaml")), ids=lambda p: p.stem
)
def test_a_constitution_is_valid_and_names_its_sources(path: Path) -> None:
    document = constitution.load(str(path))
    assert document.name == path.stem and all(principle.source for principle in document.principles)
