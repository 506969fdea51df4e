"""The page at `/docs`: the OpenAPI schema as text for people, made here, since nothing is fetched from elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from cai_ray.report.templating import digest, inline, render

_HERE = Path(__file__).parent
_STYLE = inline(_HERE / "docs.css")
POLICY = (
    f"default-src 'none'; style-src '{digest(_STYLE)}'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
_BOUNDS = {"minimum": "at least", "exclusiveMinimum": "more than", "maximum": "at most"}


class Field(NamedTuple):
    name: str
    facts: list[str]
    description: str


def html(schema: dict[str, Any]) -> str:
    """Routes with what they take and answer."""
    routes = [
        {
            "verb": verb.upper(),
            "path": path,
            "description": route.get("description", ""),
            "takes": _fields(schema, _content(route.get("requestBody", {}))),
            "answers": _fields(schema, _content(route["responses"].get("200", {}))),
        }
        for path, methods in schema["paths"].items()
        for verb, route in methods.items()
    ]
    return render(_HERE / "templates", "docs.html", info=schema["info"], routes=routes, style=_STYLE)


def _content(part: dict[str, Any]) -> dict[str, Any]:
    """The schema of a JSON body; empty if there is none."""
    content: dict[str, Any] = part.get("content", {}).get("application/json", {}).get("schema", {})
    return content


def _fields(schema: dict[str, Any], of: dict[str, Any]) -> list[Field]:
    resolved = _resolved(schema, of)
    if "anyOf" in resolved:  # an answer, or several side by side
        resolved = _resolved(schema, resolved["anyOf"][0])
    required = resolved.get("required", ())
    return [
        Field(name, _facts(schema, field, name in required), field.get("description", "").replace("\n", " "))
        for name, field in resolved.get("properties", {}).items()
    ]


def _facts(schema: dict[str, Any], field: dict[str, Any], required: bool) -> list[str]:
    """The type of a field, whether it is needed, and its bounds."""
    facts = [_type(schema, field)]
    if required:
        facts.append("needed")
    elif field.get("default") is not None:
        facts.append(f"default {field['default']!r}")
    return facts + [f"{word} {field[key]:g}" for key, word in _BOUNDS.items() if key in field]


def _type(schema: dict[str, Any], field: dict[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_type(schema, f) for f in field["anyOf"]))
    if "$ref" in field:
        return field["$ref"].rsplit("/", 1)[-1]
    if "enum" in field:
        return " | ".join(map(repr, field["enum"]))
    if field.get("type") == "array":
        return f"list of {_type(schema, field.get('items', {}))}"
    return repr(field["const"]) if "const" in field else str(field.get("type", "any"))


def _resolved(schema: dict[str, Any], of: dict[str, Any]) -> dict[str, Any]:
    """A schema with its reference, if it is one, followed to the end."""
    while "$ref" in of:
        of = schema["components"]["schemas"][of["$ref"].rsplit("/", 1)[-1]]
    return of
