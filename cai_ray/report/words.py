"""Two texts as one, word by word, for the page."""

from __future__ import annotations

import re
from difflib import SequenceMatcher

from cai_ray.report.text import safe

MOST = 1500
"""Words of a text that is compared; a longer one is shown as it is."""


def diff(before: str | None, after: str | None) -> str:
    """The later text as HTML, with what has gone in `del` and what has come in `ins`."""
    old, new = (re.findall(r"\S+\s*|\s+", text or "") for text in (before, after))
    if max(len(old), len(new)) > MOST:
        return safe(after)
    out = []
    for kind, i, j, k, m in SequenceMatcher(
        None, [w.strip() for w in old], [w.strip() for w in new], autojunk=False
    ).get_opcodes():
        gone, come = safe("".join(old[i:j])), safe("".join(new[k:m]))
        if kind == "equal":
            out.append(come)
            continue
        out.append(f"<del>{gone}</del>" if gone else "")
        out.append(f"<ins>{come}</ins>" if come else "")
    return "".join(out)
