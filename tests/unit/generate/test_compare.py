"""Samples of a prompt and the comparisons that they make."""

from __future__ import annotations

import asyncio
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from cai_ray.engine.protocol import Sampling
from cai_ray.engine.scripted import ScriptedEngine
from cai_ray.errors import RowError
from cai_ray.generate import compare
from cai_ray.generate.journal import Journal
from cai_ray.storage.records import derive_id, derive_seed
from cai_ray.storage.run import Run
from cai_ray.storage.tables import list_rows
from tests.ray.engines import town_config

SEEDS: list[int] = []


def answer(messages: Any, sampling: Sampling) -> str:
    SEEDS.append(sampling.seed)
    if "3" in messages[-1]["content"]:
        raise RowError("refused")
    return f"answer {sampling.seed}"


def walk(run: Run, monkeypatch: pytest.MonkeyPatch, answer: Any = answer) -> dict[str, Any]:
    """Runs the stage without Ray: its chain is walked here, row by row."""
    SEEDS.clear()

    def map_rows(
        run: Run, stage: str, rows: Any, chain: Any, *, name: str, takes: Any, gives: Any, model: str
    ):
        journal = Journal(run, stage, takes, gives, name)
        for slice in journal.plan(rows):
            for row in slice.read():
                try:
                    journal.write([asyncio.run(chain(ScriptedEngine(answer), row))])
                except RowError as e:
                    journal.write([journal.failed(row, e.made, str(e))])
        published = journal.publish()
        return {
            "rows_in": published.rows,
            "rows_out": published.rows,
            "errors": published.errors,
            "calls": published.usage["calls"],
        }

    monkeypatch.setattr(compare, "map_rows", map_rows)
    return compare.run(run)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(f'{{"prompt": "question {i}"}}\n' for i in range(6)))
    return path


def make(tmp_path: Path, prompts: Path, samples: int, **more: Any) -> Run:
    sources = [{"path": str(prompts), "kind": "red_team"}]
    return Run(town_config(out=str(tmp_path / "run"), prompts=sources, compare={"samples": samples}, **more))


@pytest.mark.parametrize("samples", [2, 3, 5])
def test_a_prompt_is_answered_as_often_as_it_has_samples(
    tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch, samples: int
) -> None:
    run = make(tmp_path, prompts, samples)
    result = walk(run, monkeypatch)
    pairs = samples * (samples - 1) // 2
    assert len(SEEDS) == 5 * samples + 1  # one prompt is refused at its first answer
    assert (result["rows_in"], result["rows_out"], result["errors"]) == (6 * pairs, 6 * pairs, pairs)
    rows = [row for row in run.rows("compare") if row["error"] is None]
    assert sum(row["usage"]["calls"] for row in rows) == result["calls"] == 5 * samples


@pytest.mark.parametrize("samples", [2, 4])
def test_ids_and_seeds_depend_on_the_prompt_and_the_samples_numbers_alone(
    tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch, samples: int
) -> None:
    """So that a third sample leaves the comparison of the first two as it is."""
    run = make(tmp_path, prompts, samples)
    walk(run, monkeypatch)
    rows = {row["id"]: row for row in run.rows("compare")}
    for prompt in {row["prompt_id"] for row in rows.values()}:
        for first, second in combinations(range(samples), 2):
            row = rows[derive_id("comparison", prompt, first, second)]
            seeds = [derive_seed(run.config.seed, prompt, "sample", n) for n in (first, second)]
            if row["error"] is None:
                assert [row["response_a"], row["response_b"]] == [f"answer {seed}" for seed in seeds]
                assert (row["source"], row["model"], row["temperature"]) == ("ai", "sl", 1.0)
            else:
                assert row["error"] == "refused" and row["response_a"] is None
            assert row["messages"][0]["content"].startswith("question") and row["kind"] == "red_team"
    assert [row["id"] for row in run.each_row("compare")] == sorted(rows)


def test_only_comparisons_are_left(tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make(tmp_path, prompts, 3)
    walk(run, monkeypatch)
    assert list_rows(run.path("compare"), compare.SAMPLES) == [] and list_rows(run.path("compare"))


def thinks(messages: Any, sampling: Any) -> str:
    return "<think>Let me see.</think>The answer."


@pytest.mark.parametrize("thinking", ["strip", "keep"])
def test_comparisons_are_of_answers_without_their_thinking(
    tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch, thinking: Any
) -> None:
    run = make(tmp_path, prompts, 2, thinking=thinking, templates="general")
    walk(run, monkeypatch, thinks)
    for row in run.rows("compare"):
        for side in ("response_a", "response_b"):
            assert ("Let me see" in row[side]) == (thinking == "keep") and row[side].endswith("The answer.")
