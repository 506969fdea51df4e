"""Prompts and comparisons from files: docs/method.md items 8, 10, 37, 38."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cai_ray.config.sources import Comparisons, PromptSource
from cai_ray.data.conversations import to_messages
from cai_ray.data.left_out import LeftOut
from cai_ray.data.overlap import check_disjoint
from cai_ray.data.sources import iter_rows, read_comparisons, read_prompts
from cai_ray.errors import InputError

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
    messages = to_messages(TALK)
    assert [m["role"] for m in messages] == ["user", "assistant", "user"]
    assert messages[0]["content"] == "Tell me: what is A: B?"
    assert messages[2]["content"] == "And Human: C?", "only a turn at a blank line is one"


def test_item_08_a_repeated_speaker_is_one_turn() -> None:
    """Published transcripts have such rows; the other answer of the pair has one turn there."""
    text = "\n\nHuman: a\n\nAssistant: b\n\nAssistant:  c"
    assert to_messages(text) == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b\n\nc"},
    ]


@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.gz", "p.parquet"])
def test_item_08_every_format_keeps_the_conversation(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, [{"text": TALK}, {"text": "plain"}])
    rows = read_prompts([PromptSource(path=path, kind="red_team")], seed=0)
    assert [len(r["messages"]) for r in rows] == [3, 1]
    assert len({r["id"] for r in rows}) == 2


def test_csv_has_commas_lines_and_empty_cells(tmp_path: Path) -> None:
    told = 'prompt,kind,family\n"one, ""two""\nthree",helpful,\nfour,red_team,privacy\n'
    (tmp_path / "p.csv").write_text(told)
    rows = read_prompts([PromptSource(path=str(tmp_path / "p.csv"))], seed=0)
    assert [(r["messages"][0]["content"], r["kind"], r["family"]) for r in rows] == [
        ('one, "two"\nthree', "helpful", None),
        ("four", "red_team", "privacy"),
    ]
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with gzip.open(tmp_path / "q.csv.gz", "wt", newline="") as f:
        csv.writer(f).writerows([["messages"], [json.dumps(said)]])
    (row,) = read_prompts([PromptSource(path=str(tmp_path / "q.csv.gz"), kind="helpful")], seed=0)
    assert row["messages"] == said[:1]


@pytest.mark.parametrize("form", [pa.ipc.new_stream, pa.ipc.new_file])
def test_a_folder_of_arrow_files(tmp_path: Path, form: Any) -> None:
    """As `datasets` saves a split: Arrow files beside descriptions of them."""
    for number, text in enumerate(("one", "two")):
        table = pa.table({"prompt": [text]})
        with form(tmp_path / f"data-{number:05d}-of-00002.arrow", table.schema) as out:
            out.write_table(table)
    (tmp_path / "state.json").write_text("{}")
    rows = read_prompts([PromptSource(path=str(tmp_path), kind="helpful")], seed=0)
    assert [r["messages"][0]["content"] for r in rows] == ["one", "two"]


def test_a_pattern_takes_some_files_of_a_folder(tmp_path: Path) -> None:
    for name in ("train-0", "train-1", "test-0"):
        write(tmp_path / f"{name}.parquet", [{"prompt": name}])
    source = PromptSource(path=str(tmp_path / "train-*.parquet"), kind="helpful")
    assert [r["messages"][0]["content"] for r in read_prompts([source], seed=0)] == ["train-0", "train-1"]
    with pytest.raises(InputError, match=r"valid-.*: no such files"):
        read_prompts([PromptSource(path=str(tmp_path / "valid-*"), kind="helpful")], seed=0)


def test_folders_of_splits_are_named_not_mixed(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        write(tmp_path / split / "a.parquet", [{"prompt": split}])
    with pytest.raises(InputError, match=r"its rows are in folders; name one of them \(test, train\)"):
        read_prompts([PromptSource(path=str(tmp_path), kind="helpful")], seed=0)


def test_near_duplicates_are_left_out_and_counted(tmp_path: Path) -> None:
    lock = "How do I open the lock of my neighbour's shed at night without a key?"
    path = write(tmp_path / "a.jsonl", [{"text": lock}, {"text": "What goes well with rice and beans?"}])
    texts = [lock, f"{lock}?", lock.upper(), lock.replace("night", "noon"), "Which lock is the best?"]
    more = write(tmp_path / "b.jsonl", [{"text": text} for text in texts])

    def read(threshold: float | None) -> tuple[list[str], dict[str, int]]:
        left_out = LeftOut()
        sources = [
            PromptSource(path=path, kind="red_team"),
            PromptSource(path=more, kind="red_team", near_duplicates=threshold),
        ]
        rows = read_prompts(sources, 0, left_out)
        return [r["messages"][0]["content"] for r in rows[2:]], dict(left_out)

    assert read(None) == (texts[1:], {"same": 1})
    assert read(0.7) == (texts[-1:], {"same": 1, "near": 3})
    assert read(0.9) == ([texts[3], texts[4]], {"same": 1, "near": 2})


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
    held = [{"messages": [{"role": "user", "content": text}]} for text in ("how do i fly?", "HOW do I fly?")]
    with pytest.raises(InputError, match=r"also a training prompt.*evaluate\.overlap=drop"):
        check_disjoint(train, held[:1])
    with pytest.raises(
        InputError, match=r"^each of 5 evaluation prompts is .*\('how do i fly\?', 'HOW.*', 'how.*', …\)"
    ):
        check_disjoint(train, [*held, *held, *held[:1]])


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
        ([{"query": "x"}], "row 1: no prompt .*text, chosen has a value, only query; set `column`"),
        ([{"text": "x"}], "kind None; set `kind: red_team` or `helpful` on the source"),
        ([{"text": 5, "kind": "helpful"}], "no conversation .*got 5"),
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
        ("b.jsonl", "row 1: not valid JSON"),
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
    (read,) = iter_rows(str(tmp_path / "p.jsonl"))
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
        ("p.jsonl", b'{"text": ' + b"1" * 5000 + b"}", "row 1: not valid JSON .*4300 digits"),
        ("p.jsonl", b'{"text": ' + b"[" * 200_000, "row 1: not valid JSON .*recursion"),
        ("p.json", b'{\n  "text": "a"\n}\n', "row 1: not valid JSON .*; give one JSON object per line"),
        ("p.jsonl", b'[{"text": "a"}]\n', r"row 1: not a JSON object \(give one JSON object per line\)"),
        ("p.csv", b"text\na,b\n", "row 1: more cells than the header"),
        ("p.csv", b'text\n"a\n', "cannot be read"),
        ("p.csv", b"messages\n[hello]\n", "row 1: `messages` is not a JSON list"),
        ("p.arrow", b"no stream", "cannot be read"),
        ("p.txt", b"a\n", r"is in another format; give a file or a folder of .jsonl, .jsonl.gz, .csv"),
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
    with pytest.raises(
        InputError, match=r"row 1: a wrong target \(target .* is not a number; give one in \(0\.5, 1\]"
    ):
        read_comparisons(Comparisons(path=write(tmp_path / "c.jsonl", [row])))
