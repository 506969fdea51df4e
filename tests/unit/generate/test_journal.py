"""What survives a kill: docs/method.md item 37."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cai_ray.generate import blocks, journal
from cai_ray.generate.actor import ChainActor
from cai_ray.generate.journal import SLICE_ROWS, TODO_ROWS, Journal, JournalWriter
from cai_ray.storage import files, sorting
from cai_ray.storage.records import Revision
from cai_ray.storage.run import Run
from cai_ray.storage.tables import list_rows
from tests.ray.engines import town_config


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(town_config(out=str(tmp_path)))


@pytest.fixture
def made(run: Run) -> Journal:
    journal.begin(run, "revise", {"seed": "0"})
    return Journal(run, "revise", Revision, Revision, "part")


def row(number: int, error: str | None = None, response: str = "fine") -> dict[str, Any]:
    usage = {"prompt": 1, "cached": 0, "generated": 2, "calls": 1}
    return {"id": f"{number:016x}", "response": response, "error": error, "usage": usage}


def test_rows_to_walk_are_read_slice_by_slice(made: Journal) -> None:
    given = [row(i) for i in range(TODO_ROWS + SLICE_ROWS + 5)]
    slices = made.plan(iter(given))
    assert [s.rows for s in slices] == [len(s.read()) for s in slices]
    assert max(s.rows for s in slices) == SLICE_ROWS
    assert [r["id"] for s in slices for r in s.read()] == [r["id"] for r in given]


def test_no_rows_are_an_empty_result(run: Run, made: Journal) -> None:
    assert made.plan([]) == [] and made.finished_ids() == frozenset()
    assert made.publish().rows == 0 and run.rows("revise") == []


def test_item_37_what_is_finished_is_not_walked_again_but_what_failed(made: Journal) -> None:
    made.write([row(1), row(2, error="refused")])
    made.write([row(3)])
    assert made.finished_ids() == {row(1)["id"], row(3)["id"]}


def test_item_37_a_row_that_was_walked_twice_counts_once(run: Run, made: Journal) -> None:
    made.write([row(1, response="first"), row(2, error="refused")])
    made.write([row(2, response="again"), row(3, error="refused")])
    made.write([row(1, response="second"), row(3, error="refused once more")])
    assert made.publish() == (3, 1, {"prompt": 3, "cached": 0, "generated": 6, "calls": 3})
    out = run.rows("revise")
    assert [(r["response"], r["error"]) for r in out] == [
        ("first", None),
        ("again", None),
        ("fine", "refused"),
    ]


def test_item_37_a_kill_while_publishing_leaves_nothing_double(
    run: Run, made: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sorting, "PART_BYTES", 400)
    monkeypatch.setattr(sorting, "_RANGE_ROWS", 2)
    made.write([row(i) for i in range(10)])
    made.publish()  # and the driver dies before the manifest
    journal.begin(run, "revise", {"seed": "0"})
    made.write([row(i) for i in range(10, 13)])
    assert made.publish().rows == 13
    assert Counter(r["id"] for r in run.rows("revise")) == Counter(row(i)["id"] for i in range(13))


def test_item_37_a_slow_disk_holds_the_engine_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill costs the rows that were begun and are not safe: half more than those in flight, and never more."""
    run = Run(town_config(out=str(tmp_path), engine={"kind": "scripted", "max_num_seqs": 8, "threads": 1}))
    made = Journal(run, "revise", Revision, Revision, "part")
    in_flight, begun, safe = 8 + 8 // 4, 0, 0
    at_stake = []
    write = Journal.write

    async def chain(engine: Any, row: dict[str, Any]) -> dict[str, Any]:
        nonlocal begun
        begun += 1
        at_stake.append(begun - safe)
        await asyncio.sleep(0.001)
        return row

    def slowly(self: Journal, rows: list[dict[str, Any]]) -> None:
        nonlocal safe
        time.sleep(0.2)
        write(self, rows)
        safe += len(rows)

    monkeypatch.setattr(Journal, "write", slowly)
    slices = made.plan([row(i) for i in range(SLICE_ROWS)])

    async def walk() -> None:
        actor = ChainActor(chain, {"part": run.resolve_model("base")}, {"part": made}, gpu=False)
        async for _ in actor(pa.Table.from_pylist([slices[0]._asdict()])):
            pass

    asyncio.run(walk())
    assert begun == safe == SLICE_ROWS
    assert in_flight < max(at_stake) <= 1.5 * in_flight


def test_other_inputs_begin_anew(run: Run, made: Journal) -> None:
    made.write([row(1)])
    journal.begin(run, "revise", {"seed": "0"})
    assert made.finished_ids() == {row(1)["id"]}
    journal.begin(run, "revise", {"seed": "1"})
    assert made.finished_ids() == frozenset()
    made.write([row(1)])
    files.write_bytes(run.path("revise", journal.FOLDER, "inputs.json"), b"{ torn")
    journal.begin(run, "revise", {"seed": "1"})
    assert made.finished_ids() == frozenset()


def rows_per_file(made: Journal) -> list[int]:
    return [len(pq.read_table(f)) for f in list_rows(made.folder, "done")]


def test_a_block_is_written_when_it_is_full_or_nothing_else_is_done(made: Journal) -> None:
    async def work() -> None:
        writer = JournalWriter(made, block=4, patience=60, pause=0.01)
        with writer.busy():
            tasks = [asyncio.create_task(writer.save(row(i))) for i in range(4)]
            await asyncio.gather(*tasks)
            assert rows_per_file(made) == [4]
            late = asyncio.create_task(writer.save(row(4)))
            await asyncio.sleep(0.1)
            assert not late.done()  # there is work, which may fill the block
        await late

    asyncio.run(work())
    assert rows_per_file(made) == [4, 1]


def test_a_block_that_does_not_fill_is_written_all_the_same(made: Journal) -> None:
    async def work() -> None:
        writer = JournalWriter(made, block=4, patience=0.05, pause=0.01)
        with writer.busy():
            await writer.save(row(0))

    asyncio.run(work())
    assert rows_per_file(made) == [1]


def test_a_block_that_cannot_be_written_is_an_error_of_its_rows(
    made: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Journal, rows: list[dict[str, Any]]) -> None:
        raise OSError(28, "No space left on device")

    async def work() -> list[Any]:
        writer = JournalWriter(made, block=2, pause=0.01)
        return await asyncio.gather(*(writer.save(row(i)) for i in range(2)), return_exceptions=True)

    monkeypatch.setattr(Journal, "write", full)
    assert [str(e) for e in asyncio.run(work())] == ["[Errno 28] No space left on device"] * 2


def count_of_blocks(made: Journal) -> int:
    return len(made.blocks())


def test_blocks_are_merged_as_they_become_many(run: Run, made: Journal) -> None:
    """A million rows of an actor with few rows in flight are half a million blocks: they must not stay files."""
    writer = JournalWriter(made, block=1)
    for i in range(600):
        writer.write([row(i)])
        assert count_of_blocks(made) <= 3 * blocks.FAN_IN
    assert made.finished_ids() == {row(i)["id"] for i in range(600)}
    assert made.publish().rows == 600


def test_full_blocks_are_left_alone(made: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "FULL_BYTES", 1)
    writer = JournalWriter(made, block=1)
    for i in range(40):
        writer.write([row(i)])
    assert count_of_blocks(made) == 40


def test_large_blocks_are_merged_before_they_are_many(made: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is merged at a time is bounded by its size, too."""
    size = made.write([row(0)]).bytes
    monkeypatch.setattr(blocks, "FULL_BYTES", 5 * size // 2)
    writer, merged = JournalWriter(made, block=1), []
    merge = writer.merger.merge
    writer.merger.merge = lambda some: merged.append(len(some)) or merge(some)  # type: ignore[func-returns-value]
    for i in range(9):
        writer.write([row(i)])
    assert set(merged) == {3}


def test_item_37_a_kill_while_blocks_are_merged_counts_rows_once(
    run: Run, made: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = [made.write([row(i)]) for i in range(4)]

    class Killed(BaseException):
        pass

    def killed(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(journal.files, "open_new", killed)
        patch.setattr("cai_ray.storage.tables.open_new", killed)
        with pytest.raises(Killed):  # before the new block is there
            made.merge(some)
    assert made.finished_ids() == {row(i)["id"] for i in range(4)}

    kept = [Path(block.path).read_bytes() for block in some]
    assert made.merge(some)
    for block, data in zip(some, kept, strict=True):  # after it, and before the old ones are gone
        Path(block.path).write_bytes(data)
    assert made.publish() == (4, 0, {"prompt": 4, "cached": 0, "generated": 8, "calls": 4})
    assert len(run.rows("revise")) == 4


def test_item_37_an_actor_that_starts_while_another_merges_misses_no_row(
    made: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = [made.write([row(i)]) for i in range(4)]
    read, once = journal.read_rows, iter([True])

    def late(fs: Any, path: str, columns: Any = None) -> Any:
        if columns and next(once, False):
            made.merge(some)  # between the listing and the reading
        return read(fs, path, columns)

    monkeypatch.setattr(journal, "read_rows", late)
    assert made.finished_ids() == {row(i)["id"] for i in range(4)}
    assert count_of_blocks(made) == 1


def test_blocks_that_another_attempt_has_merged_are_let_go(run: Run, made: Journal) -> None:
    """Its actors may live on for seconds, and merge what this attempt finds."""
    some = [made.write([row(i)]) for i in range(4)]
    assert Journal(run, "revise", Revision, Revision, "part").merge(some)
    assert made.merge(some) is None
    assert made.finished_ids() == {row(i)["id"] for i in range(4)}


def test_what_killed_attempts_left_is_merged_at_the_next_start(made: Journal) -> None:
    for i in range(100):
        made.write([row(i)])
    made.merge_leftovers()
    assert count_of_blocks(made) == 1 and len(made.finished_ids()) == 100
    for i in range(100, 105):
        made.write([row(i)])
    made.merge_leftovers()
    assert count_of_blocks(made) == 6, "a few are not worth it"


def test_item_37_the_first_good_row_is_taken_after_blocks_were_merged(run: Run, made: Journal) -> None:
    first = made.write([row(1, response="first"), row(2, error="refused")])
    second = made.write([row(3)])
    made.write([row(1, response="second"), row(2, response="again")])
    made.merge([first, second])
    made.publish()
    assert [r["response"] for r in run.rows("revise")] == ["first", "again", "fine"]


def test_published_rows_come_in_the_order_of_their_ids(
    run: Run, made: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sorting, "PART_BYTES", 10_000)
    monkeypatch.setattr(sorting, "_RANGE_ROWS", 20)
    for start in range(0, 1000, 50):
        made.write([row((i * 617) % 1000) for i in range(start, start + 50)])
    assert made.publish().rows == 1000
    assert [r["id"] for r in run.each_row("revise", ["id"])] == [row(i)["id"] for i in range(1000)]
    assert len(list_rows(run.path("revise"))) > 5
