"""Stage `revise` with a reviser: the policy's engines answer first, then another model's engine revises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cai_ray.errors import InputError
from cai_ray.generate import revise
from cai_ray.generate.journal import begin
from cai_ray.storage.run import Run
from cai_ray.storage.tables import delete_rows, has_rows
from tests.endpoint import Reply, Server, completion
from tests.ray.engines import town_config


def run_with(reviser: dict[str, Any], out: Path) -> Run:
    policy = {"kind": "scripted", "max_num_seqs": 8}
    settings = {"rounds": 1, "limit": 40, "reviser": reviser}
    run = Run(town_config(out=str(out), engine=policy, revise=settings))
    begin(run, "revise", {})
    return run


def test_a_reviser_has_an_engine_of_its_own(ray_cluster: None, tmp_path: Path) -> None:
    run = run_with({"model": "town", "engine": {"kind": "scripted", "max_num_seqs": 3}}, tmp_path)
    summary = revise.run(run)
    rows = run.rows("revise")
    assert summary["rows_in"] == summary["rows_out"] == len(rows) == len(revise.tasks(run))
    assert summary["engine"]["kind"] == summary["reviser"]["kind"] == "scripted"
    red_team = [row for row in rows if row["kind"] == "red_team"]
    assert red_team and all(row["revision"] == "fine" and len(row["steps"]) == 1 for row in red_team)
    assert summary["calls"] == len(rows) + 2 * len(red_team)
    assert not has_rows(run.path("revise"), "answers"), "they stand in the stage's rows"


def test_what_the_policy_answered_is_kept_where_the_reviser_fails(ray_cluster: None, tmp_path: Path) -> None:
    server = Server()
    engine = {"kind": "openai", "base_url": server.url, "api_key_env": "", "max_num_seqs": 4}
    run = run_with({"model": "large", "engine": engine}, tmp_path)
    server.replies = [Reply({"error": {"message": "no such model"}}, 404)]
    with pytest.raises(InputError, match="no such model"):
        revise.run(run)
    planned = run.path("revise", "journal", "answers")
    delete_rows(planned, "todo")
    server.replies = [Reply(completion("sorry , no ."))]
    summary = revise.run(run)
    rows = run.rows("revise")
    assert not has_rows(planned, "todo"), "the policy was to answer again"
    assert summary["errors"] == 0 and summary["reviser"]["model"] == "large"
    assert {row["response"] for row in rows} == {"fine"}
    red_team = [row for row in rows if row["kind"] == "red_team"]
    assert {row["revision"] for row in red_team} == {"sorry , no ."}
    assert {row["reviser"] for row in rows} == {"large"} and {row["model"] for row in rows} == {"town"}
