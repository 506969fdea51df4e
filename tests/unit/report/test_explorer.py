"""The report's browser and principle pages, and two runs side by side: on handmade artifacts."""

import json
from pathlib import Path
from typing import Any

import pytest

from cai_ray.config.load import load_config
from cai_ray.errors import InputError
from cai_ray.evaluate.transcripts import choose
from cai_ray.report import explorer, html, side_by_side, stage
from cai_ray.report.templating import render
from cai_ray.report.turns import Passage
from cai_ray.report.word_diff import Span, diff
from cai_ray.storage import files
from cai_ray.storage.arrow import to_table
from cai_ray.storage.records import Judgement, Label, Revision
from cai_ray.storage.run import Run
from tests.unit.report.test_report import EVIL, make_run

TEMPLATES = Path(html.__file__).parent / "templates"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_run(load_config("errand-town", out=str(tmp_path_factory.mktemp("explorer") / "run")))


def part(page: str, start: str, end: str) -> str:
    """What stands between two tags."""
    assert page.count(start) == 1
    return page.partition(start)[2].partition(end)[0]


@pytest.mark.parametrize(
    ("before", "after", "shown"),
    [
        ("sure , go on .", "sorry , go on .", "<del>sure </del><ins>sorry </ins>, go on ."),
        ("the same", "the same", "the same"),
        ("", "new words", "<ins>new words</ins>"),
        ("a b", None, "<del>a b</del>"),
        ("a <b> c", "a <i> c", "a <del>&lt;b&gt; </del><ins>&lt;i&gt; </ins>c"),
        (" a\n\n b", " a\n b", " a\n b"),
    ],
)
def test_a_revision_is_shown_word_by_word(before: str, after: str | None, shown: str) -> None:
    turn = Passage("revision 1", diff(before, after), note="privacy")
    page = render(TEMPLATES, "sections/transcripts.html", data=[{"head": "", "turns": [turn]}])
    assert f'<div dir="auto"><em>privacy</em>{shown}</div>' in page


def test_very_long_texts_are_not_compared() -> None:
    assert diff("a " * 2000, "b " * 2000) == [Span("b " * 2000)]


def test_the_sample_is_even_over_families_and_the_same_in_any_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explorer, "ROWS", 8)

    def rows(order: int) -> list[dict[str, Any]]:
        made = [
            {"id": f"{(i * 7919) % 1000:04d}", "prompt_id": f"p{i}", "messages": [{"role": "user", "content": f"{i}"}],
             "kind": "red_team", "family": "common" if i % 10 else "rare", "response": "x", "steps": [], "error": None}
            for i in range(200)
        ]  # fmt: skip
        return [
            *made[::order],
            {**made[0], "id": "0000f", "error": "failed"},
            {**made[0], "id": "0000h", "kind": "helpful"},
        ]

    found = []
    for order in (1, -1):
        run = Run(load_config("errand-town", out=str(tmp_path / f"{order}")))
        run.write_rows("revise", to_table(rows(order), Revision))
        found.append(explorer.read(run, run.config.document))
    assert found[0] == found[1]
    families = [e["family"] for e in found[0]["revisions"]]
    assert (families.count("rare"), families.count("common")) == (4, 4)
    rare = sorted(row["id"] for row in rows(1)[:200] if row["family"] == "rare")[:4]
    assert [e["id"] for e in found[0]["revisions"] if e["family"] == "rare"] == rare
    assert found[0]["total"] == {"revisions": 200, "answers": 0}


def test_a_page_has_an_end(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    monkeypatch.setattr(explorer, "CHARACTERS", 600)
    found = explorer.read(run, run.constitution())
    assert 1 <= len(found["revisions"]) < 10 and found["total"]["revisions"] == 24


def test_entries_say_what_came_of_them(run: Run) -> None:
    found = explorer.read(run, run.constitution())
    by_id = {e["id"]: e for e in found["revisions"]}
    assert (by_id["r005"]["outcome"], by_id["r005"]["changed_by"]) == ("revised", ["privacy"])
    assert (by_id["r000"]["outcome"], by_id["r000"]["changed_by"]) == ("unchanged", [])
    answer = next(e for e in found["answers"] if e["kind"] == "red_team")
    assert list(answer["policies"])[:3] == ["base", "sl", "rl"]
    assert answer["outcome"] in ("harmful", "refused", "malformed")


def test_the_page_holds_every_filter_and_nothing_runs_that_a_model_wrote(run: Run) -> None:
    report = stage.build(run)
    whole = html.page(report)
    page = part(whole, '<section id="browser">', "</section>")
    assert page.count("<details") == 24 + 60
    for name in ("kind", "family", "principle", "outcome"):
        assert f'<select name="{name}"' in page and f"data-{name}=" in page
    assert "alert(1)</script>" not in whole and "&lt;script&gt;alert(1)" in whole
    assert whole.count("<script>") == 1 and EVIL not in whole
    json.dumps(report, allow_nan=False)


def test_what_was_kept_and_what_failed_is_among_the_alarms(tmp_path: Path) -> None:
    run = make_run(load_config("errand-town", out=str(tmp_path / "run")))
    for name in ("label", "rm"):
        manifest = {**(run.manifest(name) or {}), "seconds": 1.0, "kept": {"revise": ["constitution"]}}
        files.write_json(run.path(name, "manifest.json"), {**manifest, "errors": 2, "rows_in": 9})
    report = stage.build(run)
    assert "revise was kept though constitution had changed; made after it: label, rm" in report["alarms"]
    assert "label: 2 of 9 rows failed" in report["alarms"]
    assert "had changed; made after it" in html.page(report)


def test_each_principle_has_a_page_with_what_it_did(run: Run) -> None:
    report = stage.build(run)
    page = part(html.page(report), '<section id="constitution">', "</section>")
    for principle in report["constitution"]["principles"]:
        assert f'id="principle-{principle["id"]}"' in page
    assert report["constitution"]["principles"][1]["id"] == "privacy"
    privacy = part(page, '<details class="card principle" id="principle-privacy">', "</details>")
    assert "4 of 6" in privacy and "<ins>sorry</ins>" in privacy
    assert "never drawn" not in page or "never voted" in page
    del report["attribution"]
    page = part(html.page(report), '<section id="constitution">', "</section>")
    assert "Respect what others own" in page, "a report without an attribution"


def test_the_examples_of_choose_do_not_depend_on_order(run: Run) -> None:
    rows = run.rows("revise")
    assert choose(rows, 5) == choose(rows[::-1], 5) and len(choose(rows, 5)) == 5


def test_two_runs_side_by_side(tmp_path: Path) -> None:
    a = make_run(load_config("errand-town", out=str(tmp_path / "a")))
    b = make_run(load_config("errand-town", out=str(tmp_path / "b")))
    with pytest.raises(InputError, match="evaluate is not complete"):
        side_by_side.compare(Run(a.config.model_copy(update={"out": str(tmp_path / "none")})), b)
    voted = [
        {
            "id": f"c{i}", "messages": [], "response_a": "a", "response_b": "b", "p_a_raw": 0.8, "error": None,
            "votes": [{"principle_id": "privacy", "p_a": 0.8}],
        }
        for i in range(4)
    ]  # fmt: skip
    a.write_rows("label", to_table(voted, Label))
    b.write_rows("label", to_table([{**voted[0], "p_a_raw": 0.4}, *voted[1:3]], Label))
    rows = b.rows("evaluate")
    for row in rows:
        if row["model"] == "rl" and row["kind"] == "red_team":
            row["harmful"] = row["family"] == "privacy"
    b.write_rows("evaluate", to_table(rows, Judgement))
    document = b.constitution()
    edited = document.model_copy(
        update={
            "principles": tuple(
                p.model_copy(update={"weight": 2.0}) if p.id == "privacy" else p for p in document.principles
            )
        }
    )
    files.write_bytes(b.path("constitution.yaml"), edited.to_yaml().encode())
    found = side_by_side.compare(a, b)
    harm = found["behaviour"]["rl"]["harm_by_family.privacy"]
    assert (
        harm["b"] == 1.0
        and harm["value"] == pytest.approx(1.0 - harm["a"])
        and harm["low"] <= harm["value"] <= harm["high"]
    )
    assert found["behaviour"]["base"]["harm"]["value"] == 0.0
    assert (
        found["principles"]["privacy"]["change"] == "changed"
        and found["principles"]["safety"]["change"] is None
    )
    privacy = found["principles"]["privacy"]
    assert privacy["a"] == {"drawn": 6, "changed": 4, "decisive": 4, "overruled": 0}
    assert privacy["b"] == {"drawn": 6, "changed": 4, "decisive": 3, "overruled": 1}
    labels = found["labels"]
    assert labels["same_side"] == pytest.approx(2 / 3) and labels["difference"] == pytest.approx(0.4 / 3)
    assert (labels["shared"], labels["only_a"], labels["only_b"]) == (3, 1, 0)
    text = "\n".join(side_by_side.lines(found))
    page = side_by_side.page(found)
    for said in ("privacy", "harm", "over-refusal", "RL-CAI", "66.7% on the same side"):
        assert said in text and said in page
