"""Prompts and comparisons from files: docs/method.md items 8, 10, 37, 38."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cai_ray.config import Comparisons, PromptSource
from cai_ray.errors import InputError
from cai_ray.generate.sources import check_disjoint, read_comparisons, read_prompts, read_rows, to_messages

TALK = "\n\nHuman: Tell me: what is A: B?\n\nAssistant: It is a ratio.\n\nHuman: And Human: C?"


def write(path: Path, rows: list[dict]) -> str:
    text = "".join(json.dumps(r) + "\n" for r in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text(text)
    return str(path)


def test_item_08_all_turns_of_a_transcript_are_kept() -> None:
    messages = to_messages(TALK, "x")
    assert [m["role"] for m in messages] == ["user", "assistant", "user"]
    assert messages[0]["content"] == "Tell me: what is A: B?"
    assert messages[2]["content"] == "And Human: C?", "only a turn at a blank line is one"


def test_item_08_a_repeated_speaker_is_one_turn() -> None:
    """Published transcripts have such rows; the other answer of the pair has one turn there."""
    text = "\n\nHuman: a\n\nAssistant: b\n\nAssistant:  c"
    assert to_messages(text, "here") == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b\n\nc"},
    ]


@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.gz", "p.parquet"])
def test_item_08_every_format_keeps_the_conversation(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, [{"text": TALK}, {"text": "plain"}])
    rows = read_prompts([PromptSource(path=path, kind="red_team")], seed=0)
    assert [len(r["messages"]) for r in rows] == [3, 1]
    assert len({r["id"] for r in rows}) == 2


def test_a_folder_of_parquet_and_the_same_prompt_twice(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [{"prompt": "one"}])
    write(tmp_path / "b.parquet", [{"prompt": "two"}, {"prompt": "one"}])
    rows = read_prompts([PromptSource(path=str(tmp_path), kind="helpful")], seed=0)
    assert [r["messages"][0]["content"] for r in rows] == ["one", "two"]


def test_item_37_a_row_has_the_same_id_wherever_it_stands(tmp_path: Path) -> None:
    texts = [f"what is {n} ?" for n in range(9)]
    ids = []
    for name, order in (("a.jsonl", texts), ("b.parquet", texts[::-1])):
        path = write(tmp_path / name, [{"prompt": t} for t in order])
        read = read_prompts([PromptSource(path=path, kind="helpful")], seed=len(ids))
        ids.append({r["messages"][0]["content"]: r["id"] for r in read})
    assert ids[0] == ids[1] and len(set(ids[0].values())) == len(texts)


def test_item_10_an_evaluation_prompt_may_not_be_a_training_prompt() -> None:
    train = [{"messages": [{"role": "user", "content": "How do  I\nfly?"}]}]
    check_disjoint(train, [{"messages": [{"role": "user", "content": "how do i swim?"}]}])
    with pytest.raises(InputError, match="also a training prompt"):
        check_disjoint(train, [{"messages": [{"role": "user", "content": "how do i fly?"}]}])


def test_comparisons_in_the_published_format(tmp_path: Path) -> None:
    path = write(
        tmp_path / "c.jsonl",
        [{"chosen": TALK + "\n\nAssistant: good", "rejected": TALK + "\n\nAssistant: bad"}],
    )
    (row,) = read_comparisons(Comparisons(path=path, target=0.9))
    assert (row["response_a"], row["response_b"], row["p_a"], len(row["messages"])) == ("good", "bad", 0.9, 3)
    assert row["source"] == "human"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "what?", "chosen": "good", "rejected": "bad"},
        {
            "prompt": "what?",
            "chosen": "\n\nHuman: what?\n\nAssistant: good",
            "rejected": "\n\nAssistant: bad",
        },
        {
            "messages": [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "good"}],
            "chosen": [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "good"}],
            "rejected": [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "bad"}],
        },
    ],
)
def test_comparisons_in_other_common_layouts(tmp_path: Path, row: dict[str, Any]) -> None:
    """`messages` may end with the chosen answer; answers may be texts, transcripts or conversations."""
    (read,) = read_comparisons(Comparisons(path=write(tmp_path / "c.jsonl", [row])))
    assert read["messages"] == [{"role": "user", "content": "what?"}]
    assert (read["response_a"], read["response_b"]) == ("good", "bad")


def test_a_target_of_zero_is_no_missing_target(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", [{"prompt": "what?", "chosen": "a", "rejected": "b", "target": 0.0}])
    with pytest.raises(InputError, match=r"target 0\.0 is not in"):
        read_comparisons(Comparisons(path=path))


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"question": "x"}], "no column messages or prompt or text or chosen; it has question"),
        ([{"text": "x"}], "kind None"),
        ([{"text": 5, "kind": "helpful"}], "is no conversation"),
        ([{"messages": [{"role": "robot", "content": "x"}], "kind": "helpful"}], "role 'robot'"),
    ],
)
def test_item_38_a_bad_source_is_one_clear_error(tmp_path: Path, rows: list[dict], says: str) -> None:
    path = write(tmp_path / "p.jsonl", rows)
    with pytest.raises(InputError, match=says):
        read_prompts([PromptSource(path=path)], seed=0)


def test_item_38_missing_empty_and_broken_files(tmp_path: Path) -> None:
    (tmp_path / "e.jsonl").write_text("")
    (tmp_path / "b.jsonl").write_text("{]\n")
    (tmp_path / "b.parquet").write_text("no parquet")
    for name, says in (
        ("none.jsonl", "no such file"),
        ("e.jsonl", "no rows"),
        ("b.jsonl", "line 1 is no JSON"),
        ("b.parquet", "cannot be read"),
    ):
        with pytest.raises(InputError, match=says):
            read_prompts([PromptSource(path=str(tmp_path / name), kind="helpful")], seed=0)


def test_lone_surrogates_of_any_column_are_replaced(tmp_path: Path) -> None:
    """In every column, since no file takes them; what is legal stays as it is."""
    row = {
        "prompt": "a\ud800 😀",
        "family": "f\udfff",
        "kind": "red_team",
        "n": {"\ud800": ["\udc00", 1.5, None]},
    }
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n")
    (read,) = read_rows(str(tmp_path / "p.jsonl"))
    assert read == {
        "prompt": "a� 😀",
        "family": "f�",
        "kind": "red_team",
        "n": {"�": ["�", 1.5, None]},
    }
    pa.Table.from_pylist(read_prompts([PromptSource(path=str(tmp_path / "p.jsonl"))], 0))


def test_lone_surrogates_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"text": "a \\ud800 b"}\n')
    (row,) = read_prompts([PromptSource(path=str(tmp_path / "p.jsonl"), kind="helpful")], seed=0)
    row["messages"][0]["content"].encode("utf-8")


@pytest.mark.parametrize(
    ("name", "raw", "says"),
    [
        ("p.jsonl.gz", gzip.compress(b"x" * 999)[:10] + b"\xff" * 99, "cannot be read"),
        ("p.jsonl", b'{"text": ' + b"1" * 5000 + b"}", "line 1 is no JSON .*4300 digits"),
        ("p.jsonl", b'{"text": ' + b"[" * 200_000, "line 1 is no JSON .*recursion"),
        ("p.json", b'{\n  "text": "a"\n}\n', "line 1 is no JSON .*; give one JSON object per line"),
        ("p.json", b'[{"text": "a"}]\n', "line 1 is no JSON object; give one JSON object per line"),
        ("p.csv", b"text\na\n", r"is neither JSONL \(.jsonl, .jsonl.gz\) nor parquet, nor a folder"),
        ("p.txt", b"a\n", "is neither JSONL"),
    ],
)
def test_item_38_files_that_hold_no_rows_as_wanted(tmp_path: Path, name: str, raw: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(InputError, match=f"{name}: {says}"):
        read_prompts([PromptSource(path=str(tmp_path / name), kind="helpful")], seed=0)


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\n')
    (row,) = read_prompts([PromptSource(path=str(tmp_path / "p.jsonl"), kind="helpful")], seed=0)
    assert row["messages"] == [{"role": "user", "content": "a"}]


@pytest.mark.parametrize("target", ["high", [0.9], pytest.param(10**400, id="huge")])
def test_item_38_a_target_that_is_no_number(tmp_path: Path, target: Any) -> None:
    row = {"prompt": "what?", "chosen": "a", "rejected": "b", "target": target}
    with pytest.raises(InputError, match=r"row 1: target .* is no number; give one in \(0\.5, 1\]"):
        read_comparisons(Comparisons(path=write(tmp_path / "c.jsonl", [row])))
