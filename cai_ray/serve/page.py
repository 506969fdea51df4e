"""The page at `/`: one file, without anything from elsewhere."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path

_HERE = Path(__file__).parent
_SCRIPT = (_HERE / "page.js").read_text(encoding="utf-8")
_STYLE = (_HERE / "page.css").read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


# The one script and the one style sheet, by their hashes; requests go to this server alone.
POLICY = (
    f"default-src 'none'; script-src {_hash(_SCRIPT)}; style-src {_hash(_STYLE)}; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@cache
def html(no_auth: bool = False) -> str:
    """The page, which asks for a token unless the server does without."""
    page = (_HERE / "page.html").read_text(encoding="utf-8")
    page = page.replace("/*token*/", "none" if no_auth else "needed")
    return page.replace("/*style*/", _STYLE).replace("/*script*/", _SCRIPT)
