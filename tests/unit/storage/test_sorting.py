"""Rows by the million: sorted in bounded memory, with columns of any size."""

from __future__ import annotations

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cai_ray.storage import sorting, tables
from cai_ray.storage.ids import IdSet
from cai_ray.storage.records import derive_id
from cai_ray.storage.run import StageRows
from cai_ray.storage.sorting import SortedWriter
from cai_ray.storage.tables import in_order, list_rows, read_tables, write_table, write_tables

SCHEMA = pa.schema([("id", pa.string()), ("text", pa.string()), ("steps", pa.list_(pa.string()))])


def rows(count: int) -> list[dict[str, object]]:
    ids = [derive_id("row", i) for i in range(count)]
    return [{"id": id, "text": f"text {i}", "steps": [f"step {i}"] * (i % 3)} for i, id in enumerate(ids)]


def write(folder: Path, given: list[dict[str, object]], block: int) -> None:
    with SortedWriter(str(folder), SCHEMA, (str(r["id"]) for r in given)) as writer:
        for start in range(0, len(given), block):
            writer.add(pa.Table.from_pylist(given[start : start + block], SCHEMA))
        assert sum(part.num_rows for part in writer.write()) == len(given)


@pytest.mark.parametrize("count", [0, 1, 5, 2000])
def test_rows_are_sorted_over_all_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(sorting, "PART_BYTES", 20_000)
    monkeypatch.setattr(sorting, "_RANGE_ROWS", 50)
    given = rows(count)
    random.Random(1).shuffle(given)
    write(tmp_path, given, 7)
    assert list(StageRows(str(tmp_path))) == sorted(given, key=lambda r: str(r["id"]))
    assert (len(list_rows(tmp_path)) > 3) == (count == 2000)
    assert [f.name for f in tmp_path.iterdir() if f.suffix != ".parquet"] == []


def test_ids_that_are_alike_or_odd_are_sorted_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids need not be hashes: they may come in order, be of any length, and repeat."""
    monkeypatch.setattr(sorting, "_RANGE_ROWS", 3)
    ids = [*(f"row {i}" for i in range(40)), *["same"] * 20, "", "é", "日本"]
    given = [{"id": id, "text": str(i), "steps": []} for i, id in enumerate(ids)]
    write(tmp_path, given, 8)
    assert list(StageRows(str(tmp_path))) == sorted(given, key=lambda r: str(r["id"]).encode())


def test_files_of_a_larger_attempt_do_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sorting, "PART_BYTES", 10_000)
    monkeypatch.setattr(sorting, "_RANGE_ROWS", 20)
    write(tmp_path, rows(1000), 100)
    (tmp_path / ".sorting-part").mkdir()
    (tmp_path / ".sorting-part" / "00000.arrow").write_bytes(b"of a process that was killed")
    write(tmp_path, rows(30), 100)
    assert len(list(StageRows(str(tmp_path)))) == 30


def test_what_ends_before_it_is_written_leaves_the_files_as_they_were(tmp_path: Path) -> None:
    write(tmp_path, rows(10), 5)
    writer = SortedWriter(str(tmp_path), SCHEMA, [])
    with writer:
        writer.add(pa.Table.from_pylist(rows(3), SCHEMA))
    assert len(list(StageRows(str(tmp_path)))) == 10
    assert [f.name for f in tmp_path.iterdir() if f.is_dir()] == []


def test_a_text_column_beyond_two_gigabytes_is_sorted() -> None:
    """Arrow's offsets have 32 bits: its own sorting raises `offset overflow`, also for texts in lists."""
    text = "x" * (9 << 20)
    part = pa.table(
        {"id": ["b", "c"], "text": [text, text], "steps": pa.array([[{"s": text}], [{"s": "c"}]])}
    )
    many = pa.concat_tables([*[part] * 120, part.slice(0, 1).set_column(0, "id", [["a"]])])
    assert many["text"].nbytes > 2 << 30
    ids = in_order(many)["id"].to_pylist()
    assert ids == ["a", *["b"] * 120, *["c"] * 120]


def test_the_columns_of_a_table_keep_their_types(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = rows(9)[::-1]
    write_table(tmp_path / "part-0.parquet", pa.Table.from_pylist(given, SCHEMA))
    table = read_tables(tmp_path)
    assert table.schema.equals(SCHEMA) and table.to_pylist() == sorted(given, key=lambda r: str(r["id"]))


def test_a_file_written_table_by_table_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    parts = [pa.Table.from_pylist(rows(n), SCHEMA) for n in (3, 5)]
    assert write_tables(path, parts, SCHEMA) == [3, 5]
    assert pq.ParquetFile(path).num_row_groups == 2

    def failing():
        yield parts[0]
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_tables(tmp_path / "other.parquet", failing(), SCHEMA)
    assert [f.name for f in tmp_path.iterdir()] == ["rows.parquet"]


def test_few_rows_are_in_memory_at_a_time(tmp_path: Path) -> None:
    write_table(tmp_path / "part-0.parquet", pa.Table.from_pylist(rows(5000), SCHEMA))
    assert max(t.num_rows for t in tables.iter_tables(tmp_path)) <= 1024


ODD = [
    "",
    "c000",
    "0" * 15,
    "0x12345678901234",
    "ABCDEF0123456789",
    "1_2_3_4_5_6_7_8_9",
    " 123456789abcdef",
    "é" * 16,
]


def test_a_set_of_ids_is_what_a_set_of_texts_is() -> None:
    ids = [derive_id(i) for i in range(300)]
    given = [*ids, *ODD, ids[0]]
    held = IdSet(given)
    assert held == set(given) and len(held) == len(set(given)) and set(held) == set(given)
    assert all(id in held for id in given)
    assert not any(other in held for other in (derive_id("other"), "0012345678901234", "abcdef0123456789", 7))
    assert IdSet() == set() and "x" not in IdSet()
    for odd in ODD:
        assert odd not in IdSet(ids) and odd in IdSet([odd])
