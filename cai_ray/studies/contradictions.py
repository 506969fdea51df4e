"""Finds principles that no response can follow together, according to the feedback model.

This is `cai-ray constitution lint --config`. The model is asked in the way in which it labels: two statements about a
pair of principles take the place of the two responses, and are weighed in both orders.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from typing import Any

from cai_ray.constitution import Constitution, Principle
from cai_ray.constitution.lint import Finding
from cai_ray.generate.label import LabelTask, make_judge
from cai_ray.generate.rows import map_rows
from cai_ray.storage.arrow import select
from cai_ray.storage.records import Label, derive_id
from cai_ray.storage.run import Run

PAIRS = 2000
"""The largest number of pairs that are asked about. Pairs that share a family or a tag come first."""
LIKELY = 0.7
"""The probability above which a contradiction is reported."""
CONTRADICT = "The two principles contradict each other: a response that follows the first breaks the second."
AGREE = "The two principles can be followed together: one response can follow both."
TRUE = Principle(
    id="true",
    title="Truth",
    text="Say what is true of the two principles.",
    critique_request="Say what is not true of the two principles.",
    revision_request="Say what is true of the two principles.",
    comparison="Which of the two statements about these principles is true?",
)


def contradictions(run: Run, document: Constitution) -> list[Finding]:
    """Pairs of enabled principles that contradict each other according to the feedback model, the surest first."""
    questions = {row["id"]: row for row in pairs(document)}
    rows = [select(row, LabelTask) for row in questions.values()]
    if not questions:
        return []
    config = run.config
    judge = config.label.judge.model_copy(update={"principles": "all"})
    truth = document.model_copy(update={"principles": (TRUE,)})
    chain = replace(make_judge(run, judge), constitution=truth)
    map_rows(run, "contradictions", rows, chain, takes=LabelTask, gives=Label, model=judge)
    likely = [row for row in run.rows("contradictions") if row["error"] is None and row["p_a_raw"] > LIKELY]
    return [
        Finding(
            "warning",
            "contradiction",
            questions[row["id"]]["principles"][0],
            f"seems to contradict {questions[row['id']]['principles'][1]!r} (probability {row['p_a_raw']:.2f})",
            "say in their wording which one comes first, or give it more weight",
        )
        for row in sorted(likely, key=lambda r: -r["p_a_raw"])
    ]


def pairs(document: Constitution) -> Iterator[dict[str, Any]]:
    """A comparison of the two statements for each pair of enabled principles."""

    def unrelated(pair: tuple[Principle, Principle]) -> bool:
        one, other = ({*p.families, *p.tags} for p in pair)
        return not one & other

    ranked = sorted(combinations(document.enabled, 2), key=unrelated)
    for one, other in ranked[:PAIRS]:
        yield {
            "id": derive_id("contradiction", one.text, other.text),
            "messages": [
                {"role": "user", "content": f"Consider two principles.\n\n1. {one.text}\n\n2. {other.text}"}
            ],
            "response_a": CONTRADICT,
            "response_b": AGREE,
            "principles": (one.id, other.id),
        }
