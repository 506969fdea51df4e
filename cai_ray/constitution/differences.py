"""What an edit changed: two constitutions compared by principle, and their wording by word."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import SequenceMatcher
from typing import Any, Literal, NamedTuple

from cai_ray.constitution.document import Constitution, Principle

Kind = Literal["added", "removed", "changed", "described"]
WORDING = ("title", "text", "critique_request", "revision_request", "comparison", "source")


class Change(NamedTuple):
    principle: str
    what: Kind
    """`described`: only text that no model reads has changed (`Principle.sha` is the same)."""
    fields: dict[str, tuple[Any, Any]]
    """Each field that differs, before and after."""


def differences(before: Constitution, after: Constitution) -> list[Change]:
    """The changes in the order of `after`, then the removed principles. A principle is known by its id."""
    old = {p.id: p for p in before.principles}
    new = {p.id: p for p in after.principles}
    changes = []
    for name, p in new.items():
        if name not in old:
            changes.append(Change(name, "added", _fields(None, p)))
        elif fields := _fields(old[name], p):
            same = (old[name].sha, old[name].enabled) == (p.sha, p.enabled)
            changes.append(Change(name, "described" if same else "changed", fields))
    return changes + [Change(name, "removed", _fields(p, None)) for name, p in old.items() if name not in new]


def _fields(before: Principle | None, after: Principle | None) -> dict[str, tuple[Any, Any]]:
    old = before.model_dump(mode="json") if before else {}
    new = after.model_dump(mode="json") if after else {}
    return {
        name: (old.get(name), new.get(name))
        for name in Principle.model_fields
        if name != "id" and old.get(name) != new.get(name)
    }


def lines(changes: list[Change]) -> Iterator[str]:
    """The changes for a terminal: wording as `[-removed-]` and `{+added+}`, other fields as before -> after."""
    for change in changes:
        yield f"{change.principle}: {change.what}"
        for name, (before, after) in change.fields.items():
            if change.what == "changed" or change.what == "described":
                shown = words(before, after) if name in WORDING else f"{before!r} -> {after!r}"
                yield f"  {name}: {shown}"
            elif name in ("title", "text"):
                yield f"  {name}: {after if change.what == 'added' else before}"


def words(before: str, after: str) -> str:
    """A text with removed words as `[-…-]` and added ones as `{+…+}`."""
    old, new = before.split(), after.split()
    out = []
    for kind, i, j, k, m in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if kind == "equal":
            out += new[k:m]
            continue
        out += [f"[-{' '.join(old[i:j])}-]"] * (i < j) + [f"{{+{' '.join(new[k:m])}+}}"] * (k < m)
    return " ".join(out)
