"""Stage `evaluate` from prompts to judgements: its chains are walked here, row by row, and no model is run."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from cai_ray.config.run import RunConfig
from cai_ray.engine.scripted import ScriptedEngine
from cai_ray.evaluate import policies, preferences, stage
from cai_ray.generate.chain import Rows
from cai_ray.generate.journal import Journal
from cai_ray.storage.arrow import schema_of, to_table
from cai_ray.storage.records import Judgement, Preference, Revision, derive_id, derive_seed
from cai_ray.storage.run import Run
from cai_ray.storage.tables import has_rows

SEEDS: dict[str, list[int]] = {}


def answer(messages: Any, sampling: Any) -> str:
    text = messages[-1]["content"]
    SEEDS.setdefault(text if isinstance(text, str) else text[0].text, []).append(sampling.seed)
    return f"{text} {sampling.temperature:g} {sampling.seed % 7}"


ENGINE = ScriptedEngine(answer, weigh=lambda messages, options: [-0.5, -1.0])


def walk_sets(
    run: Run, where: str, sets: dict[str, Rows[Any]], chain: Any, *, takes: Any, gives: Any
) -> dict[str, Any]:
    summaries = {}
    for part, (rows, model) in sets.items():
        journal = Journal(run, where, takes, gives, part)
        todo = [row for slice in journal.plan(rows) for row in slice.read()]  # as they reach the actors
        journal.write([asyncio.run(chain(ENGINE, row)) for row in todo])
        published = journal.publish()
        summaries[part] = {
            "rows_in": len(todo),
            "rows_out": published.rows,
            "errors": 0,
            "tokens": {"generated": 1},
            "engine_seconds": 1.0,
            "engine": {"model": model, "model_sha": model},
        }
    return summaries


def walk_rows(run: Run, where: str, rows: Any, chain: Any, **options: Any) -> Any:
    part, model = options.pop("name"), options.pop("model")
    return walk_sets(run, where, {part: Rows(rows, model)}, chain, **options)[part]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(policies, "map_sets", walk_sets)
    monkeypatch.setattr(preferences, "map_rows", walk_rows)
    held = [{"prompt": f"question {i}?", "kind": ("red_team", "helpful")[i % 2]} for i in range(6)]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held))
    made = Run(
        RunConfig.model_validate(
            {
                "name": "e",
                "out": str(tmp_path / "run"),
                "model": "town",
                "constitution": "harmless",
                "method": "dpo",
                "prompts": [{"path": "town:revise"}],
                "evaluate": {
                    "prompts": [{"path": str(tmp_path / "held.jsonl")}],
                    "greedy": True,
                },
            }
        )
    )
    step = {"round": 1, "principle_id": "privacy", "revision_request": "r", "revision": "better", "key": "k"}
    revised = {
        "id": "r1",
        "prompt_id": "p1",
        "messages": [{"role": "user", "content": "shown?"}],
        "kind": "red_team",
        "family": None,
        "response": "bad",
        "steps": [step],
        "revision": "better",
    }
    made.write_rows("revise", to_table([revised], Revision))
    SEEDS.clear()
    return made


def test_answers_are_filed_by_what_they_are_for(run: Run) -> None:
    result = stage.run(run)
    judged = run.rows("evaluate")
    prompts = sorted({row["prompt_id"] for row in judged})
    assert len(prompts) == 6 and len(judged) == result["rows_out"] == 3 * 6
    assert {row["id"] for row in judged} == {
        derive_id("judgement", model, prompt, 0) for model in ("base", "sl", "rl") for prompt in prompts
    }
    assert {row["greedy"] for row in judged} == {None}
    greedy = run.rows("evaluate", name="greedy")
    assert {row["id"] for row in greedy} == {
        derive_id("judgement", f"{model} greedy", prompt, 0)
        for model in ("base", "sl", "rl")
        for prompt in prompts
    }
    assert {(row["model"], row["greedy"]) for row in greedy} == {(m, True) for m in ("base", "sl", "rl")}
    shown = run.rows("evaluate", name="transcripts")
    assert [row["id"] for row in shown] == sorted(
        derive_id("judgement", f"{model} transcript", "p1", 0) for model in ("base", "sl", "rl")
    )
    assert list(judged[0]) == schema_of(Judgement).names
    assert not any(has_rows(run.path("evaluate"), policy) for policy in policies.POLICIES)
    assert run.rows("evaluate", name="failed") == []


def test_seeds_depend_on_the_prompt_alone(run: Run) -> None:
    stage.run(run)
    (question,) = {row["prompt_id"] for row in run.rows("evaluate") if "question 0" in row["response"]}
    seeds = {seed for text, some in SEEDS.items() if "question 0" in text for seed in some}
    assert seeds == {derive_seed(run.config.seed, question, "0")}


def test_preferences_name_both_policies(run: Run) -> None:
    stage.run(run)
    rows = run.rows("evaluate", name="preference")
    assert list(rows[0]) == schema_of(Preference).names
    pairs = {("sl", "base"), ("rl", "base"), ("rl", "sl")}
    assert {(row["model_a"], row["model_b"]) for row in rows} == pairs
    assert {row["id"] for row in rows} == {
        derive_id("preference", a, b, row["prompt_id"]) for row in rows for a, b in pairs
    }
    metrics = run.facts("evaluate", "metrics.json")
    assert metrics["models"]["rl"]["preferred_to_base"]["n"] == 0, "both orders prefer the first slot: ties"
    assert metrics["ratings"]["harmless"]["rl"]["n"] == 2 * 3
