"""Reads template sets from YAML."""

from __future__ import annotations

from pathlib import Path

import yaml
from pydantic import ValidationError

from cai_ray.errors import InputError
from cai_ray.prompts.check import check_templates
from cai_ray.prompts.templates import TemplateSet


def load_templates(name: str | Path) -> TemplateSet:
    """Reads a template set by path, or by the name of one that ships with the package.

    Raises:
        InputError: the file does not exist or is not valid, or a step misses what it needs.
    """
    shipped = Path(__file__).parents[1] / "templates"
    path = Path(name)
    if not path.exists():
        path = shipped / f"{name}.yaml"
    if not path.exists():
        names = ", ".join(sorted(p.stem for p in shipped.glob("*.yaml")))
        raise InputError(f"template set {name}: no such file; give a path, or one of: {names}")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        if isinstance(data, dict) and "extends" in data:
            base = load_templates(str(data.pop("extends")))
            data = base.model_dump() | data
        templates = TemplateSet.model_validate(data)
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(str(x) for x in first["loc"])
        raise InputError(
            f"template set {path}: {where}: {first['msg']}; see cai_ray/templates/general.yaml"
        ) from e
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as e:
        raise InputError(f"template set {path}: cannot be read ({' '.join(str(e).split())})") from e
    check_templates(templates, path)
    return templates
