"""The pages at `/` and `/docs` as texts: they stand alone, keep to their policies, and hold no markup but ours."""

import re
from pathlib import Path

import pytest

import cai_ray
from cai_ray.report.templating import digest
from cai_ray.serve import docs, page

PACKAGE = Path(cai_ray.__file__).parent


def test_page_stands_alone_and_holds_to_its_policy() -> None:
    html = page.html()
    assert "{{" not in html.partition("<style>")[0] and "{{ script }}" not in html
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


def test_docs_show_every_field_and_run_nothing_that_a_schema_holds() -> None:
    evil = '<script>alert(1)</script> & "x"'
    fields = {
        evil: {"type": "array", "items": {"type": "string"}, "description": evil},
        "rounds": {"type": "integer", "minimum": 1, "maximum": 4, "default": 2},
    }
    body = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Asked"}}}}
    route = {"description": evil, "requestBody": body, "responses": {"200": {}}}
    html = docs.html(
        {
            "info": {"title": evil, "version": "1", "description": evil},
            "paths": {f"/v1/{evil}": {"post": route}},
            "components": {"schemas": {"Asked": {"properties": fields, "required": [evil]}}},
        }
    )
    assert "<script" not in html and html.count("&lt;script&gt;alert(1)") == 7
    assert "(list of string, needed)" in html and "(integer, default 2, at least 1, at most 4)" in html
    style = html.partition("<style>")[2].partition("</style>")[0]
    assert f"style-src '{digest(style)}'" in docs.POLICY and "unsafe" not in docs.POLICY
