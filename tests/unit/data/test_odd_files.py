"""Cells and files that are odd themselves: one of them is never the end of the others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cai_ray.config.sources import PromptSource
from cai_ray.data.left_out import LeftOut
from cai_ray.data.sources import read_prompts
from cai_ray.errors import InputError


def read(path: Path) -> tuple[list[str], LeftOut, list[str | None]]:
    """The prompts of a file, what was left out, and the families."""
    left_out = LeftOut()
    rows = read_prompts([PromptSource(path=str(path), kind="helpful")], 0, left_out)
    return [r["messages"][-1]["content"] for r in rows], left_out, [r["family"] for r in rows]


def parquet(path: Path, table: pa.Table) -> Path:
    pq.write_table(table, path / "t.parquet")
    return path / "t.parquet"


def arrow(path: Path, table: pa.Table) -> Path:
    with pa.ipc.new_stream(path / "t.arrow", table.schema) as out:
        out.write_table(table)
    return path / "t.arrow"


STRANGE = {
    "a far year": (pa.array([10**15], pa.timestamp("s")), None),
    "a far day": (pa.array([10**8], pa.int32()).cast(pa.date32()), None),
    "a time zone that is not known": (pa.array([1], pa.timestamp("us", tz="Mars/Base")), None),
    "nanoseconds": (pa.array([1], pa.timestamp("ns")), "1970-01-01 00:00:00.000000001"),
    "bytes": (pa.array([b"\xff"]), "b'\\xff'"),
    "a map": (pa.array([[("k", "v")]], pa.map_(pa.string(), pa.string())), '{"k": "v"}'),
    "a map with a key twice": (pa.array([[("k", "v"), ("k", "w")]], pa.map_(pa.string(), pa.string())), '{"k": "w"}'),
    "an image": (pa.array([{"bytes": b"\x89", "path": None}]), '{"bytes": "b\'\\\\x89\'", "path": null}'),
}  # fmt: skip


@pytest.mark.parametrize("write", [parquet, arrow])
@pytest.mark.parametrize("name", STRANGE)
def test_a_side_column_of_any_type_keeps_no_row_from_being_read(
    tmp_path: Path, name: str, write: Callable[[Path, pa.Table], Path]
) -> None:
    column, text = STRANGE[name]
    prompts, left_out, families = read(write(tmp_path, pa.table({"prompt": ["a"], "family": column})))
    assert prompts == ["a"] and not left_out
    if text is not None:
        assert families == [text]


def test_a_cell_that_is_not_utf_8_costs_its_row_alone(tmp_path: Path) -> None:
    raw = pa.Array.from_buffers(pa.string(), 2, pa.array([b"\xff", b"x"]).buffers())
    for table in (pa.table({"prompt": raw}), pa.table({"prompt": ["a", "x"], "family": raw})):
        prompts, left_out, _ = read(parquet(tmp_path, table))
        assert prompts == ["x"] and dict(left_out) == {"not UTF-8": 1}


def test_messages_in_the_forms_of_arrow(tmp_path: Path) -> None:
    maps = pa.list_(pa.map_(pa.string(), pa.string()))
    for messages in (
        pa.array([[[("role", "user"), ("content", "a")]]], maps),
        pa.array([{"role": ["user", "assistant"], "content": ["a", "b"]}]),
    ):
        assert read(parquet(tmp_path, pa.table({"messages": messages})))[0] == ["a"]


def test_a_row_of_csv_with_a_wrong_quote_costs_itself_alone(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text('prompt,family\na,1\n"b"c,2\nd,3\n"e"f,"of\ntwo lines"\ng,4\n')
    prompts, left_out, _ = read(path)
    assert prompts == ["a", "d", "g"] and left_out["not valid CSV"] == left_out.total() >= 2
    path.write_text('prompt,family\n"a,1\nb,2\n')  # who knows where it should have ended
    with pytest.raises(InputError, match="cannot be read \\(unexpected end of data\\)"):
        read(path)


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_list_is_as_many_rows(tmp_path: Path, indent: int | None) -> None:
    """ShareGPT's and Alpaca's files are one list over many lines."""
    talk = [{"from": "human", "value": "b]"}, {"from": "gpt", "value": "c"}]
    rows: list[Any] = [
        {"prompt": "a"},
        {"conversations": talk},
        7,
        {"prompt": " "},
        {"prompt": "half \ud800"},
    ]
    path = tmp_path / "p.json"
    path.write_text("\n " + json.dumps(rows, indent=indent) + "\n")
    prompts, left_out, _ = read(path)
    assert prompts == ["a", "b]", "half \ufffd"] and dict(left_out) == {
        "not a JSON object": 1,
        "a blank prompt": 1,
    }
    assert left_out.lines[0].endswith("row 3")


def test_a_json_file_may_hold_lines(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text('\n{"prompt": "a"}\n[1]\n{"prompt": "b"}\n')
    prompts, left_out, _ = read(path)
    assert prompts == ["a", "b"] and left_out.lines[0].endswith("row 3")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[{"prompt": "a"}, {"prompt": "b"}', "row 3 of the list is not valid JSON"),
        ('[{"prompt": "a"}, {"prompt"]', "row 2 of the list is not valid JSON"),
        ('[{"prompt": "a"} {"prompt": "b"}]', "row 2 of the list is not valid JSON"),
        ('[{"prompt": "a"}]\n{"prompt": "b"}', "there is more behind the list"),
        ("[" * 100_000, "row 1 of the list is not valid JSON"),
        ("[]", "holds no rows"),
    ],
)
def test_item_38_a_json_list_that_is_none_is_one_line(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(InputError, match=says) as raised:
        read(tmp_path / "p.json")
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 300
