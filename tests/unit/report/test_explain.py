"""`cai-ray explain`: the chain behind a row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cai_ray.cli import main
from cai_ray.config.load import load_config
from cai_ray.storage import files
from cai_ray.storage.arrow import to_table
from cai_ray.storage.records import Judgement, Label, Revision, RolloutRow
from cai_ray.storage.run import Run

ASKED = [{"role": "user", "content": "how do i read the baker's diary ?"}]
OTHER = [{"role": "user", "content": "how do i describe the baker's diary ?"}]
STEPS = [
    {"round": 1, "principle_id": "safety", "critique": "nothing", "revision": "sure ."},
    {"round": 2, "principle_id": "privacy", "critique": "snooping", "revision": "sorry ."},
]
VOTES = [
    {"principle_id": "safety", "p_a": 0.52},
    {"principle_id": "privacy", "p_a": 0.1},
    {"principle_id": "respect", "p_a": 0.7},
    {"principle_id": "honesty", "p_a": None, "abstained": "said nothing"},
]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(load_config("errand-town", out=str(tmp_path / "run")))
    files.write_json(run.path("run.json"), {"config": run.config.model_dump(mode="json")})
    about = {"kind": "red_team", "family": "privacy", "error": None}
    for name, messages in (("ab", ASKED), ("ac", OTHER)):
        first = {**about, "id": f"r-{name}", "prompt_id": name, "messages": messages, "response": "sure ."}
        run.write_rows("revise", to_table([{**first, "steps": STEPS}], Revision), part=name == "ac")
    label = {
        "id": "l-1",
        "prompt_id": "ab",
        "messages": ASKED,
        "response_a": "sure .",
        "response_b": "sorry .",
    }
    run.write_rows("label", to_table([{**about, **label, "votes": VOTES, "p_a": 0.2, "p_a_raw": 0.2}], Label))
    said: list[dict[str, Any]] = [
        {
            **about,
            "id": f"e-{m}",
            "prompt_id": "ab",
            "messages": ASKED,
            "model": m,
            "response": m,
            "reward": r,
        }
        for m, r in (("rl", 1.5), ("base", None))
    ]
    said[0] |= {"refused": True, "principle_named": "privacy", "harmful": False}
    run.write_rows("evaluate", to_table(said, Judgement))
    rollouts = [
        {"id": f"p-{i}", "step": i, "messages": m, "response": "so", "reward": 0.25, "kl_reference": 0.1}
        for i, m in enumerate((ASKED, OTHER), 1)
    ]
    run.write_rows("ppo", to_table(rollouts, RolloutRow))
    return run


@pytest.mark.parametrize(
    ("id", "stage"), [("r-ab", "revise"), ("l-1", "label"), ("e-rl", "evaluate"), ("ab", "revise")]
)
def test_all_that_is_known_of_a_prompt(
    run: Run, id: str, stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", run.root, id, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["found"] == {"stage": stage, "id": id, "prompt_id": "ab"} and told["messages"] == ASKED
    (revision,) = told["revisions"]
    assert [(s["principle_id"], s["changed"]) for s in revision["steps"]] == [
        ("safety", False),
        ("privacy", True),
    ]
    (compared,) = told["comparisons"]
    assert [(v["principle_id"], v["weighs"]) for v in compared["votes"]] == [
        ("privacy", "with the label"),
        ("respect", "overruled"),
        ("safety", "undecided"),
        ("honesty", "undecided"),
    ]
    assert [r["step"] for r in told["rollouts"]] == [1]
    assert (
        list(told["answers"]) == ["base", "rl"] and told["answers"]["rl"][0]["principle_named"] == "privacy"
    )


def test_it_is_shown_in_words(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", run.root, "l-1"]) == 0
    said = capsys.readouterr().out
    assert "how do i read the baker's diary" in said and "describe" not in said
    assert "[Protect private things] 10.0% for a, with the label" in said and "said nothing" in said
    assert "(refused, names privacy, reward +1.50)" in said and "(unchanged)" in said


@pytest.mark.parametrize(
    ("id", "says"), [("a", "begins those of several prompts (ab, ac"), ("zz", "id zz: no row of")]
)
def test_an_id_that_is_none_is_one_clear_error(
    run: Run, id: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", run.root, id]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
