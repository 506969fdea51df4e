"""The page at `/`: one file, with nothing from elsewhere."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from cai_ray.report.templating import digest, inline, render

_HERE = Path(__file__).parent
_SCRIPT, _STYLE = inline(_HERE / "page.js"), inline(_HERE / "page.css")

# The one script and the one style sheet, by their hashes; requests go to this server alone.
POLICY = (
    f"default-src 'none'; script-src '{digest(_SCRIPT)}'; style-src '{digest(_STYLE)}'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@cache
def html(no_auth: bool = False) -> str:
    """The page, which asks for a token unless the server does without."""
    token = "none" if no_auth else "needed"
    return render(_HERE / "templates", "page.html", token=token, style=_STYLE, script=_SCRIPT)
