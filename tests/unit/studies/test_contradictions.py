"""Contradictions: which pairs are asked about, and what is told of the answers."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from cai_ray import constitution
from cai_ray.config.load import load_config
from cai_ray.engine.scripted import ScriptedEngine
from cai_ray.generate.journal import Journal
from cai_ray.generate.label import LabelTask
from cai_ray.storage.arrow import to_table
from cai_ray.storage.records import Label
from cai_ray.storage.run import Run
from cai_ray.studies import contradictions

HARMLESS = constitution.load("harmless")


def sees(messages: list[dict[str, str]], options: Any) -> list[float]:
    """Finds those pairs in contradiction that speak of stealing, whatever the order of the two statements."""
    text = messages[0]["content"]
    sure = 2.0 if "steal" in text else -2.0
    first = text.index(contradictions.CONTRADICT) < text.index(contradictions.AGREE)
    return [sure, -sure] if first else [-sure, sure]


def test_pairs_that_share_a_family_come_first_and_none_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = list(contradictions.pairs(HARMLESS))
    count = len(HARMLESS.enabled)
    assert len({r["id"] for r in rows}) == len(rows) == count * (count - 1) // 2
    document = HARMLESS.model_copy(
        update={
            "principles": tuple(
                p.model_copy(update={"families": ("near",) if i in (3, 9) else (), "tags": ()})
                for i, p in enumerate(HARMLESS.principles)
            )
        }
    )
    monkeypatch.setattr(contradictions, "PAIRS", 1)
    (only,) = contradictions.pairs(document)
    assert only["principles"] == (document.principles[3].id, document.principles[9].id)


def test_what_the_feedback_model_sees_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(
        load_config("errand-town", ["templates=general", "label.judge.combine=mean"], out=str(tmp_path))
    )

    def mapped(run: Run, stage: str, rows: Any, chain: Any, **_: Any) -> None:
        assert Journal(run, stage, LabelTask, Label, "part").plan(rows)  # as it would be handed to the actors
        done = [asyncio.run(chain(ScriptedEngine(weigh=sees), row)) for row in rows]
        run.write_rows(stage, to_table(done, Label))

    monkeypatch.setattr(contradictions, "map_rows", mapped)
    found = contradictions.contradictions(run, HARMLESS)
    about = {p.id for p in HARMLESS.enabled if "steal" in p.text}
    assert about and found and all(f.check == "contradiction" and f.level == "warning" for f in found)
    for finding in found:
        assert finding.principle in about or any(repr(name) in finding.message for name in about)
    expected = sum(bool({*r["principles"]} & about) for r in contradictions.pairs(HARMLESS))
    assert len(found) == expected
    one = HARMLESS.model_copy(update={"principles": HARMLESS.principles[:1]})
    assert contradictions.contradictions(run, one) == []
