"""The page at `/docs`: the OpenAPI schema as text for people, made here, since nothing is fetched from elsewhere."""

from __future__ import annotations

from html import escape
from typing import Any

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
code { font: 0.9em ui-monospace, monospace; }
details { margin: 0.25rem 0; }
dt { margin-top: 0.4rem; } dd { margin-left: 1.5rem; }
summary { cursor: pointer; }
"""


def html(schema: dict[str, Any]) -> str:
    """Routes with what they take and answer."""
    info, parts = schema["info"], [f"<p>{escape(schema['info']['description'])}</p>"]
    parts.append(
        "<p>Every route of <code>/v1</code> needs the header <code>Authorization: Bearer TOKEN</code>. The schema "
        "itself is at <code>/openapi.json</code>.</p>"
    )
    for path, methods in schema["paths"].items():
        for verb, route in methods.items():
            parts.append(f"<h2><code>{verb.upper()} {escape(path)}</code></h2>")
            parts.append(f"<p>{escape(route.get('description', ''))}</p>")
            body = _content(route.get("requestBody", {}))
            answer = _content(route["responses"].get("200", {}))
            parts += [
                _described(schema, title, s) for title, s in (("takes", body), ("answers", answer)) if s
            ]
    title = f"{escape(info['title'])} {escape(info['version'])}"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>'
        f"<body><h1>{title}</h1>{''.join(parts)}</body></html>"
    )


def _content(part: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = part.get("content", {}).get("application/json", {}).get("schema", {})
    return found


def _described(schema: dict[str, Any], title: str, of: dict[str, Any]) -> str:
    whole = _resolved(schema, of)
    if "anyOf" in whole:  # an answer, or several side by side
        whole = _resolved(schema, whole["anyOf"][0])
    fields = whole.get("properties", {})
    rows = "".join(_field(schema, name, f, name in whole.get("required", ())) for name, f in fields.items())
    return f"<details open><summary>{title}</summary><dl>{rows}</dl></details>" if rows else ""


def _field(schema: dict[str, Any], name: str, field: dict[str, Any], needed: bool) -> str:
    facts = [_kind(schema, field)]
    facts += (
        ["needed"]
        if needed
        else [f"default {field['default']!r}"]
        if field.get("default") is not None
        else []
    )
    bounds = {"minimum": "at least", "exclusiveMinimum": "more than", "maximum": "at most"}
    facts += [f"{word} {field[key]:g}" for key, word in bounds.items() if key in field]
    about = escape(field.get("description", "").replace("\n", " "))
    return f"<dt><code>{escape(name)}</code> ({escape(', '.join(facts))})</dt><dd>{about}</dd>"


def _kind(schema: dict[str, Any], field: dict[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_kind(schema, f) for f in field["anyOf"]))
    if "$ref" in field:
        return field["$ref"].rsplit("/", 1)[-1]
    if "enum" in field:
        return " | ".join(map(repr, field["enum"]))
    if field.get("type") == "array":
        return f"list of {_kind(schema, field.get('items', {}))}"
    return repr(field["const"]) if "const" in field else str(field.get("type", "any"))


def _resolved(schema: dict[str, Any], of: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in of:
        of = schema["components"]["schemas"][of["$ref"].rsplit("/", 1)[-1]]
    return of
