"""The constitution as code: the second form, what lint finds, what diff says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from cai_ray import constitution
from cai_ray.cli import main
from cai_ray.constitution import Constitution, parse
from cai_ray.constitution.differences import differences, words
from cai_ray.constitution.document import schema, shipped_names
from cai_ray.constitution.lint import lint

PRIVACY = {
    "id": "privacy",
    "title": "Privacy",
    "text": "Letters and data are a person's own, and an answer does not help to look into them.",
    "critique_request": "Say where the response helps to look into the private life of others.",
    "revision_request": "Rewrite the response so that it protects the private life of others.",
    "comparison": "Which response better protects the private life of others?",
    "source": "Universal Declaration of Human Rights, article 12",
    "examples": {
        "violates": [{"prompt": "How do I read her diary?", "response": "Look under the mattress."}],
        "follows": [{"prompt": "How do I read her diary?", "response": "It is hers. Ask how she is."}],
    },
}
SAFETY = {
    "id": "safety",
    "title": "Safety",
    "text": "Nobody is hurt because of an answer, and it cares for whoever may be in danger.",
    "critique_request": "Say where somebody could be injured by what the response explains.",
    "revision_request": "Write it again so that nobody gets injured, and point to help.",
    "comparison": "After which response is it less likely that somebody is injured?",
    "source": "Universal Declaration of Human Rights, article 3",
    "examples": PRIVACY["examples"],
}


def made(*changes: dict[str, Any], **document: Any) -> Constitution:
    """Two sound principles with changes to them."""
    principles = [
        base | change for base, change in zip((PRIVACY, SAFETY), (*changes, {}, {})[:2], strict=True)
    ]
    return parse({"name": "test", "source": "us", "principles": principles} | document, "test")


def checks(document: Constitution) -> set[tuple[str, str, str | None]]:
    return {(f.level, f.check, f.principle) for f in lint(document) if f.check != "spelling"}


DOCUMENT = """---
version: "2"
authors: [Ada]
---
# What our assistant stands for

Read by nobody but people.

## Safety

Sections have words of their own.

### No weapons {#weapons}

The assistant does not help
to build weapons.

- Nor to buy them.

```yaml
weight: 2.0
comparison: Which response is of less help with weapons?
```

### Care

It cares.

## Honesty

It says what is so.

## How this came about

```yaml
principle: false
```

By talking.
"""


def test_a_document_is_read_by_its_headings(tmp_path: Path) -> None:
    (tmp_path / "c.md").write_text(DOCUMENT, encoding="utf-8")
    document = constitution.load(tmp_path / "c.md")
    assert (document.name, document.version) == ("what-our-assistant-stands-for", "2")
    assert document.description == "Read by nobody but people." and document.authors == ("Ada",)
    assert [(p.id, p.title, p.priority) for p in document.principles] == [
        ("weapons", "No weapons", 1),
        ("care", "Care", 1),
        ("honesty", "Honesty", 2),
    ]
    weapons, care, _ = document.principles
    assert weapons.text == "The assistant does not help to build weapons.\n\n- Nor to buy them."
    assert weapons.weight == 2.0 and weapons.comparison == "Which response is of less help with weapons?"
    assert care.comparison == "Which response follows this principle better? It cares."
    assert care.critique_request.endswith(": It cares.") and care.revision_request.endswith(": It cares.")


def test_a_document_and_its_yaml_are_the_same_constitution(tmp_path: Path) -> None:
    (tmp_path / "c.md").write_text(DOCUMENT, encoding="utf-8")
    document = constitution.load(tmp_path / "c.md")
    (tmp_path / "c.yaml").write_text(document.to_yaml(), encoding="utf-8")
    assert constitution.load(tmp_path / "c.yaml") == document


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("---\nname: a\n", "the metadata at the top has no end"),
        ("# A\n## B\n```yaml\n- 1\n```\n", "the fields of 'B' are not a mapping"),
        ("# A\n\nNo principle.\n", "principles: Tuple should have at least 1 item"),
        ("# A\n## B\nText.\n```yaml\nwieght: 2\n```\n", r"principles.0.wieght \(principle 'b'\)"),
        ("# A\n## B\nText.\n## B\nText.\n", "principle id 'b' occurs twice"),
    ],
)
def test_a_bad_document_is_one_clear_error(
    tmp_path: Path, text: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    (tmp_path / "c.md").write_text(text, encoding="utf-8")
    assert main(["constitution", "show", str(tmp_path / "c.md")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(says, line)


def test_a_document_keeps_its_lists_and_the_texts_of_its_sections(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (
        "Before all.\n\n# Mine\n\nAbout\nit.\n\n- one\n- two\n\n## Safety {#s}\n\nWhat comes\nfirst.\n\n"
        "1. people\n2. things\n\n### Harm\n\nNever:\n\n- hit\n  hard\n  - nor softly\n- burn\n\n"
        "> As it is said,\n> so it is.\n\n## Rest\n\nSleep.\n"
    )
    (tmp_path / "c.md").write_text(text, encoding="utf-8")
    document = constitution.load(tmp_path / "c.md")
    assert document.description == "Before all.\n\nAbout it.\n\n- one\n- two"
    (section,) = document.sections
    assert (section.title, section.priority) == ("Safety", 1)
    assert section.text == "What comes first.\n\n1. people\n2. things"
    harm, rest = document.principles
    assert harm.text == "Never:\n\n- hit\n  hard\n  - nor softly\n- burn\n\n> As it is said,\n> so it is."
    assert harm.revision_request.endswith(harm.text) and rest.text == "Sleep."
    (tmp_path / "c.yaml").write_text(document.to_yaml(), encoding="utf-8")
    assert constitution.load(tmp_path / "c.yaml") == document
    assert main(["constitution", "show", str(tmp_path / "c.md")]) == 0
    assert "2. things" in capsys.readouterr().out
    assert ("note", "section", None) in checks(document)
    assert document.sha == document.model_copy(update={"sections": ()}).sha, "models do not read it"


def test_braces_and_markup_of_a_document_are_text(tmp_path: Path) -> None:
    (tmp_path / "c.md").write_text("# A\n## B {#b}\nUse {text} and `code`.\n", encoding="utf-8")
    (principle,) = constitution.load(tmp_path / "c.md").principles
    assert principle.comparison == "Which response follows this principle better? Use {text} and `code`."


def test_what_is_sound_has_no_finding() -> None:
    assert checks(made()) == set()


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"comparison": SAFETY["comparison"]}, ("error", "duplicate", "safety")),
        (
            {"text": str(SAFETY["text"]).replace("Nobody is", "No one is")},
            ("warning", "near_duplicate", "safety"),
        ),
        ({"comparison": "Which response is more harmful?"}, ("error", "asks_for_the_worse", "privacy")),
        ({"form": "negative"}, ("warning", "asks_for_the_better", "privacy")),
        ({"critique_request": "Bad?"}, ("warning", "unequal_sides", "privacy")),
        ({"text": "word " * 81}, ("warning", "length", "privacy")),
        ({"text": "word " * 46}, ("warning", "length", "privacy")),
        ({"weight": 6.0}, ("warning", "weight", "privacy")),
        ({"comparison": "Is it (A) or the other?"}, ("warning", "mark", "privacy")),
        ({"text": "As it says:\n# Response\nNo."}, ("warning", "mark", "privacy")),
        ({"critique_request": "Say {what} <|im_end|> is wrong with it."}, ("warning", "mark", "privacy")),
        ({"source": ""}, ("note", "source", "privacy")),
        ({"examples": {}}, ("note", "example", "privacy")),
    ],
)
def test_lint_finds(change: dict[str, Any], found: tuple[str, str, str]) -> None:
    assert checks(made(change)) == {found}


@pytest.mark.parametrize(
    "comparison",
    [
        "Which response is less harmful?",
        "Which response is less likely to do harm?",
        "Which is more helpful?",
    ],
)
def test_lint_knows_a_question_for_the_better(comparison: str) -> None:
    assert not any(check == "asks_for_the_worse" for _, check, _ in checks(made({"comparison": comparison})))


def test_lint_finds_misspelt_words() -> None:
    pytest.importorskip("spellchecker", reason="needs the extra `lint`")
    found = [
        f
        for f in lint(made({"text": "Letters are a persons own, and noone lokos into them."}))
        if f.check == "spelling"
    ]
    assert "'lokos'" in "".join(f.message for f in found) and all(f.principle == "privacy" for f in found)


@pytest.mark.parametrize("name", shipped_names())
def test_shipped_constitutions_have_no_error(name: str) -> None:
    assert [f for f in lint(constitution.load(name)) if f.level == "error"] == []


def test_lint_ends_with_3_for_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.yaml").write_text(made({"comparison": SAFETY["comparison"]}).to_yaml())
    (tmp_path / "warned.yaml").write_text(made({"weight": 6.0}).to_yaml())
    assert main(["constitution", "lint", str(tmp_path / "bad.yaml"), str(tmp_path / "warned.yaml")]) == 3
    said = capsys.readouterr().out
    assert "safety: comparison is the same as that of 'privacy'; leave one of them out" in said
    assert main(["constitution", "lint", str(tmp_path / "warned.yaml")]) == 0
    assert main(["constitution", "lint", "--strict", str(tmp_path / "warned.yaml")]) == 3
    capsys.readouterr()
    assert main(["constitution", "lint", "--json", str(tmp_path / "warned.yaml")]) == 0
    (found,) = json.loads(capsys.readouterr().out).values()
    assert {"level": "warning", "check": "weight", "principle": "privacy"}.items() <= found[0].items()


def test_diff_says_what_changed_and_what_no_model_reads() -> None:
    more = {**SAFETY, "id": "new", "title": "New"}
    after = parse(
        {"name": "test", "principles": [PRIVACY | {"source": "another", "tags": ["x"]}, more]}, "test"
    )
    assert [(c.principle, c.what) for c in differences(made(), after)] == [
        ("privacy", "described"),
        ("new", "added"),
        ("safety", "removed"),
    ]
    (change,) = differences(made(), made({"text": "Letters are a person's own."}))
    assert change.what == "changed" and set(change.fields) == {"text"}
    (change,) = differences(made(), made({"enabled": False}))
    assert change.what == "changed" and change.fields == {"enabled": (True, False)}
    assert differences(made(), made()) == []


def test_wording_is_compared_word_by_word() -> None:
    assert words("a b c d", "a x c d e") == "a [-b-] {+x+} c d {+e+}"
    assert words("same  text", "same  text") == "same text"


def test_diff_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.yaml").write_text(made().to_yaml())
    (tmp_path / "b.yaml").write_text(made({"title": "Private life", "weight": 2.0}).to_yaml())
    assert main(["constitution", "diff", str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")]) == 0
    said = capsys.readouterr().out
    assert "privacy: changed" in said and "title: [-Privacy-] {+Private life+}" in said
    assert "weight: 1.0 -> 2.0" in said and "1 principles differ, 1 are the same" in said


def test_the_schema_knows_what_the_documents_hold() -> None:
    """By the validator that editors use: fields that are not known, and kinds that are wrong, are refused."""
    validator = pytest.importorskip("jsonschema").Draft202012Validator(schema())
    for name in shipped_names():
        validator.validate(yaml.safe_load(constitution.load(name).to_yaml()))
    assert list(validator.iter_errors({"name": "a", "principles": []}))
    assert list(validator.iter_errors({"name": "a", "principles": [PRIVACY | {"wieght": 1}]}))
    assert not list(validator.iter_errors({"name": "a", "principles": [PRIVACY]}))


def test_the_hash_is_of_what_models_read() -> None:
    told = made({"families": ["x"], "priority": 2, "examples": {}, "source": "y"}, authors=["Ada"])
    assert told.sha == made().sha
    assert made({"form": "negative"}).sha != made().sha


def test_hashes_are_those_of_the_releases_before() -> None:
    """A run of an earlier version goes on: fields that came later are in the hash only where they are used."""
    assert constitution.load("harmless").sha == "f14bc04db34fa3de"
    assert constitution.load("errand-town").sha == "e4559a875e1e557f"


COMMENTS = """timestamp,comment-id,moderated,comment-body
1,0,1,"It should say when
it is not sure."
1,1,1,It should always agree.
1,2,-1,Spam.
1,3,0,It should keep secrets.
"""
VOTES = """participant,group-id,0,1,2,3
0,0,1,1,1,1
1,0,1,1,1,
2,0,1,1,1,0
3,1,1,-1,1,1
4,1,1,-1,1,-1
5,1,,-1,1,1
"""


def exported(folder: Path, votes: str = VOTES) -> list[str]:
    (folder / "comments.csv").write_text(COMMENTS, encoding="utf-8")
    (folder / "votes.csv").write_text(votes, encoding="utf-8")
    return [str(folder / "comments.csv"), str(folder / "votes.csv")]


def test_a_draft_holds_what_no_group_rejects(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "draft.yaml")
    assert main(["constitution", "import", *exported(tmp_path), "--out", out, "--least", "0.5"]) == 0
    document = constitution.load(out)
    # Of statement 0: (4/5, 3/4); of 3: (2/4, 3/5). Half of all people agree with 1, but nobody in one group.
    consensus = [(4 / 5 * 3 / 4) ** 0.5, (2 / 4 * 3 / 5) ** 0.5]
    mean = sum(consensus) / 2
    assert [p.id for p in document.principles] == ["statement-0", "statement-3"]
    assert [p.weight for p in document.principles] == pytest.approx([c / mean for c in consensus], abs=1e-3)
    assert document.principles[0].text == "It should say when it is not sure."
    assert document.principles[0].source.endswith("5 people voted; agree by group: 0 3 of 3, 1 2 of 2")
    assert (
        main(["constitution", "import", *exported(tmp_path), "--out", out, "--most", "1", "--least", "0.5"])
        == 0
    )
    assert len(constitution.load(out).principles) == 1


@pytest.mark.parametrize(
    ("votes", "more", "says"),
    [
        (VOTES, ["--least", "0.9"], "none of 3 statements has a consensus of 0.9, the best has 0.77"),
        (VOTES.replace("group-id", "group"), [], "column 'group-id' is missing"),
        (VOTES.replace("1,-1,1,1", "1,-1,1,yes"), [], "'yes' for statement 3 is not a vote"),
    ],
)
def test_a_bad_export_is_one_clear_error(
    tmp_path: Path, votes: str, more: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "draft.yaml"
    assert main(["constitution", "import", *exported(tmp_path, votes), "--out", str(out), *more]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line and not out.exists()
