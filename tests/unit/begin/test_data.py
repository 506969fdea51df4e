"""How a first run's data are split."""

import json
from pathlib import Path
from typing import Any

from cai_ray.begin.data import read_data, split
from cai_ray.storage.records import Prompt, derive_id


def prompts(kind: str, count: int, **more: Any) -> list[Prompt]:
    rows = []
    for i in range(count):
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"{kind} {i}"}]
        row = {"messages": messages, "kind": kind, "split": "train", "source": "s", "family": None, **more}
        rows.append({"id": derive_id(row), **row})
    return rows


def test_every_prompt_is_in_one_part_whatever_the_order() -> None:
    rows = prompts("red_team", 200) + prompts("helpful", 40)
    parts = split(rows)
    assert sorted(r["id"] for part in parts.values() for r in part) == sorted(r["id"] for r in rows)
    assert {part: len(found) for part, found in parts.items()} == {
        "train": 204,
        "development": 12,
        "held_out": 24,
    }
    assert split(rows[::-1]) == parts
    assert {r["kind"] for r in parts["train"][:40]} == {"red_team", "helpful"}, "kinds are mixed"


def test_few_prompts_are_still_in_every_part() -> None:
    parts = split(prompts("red_team", 8))
    assert {part: len(found) for part, found in parts.items()} == {
        "train": 4,
        "development": 2,
        "held_out": 2,
    }


def test_conversations_that_begin_alike_stay_together() -> None:
    rows = prompts("red_team", 30)
    more = [
        {
            **row,
            "id": f"{row['id']}{n}",
            "messages": [*row["messages"], {"role": "assistant", "content": str(n)}],
        }
        for row in rows
        for n in range(3)
    ]
    parts = split([*rows, *more])
    begins = [{r["messages"][1]["content"] for r in part} for part in parts.values()]
    assert sum(map(len, begins)) == 30


def test_a_split_of_the_data_is_kept() -> None:
    rows = [
        *prompts("red_team", 9),
        *prompts("helpful", 3, split="held"),
        *prompts("helpful", 2, split="dev"),
    ]
    parts = split(rows)
    assert {part: len(found) for part, found in parts.items()} == {
        "train": 9,
        "development": 2,
        "held_out": 3,
    }


def test_odd_rows_at_the_beginning_are_left_out(tmp_path: Path) -> None:
    """Also where the kind is looked for, and the lengths of answers."""
    path = tmp_path / "mixed.jsonl"
    talk = [
        {"prompt": f"How do I open tin number {n}{n}?", "chosen": "b", "kind": "red_team"} for n in range(20)
    ]
    path.write_text('{"prompt": \n[1]\n' + "".join(json.dumps(row) + "\n" for row in talk))
    read = read_data([(str(path), None)], None)
    assert {p["kind"] for p in read.prompts} == {"red_team"} and read.answers
    assert read.left_out["not valid JSON"] == read.left_out["not a JSON object"] == 1
