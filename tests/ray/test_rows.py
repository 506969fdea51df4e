"""Chains over Ray Data: docs/method.md items 9 and 37. No model is run."""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from cai_ray.cluster.usage import Usage
from cai_ray.engine.protocol import Engine, Sampling
from cai_ray.errors import InputError, RowError
from cai_ray.generate.chain import Rows
from cai_ray.generate.journal import Journal
from cai_ray.generate.rows import map_rows, map_sets
from cai_ray.storage.records import Judgement, derive_id
from cai_ray.storage.run import Run
from cai_ray.storage.tables import list_rows
from cai_ray.town import BASE
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


class Fragile:
    """Notes which rows it walks; the first time it meets the row that is marked, it fails or takes its actor along."""

    def __init__(self, folder: Path, way: str):
        self.walked, self.met, self.way = folder / "walked", folder / "met", way

    async def __call__(self, engine: Engine, row: dict[str, Any]) -> dict[str, Any]:
        with self.walked.open("a") as f:
            f.write(row["id"] + "\n")
        await asyncio.sleep(0.2)
        if row["family"] == "marked" and not self.met.exists():
            self.met.touch()
            if self.way == "killed":
                os._exit(1)
            raise RuntimeError("a fault in the code")
        return {**row, "response": "fine", "usage": Usage(1, 0, 1)._asdict()}


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
    said = map_rows(run, "revise", given, Refusing(), takes=Judgement, gives=Judgement, model="base")
    out = run.rows("revise")
    assert Counter(r["id"] for r in out) == Counter(r["id"] for r in given)
    errors = {r["id"]: r["error"] for r in out if r["error"] is not None}
    assert errors == {r["id"]: "refused" for r in given[:7]}
    assert all(r["response"] == "fine" for r in out if r["id"] not in errors)
    assert (said["rows_in"], said["rows_out"], said["errors"]) == (ROWS, ROWS, 7)


def test_too_many_errors_end_the_stage(ray_cluster: None, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"of 301 failed, more than max_error_rate=0.05; most often: refused \("
    ):
        map_rows(
            scripted(tmp_path),
            "revise",
            rows(refused=20),
            Refusing(),
            takes=Judgement,
            gives=Judgement,
            model="base",
        )


@pytest.mark.parametrize("way", ["killed", "failed"])
def test_item_37_what_was_finished_is_kept(ray_cluster: None, tmp_path: Path, way: str) -> None:
    """An actor that dies is replaced; code that fails ends the stage, which goes on where it was when run again."""
    run, given, chain = scripted(tmp_path / "run"), rows(refused=0), Fragile(tmp_path, way)
    given[150]["family"] = "marked"

    def walk() -> dict[str, Any]:
        return map_rows(run, "revise", iter(given), chain, takes=Judgement, gives=Judgement, model="base")

    if way == "failed":
        with pytest.raises(Exception, match="a fault in the code"):
            walk()
    journal = Journal(run, "revise", Judgement, Judgement, "part")
    finished = len(journal.finished_ids())
    assert walk()["rows_out"] == ROWS
    (planned,) = list_rows(journal.folder, "todo")
    assert 0 < pq.read_metadata(planned).num_rows <= ROWS - finished, "what was finished is not planned again"
    assert Counter(r["id"] for r in run.rows("revise")) == Counter(r["id"] for r in given)
    walked = Counter(chain.walked.read_text().split())
    assert set(walked) == {r["id"] for r in given}
    in_flight = 8 + 8 // 4
    assert 0 < walked.total() - ROWS <= 1.5 * in_flight, "rows that were finished were walked again"


class Noting:
    """Notes with which engine a row was walked, and when."""

    async def __call__(self, engine: Engine, row: dict[str, Any]) -> dict[str, Any]:
        began = time.monotonic()
        await asyncio.sleep(0.01)
        noted = {"response": str(id(engine)), "family": f"{began} {time.monotonic()}"}
        return {**row, **noted, "usage": Usage(1, 0, 1)._asdict()}


def test_sets_of_rows_with_models_of_their_own(ray_cluster: None, tmp_path: Path) -> None:
    """By the same actor, one set after the other, each with an engine of its own model; errors are counted by set."""
    run, given = scripted(tmp_path), rows(refused=0)
    sets = {"one": Rows(given[:200], "base"), "none": Rows([], "base"), "two": Rows(iter(given), str(BASE))}
    said = map_sets(run, "evaluate", sets, Noting(), takes=Judgement, gives=Judgement)
    found = {name: run.rows("evaluate", name=name) for name in sets}
    assert {name: m["rows_out"] for name, m in said.items()} == {"one": 200, "none": 0, "two": ROWS}
    assert {name: m["engine"]["model"] for name, m in said.items()} == {n: s.model for n, s in sets.items()}
    assert [len({r["response"] for r in found[name]}) for name in ("one", "two")] == [1, 1]
    assert found["one"][0]["response"] != found["two"][0]["response"]
    ended = max(float(r["family"].split()[1]) for r in found["one"])
    assert ended <= min(float(r["family"].split()[0]) for r in found["two"])


def test_each_set_may_fail_by_itself_alone(ray_cluster: None, tmp_path: Path) -> None:
    """A small set whose rows all fail is not hidden by a large one."""
    given = rows(refused=7)
    sets = {"few": Rows(given[:7], "base"), "part": Rows(given[7:], "base")}
    with pytest.raises(InputError, match=r"7 of 7 rows failed.*refused"):
        map_sets(scripted(tmp_path), "revise", sets, Refusing(), takes=Judgement, gives=Judgement)


class Refused:
    """What no row can help, such as a key that an endpoint refuses."""

    async def __call__(self, engine: Engine, row: dict[str, Any]) -> dict[str, Any]:
        raise InputError("the key in K is refused; export a valid one")


def test_an_input_error_of_the_engine_ends_the_stage_as_one(ray_cluster: None, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^the key in K is refused; export a valid one$"):
        map_rows(
            scripted(tmp_path), "revise", rows(0), Refused(), takes=Judgement, gives=Judgement, model="base"
        )
