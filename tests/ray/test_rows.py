"""Chains over Ray Data: docs/method.md items 9 and 37. No model is run."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from cai_ray.engine import Engine, Sampling, Usage
from cai_ray.errors import InputError, RowError
from cai_ray.generate.rows import map_rows
from cai_ray.records import derive_id
from cai_ray.storage import Run
from tests.ray.engines import town_config

# Not a multiple of a batch nor of a block.
ROWS = 301


class Refusing:
    """Answers a row, or refuses it where the row says so."""

    async def __call__(self, engine: Engine, row: dict[str, Any]) -> dict[str, Any]:
        if row["family"] == "refused":
            raise RowError("refused")
        answer = await engine.chat(row["messages"], Sampling(1.0, 8, 0))
        return {**row, "response": answer.text, "usage": Usage(1, 0, 1)._asdict()}


def rows(refused: int) -> list[dict[str, Any]]:
    return [
        {
            "id": derive_id("row", number),
            "messages": [{"role": "user", "content": f"row {number}"}],
            "family": "refused" if number < refused else "answered",
        }
        for number in range(ROWS)
    ]


def scripted(out: Path) -> Run:
    return Run(town_config(out=str(out), engine={"kind": "scripted", "max_num_seqs": 8}))


def test_item_09_every_row_comes_out_whole_or_with_its_error(ray_cluster: None, tmp_path: Path) -> None:
    run, given = scripted(tmp_path), rows(refused=7)
    said = map_rows(run, "revise", given, Refusing(), model="base", schema="judgements")
    out = run.rows("revise")
    assert Counter(r["id"] for r in out) == Counter(r["id"] for r in given)
    errors = {r["id"]: r["error"] for r in out if r["error"] is not None}
    assert errors == {r["id"]: "refused" for r in given[:7]}
    assert all(r["response"] == "fine" for r in out if r["id"] not in errors)
    assert (said["rows_in"], said["rows_out"], said["errors"]) == (ROWS, ROWS, 7)


def test_too_many_errors_end_the_stage(ray_cluster: None, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"20 of 301 rows failed, .* refused \(20 rows\)"):
        map_rows(
            scripted(tmp_path), "revise", rows(refused=20), Refusing(), model="base", schema="judgements"
        )
