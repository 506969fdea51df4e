"""The page at `/` as a text: it stands alone, keeps to its own policy, and has the colours of the report."""

import re
from pathlib import Path

import pytest

import cai_ray
from cai_ray.serve import page

PACKAGE = Path(cai_ray.__file__).parent


def test_page_stands_alone_and_holds_to_its_policy() -> None:
    html = page.html()
    assert "/*" not in html.partition("<style>")[0] and "/*script*/" not in html
    assert not re.search(r"https?:|<link rel=.stylesheet|\ssrc=", html)
    assert not re.search(r"<[^>]*\s(on\w+|style)=", html.partition("<script>")[0])
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", html)
    assert "unsafe" not in page.POLICY and "default-src 'none'" in page.POLICY


@pytest.mark.parametrize(("no_auth", "token"), [(True, "none"), (False, "needed")])
def test_page_knows_whether_a_token_is_needed(no_auth: bool, token: str) -> None:
    assert f'data-token="{token}"' in page.html(no_auth)


def test_page_has_the_reports_colours() -> None:
    ours, report = (
        re.findall(r"--(\w+): (#\w+);", (PACKAGE / path).read_text(encoding="utf-8"))
        for path in ("serve/page.css", "report/style.css")
    )
    assert len(set(ours) & set(report)) == 18  # nine colours, light and dark
