"""From YAML and overrides to a checked configuration."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from cai_ray.config.run import RunConfig
from cai_ray.config.section import S, Section
from cai_ray.errors import InputError


def load_config(path: str | Path, overrides: list[str] | None = None, **top: Any) -> RunConfig:
    """Reads a configuration; relative paths in it stay relative to the working directory.

    Args:
        overrides: `a.b=value` items, values read as YAML.
        top: top-level values that win over both (the command line's own options); None is ignored.

    Raises:
        InputError: the file is missing or unreadable, a key is unknown, or a value is out of range.
    """
    path = find_config(path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise InputError(f"{path}: cannot be read ({' '.join(str(e).split())}); give a YAML file") from e
    if not isinstance(data, dict):
        raise InputError(f"{path}: a mapping of settings is needed")
    for item in overrides or []:
        set_value(data, item)
    data.update({k: v for k, v in top.items() if v is not None})
    return validate(data, str(path))


def validate(data: dict[str, Any], where: str) -> RunConfig:
    return validate_as(RunConfig, data, where)


def validate_as(kind: type[S], data: dict[str, Any], where: str) -> S:
    """Settings from plain data.

    Raises:
        InputError: a key is unknown, or a value is out of range.
    """
    try:
        return kind.model_validate(data)
    except ValidationError as e:
        first = e.errors()[0]
        key = ".".join(str(x) for x in first["loc"])
        if first["type"] == "extra_forbidden":
            raise InputError(f"{where}: unknown key {key!r}; {_nearest(kind, first['loc'])}") from e
        message = first["msg"].removeprefix("Value error, ")
        got = "" if first["type"] in ("missing", "value_error") else f" (got {first['input']!r})"
        raise InputError(f"{where}: {f'{key}: ' if key else ''}{message}{got}") from e


def find_config(path: str | Path) -> Path:
    """A path as given, or the name of a configuration that ships with the package."""
    given = Path(path)
    if given.exists():
        return given
    shipped = Path(__file__).parents[1] / "configs"
    for candidate in (shipped / given.name, shipped / f"{given.name}.yaml"):
        if len(given.parts) == 1 and candidate.exists():
            return candidate
    raise InputError(f"{given}: no such file; give a configuration in YAML (see jobs/configs)")


def set_value(data: dict[str, Any], item: str) -> None:
    key, equals, value = item.partition("=")
    if not equals or not key:
        raise InputError(f"--set {item}: write it as key=value, for example ppo.kl_coef=0.1")
    *parents, last = key.split(".")
    node = data
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise InputError(f"--set {item}: {parent!r} has no settings of its own")
        node = child
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as e:
        raise InputError(f"--set {item}: the value is no YAML") from e
    # YAML 1.1 reads 1e-4 as text: people mean a number.
    if isinstance(parsed, str):
        with suppress(ValueError):
            parsed = float(parsed)
    node[last] = parsed


def _nearest(kind: type[Section], loc: tuple[int | str, ...]) -> str:
    """Names the known key that is most like an unknown one, or the same key one section further in."""
    from difflib import get_close_matches

    model: Any = kind
    for part in loc[:-1]:
        if isinstance(part, int):
            continue
        model = _section_at(model, part)
        if model is None:
            return "remove it"
    last = str(loc[-1])
    inner = [
        key for key in model.model_fields if last in getattr(_section_at(model, key), "model_fields", ())
    ]
    near = [f"{key}.{last}" for key in inner] or get_close_matches(last, list(model.model_fields), n=1)
    return f"did you mean {near[0]!r}?" if near else "known keys: " + ", ".join(model.model_fields)


def _section_at(model: type[BaseModel], key: str) -> type[BaseModel] | None:
    """The section that a key of another section holds."""
    field = model.model_fields.get(key)
    options = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
    return next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
