"""Two texts as one, word by word."""

from __future__ import annotations

import re
from difflib import SequenceMatcher
from typing import Literal, NamedTuple

MOST = 1500
"""Words of the longest text that is compared; a longer one is shown as it is."""


class Span(NamedTuple):
    text: str
    change: Literal["", "removed", "added"] = ""


def diff(before: str | None, after: str | None) -> list[Span]:
    """The later text in pieces, with what was removed and what was added."""
    old, new = (re.findall(r"\S+\s*|\s+", text or "") for text in (before, after))
    if max(len(old), len(new)) > MOST:
        return [Span(after or "")]
    pieces = []
    matcher = SequenceMatcher(None, [w.strip() for w in old], [w.strip() for w in new], autojunk=False)
    for kind, i, j, k, m in matcher.get_opcodes():
        removed, added = "".join(old[i:j]), "".join(new[k:m])
        if kind == "equal":
            pieces.append(Span(added))
        else:
            pieces += [Span(removed, "removed")] * bool(removed) + [Span(added, "added")] * bool(added)
    return pieces
