"""Rows as people's files have them: read where their meaning is plain, otherwise left out and counted."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cai_ray.config.sources import Comparisons, PromptSource
from cai_ray.data.conversations import compared, prompt_of, to_messages
from cai_ray.data.left_out import LeftOut, OddRow
from cai_ray.data.sources import read_comparisons, read_prompts
from cai_ray.errors import InputError
from cai_ray.storage.arrow import to_table
from cai_ray.storage.records import Prompt

CALL = {"id": "1", "type": "function", "function": {"name": "w", "arguments": "{}"}}
IMAGE = {"type": "image_url", "image_url": {"url": "http://here/a.png"}}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def said(messages: list[Any]) -> list[tuple[str, str]]:
    return [(m["role"], m["content"]) for m in messages]


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def prompts(path: str, left_out: LeftOut | None = None) -> list[Prompt]:
    return read_prompts([PromptSource(path=path, kind="helpful")], 0, left_out)


ONE = [("user", "a")]
READ: list[tuple[dict[str, Any], list[tuple[str, str]]]] = [
    ({"messages": [user("a")]}, ONE),
    ({"messages": [user("a"), assistant("b")]}, ONE),
    ({"messages": [user([{"type": "text", "text": "two "}, {"type": "text", "text": "parts"}])]},
     [("user", "two parts")]),
    ({"messages": [user(["a", None])]}, ONE),
    ({"messages": [user({"type": "text", "text": "a", "image": None})]}, ONE),
    ({"messages": [{"role": "user", "parts": [{"text": "a"}]}]}, ONE),
    ({"messages": [{"role": "developer", "content": "Be brief."}, user("a")]}, [("system", "Be brief."), *ONE]),
    ({"messages": [{"role": "system", "content": None}, user("a")]}, ONE),
    ({"messages": [None, user("a")]}, ONE),
    ({"messages": [{"role": "User ", "content": "a", "tool_calls": None, "name": None}]}, ONE),
    ({"messages": [user("a"), assistant(None, tool_calls=[CALL])]}, ONE),
    ({"messages": [user("a"), assistant(None, tool_calls=[CALL]), {"role": "tool", "content": "rain"},
                   assistant("it rains")]}, ONE),
    ({"messages": [user("a"), assistant([IMAGE])]}, ONE),
    ({"messages": user("a")}, ONE),
    ({"messages": '[{"role": "user", "content": "a"}]'}, ONE),
    ({"messages": None, "prompt": "a"}, ONE),
    ({"messages": [], "prompt": "a"}, ONE),
    ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, ONE),
    ({"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "a"}]}, [("system", "s"), *ONE]),
    ({"conversation": [user("a"), assistant("b"), user("c"), assistant("d")]},
     [*ONE, ("assistant", "b"), ("user", "c")]),
    ({"prompt": [user("a")]}, ONE),
    ({"question": "a", "id": 7}, ONE),
    ({"text": "\r\n\r\nHuman: a\r\n\r\nAssistant: the answer"}, ONE),
    ({"text": "Human: a\n\nAssistant: the answer"}, ONE),
    ({"text": "Human: a\nAssistant: the answer"}, ONE),
    ({"text": "\n\nHuman: a\n\nAssistant:"}, ONE),
    ({"text": "\n \t\nHuman: a\n  \nAssistant: b\n\n\nHuman: c"}, [*ONE, ("assistant", "b"), ("user", "c")]),
    ({"text": "Human: a\n\nAssistant: Human: is how it begins.\nAssistant: too\n\nHuman: c"},
     [*ONE, ("assistant", "Human: is how it begins.\nAssistant: too"), ("user", "c")]),
    ({"text": "\n\nHuman: a\nAssistant: the answer"}, ONE),
    ({"text": "\r\rHuman: a\r\rAssistant: the answer"}, ONE),
    ({"text": "USER: a\nASSISTANT: the answer"}, ONE),
    ({"text": "human: a\n\nassistant: the answer"}, ONE),
    ({"text": "### Human: a### Assistant: b### Human: c"}, [*ONE, ("assistant", "b"), ("user", "c")]),
    ({"text": "System: s\n\nHuman: a\n\nAssistant: b"}, [("system", "s"), *ONE]),
    ({"text": "User: how do I log in?"}, [("user", "User: how do I log in?")]),
    ({"text": "Go on.\n\nHuman: hi\n\nAssistant:"}, [("user", "Go on.\n\nHuman: hi\n\nAssistant:")]),
    ({"conversations": {"from": ["human", "gpt"], "value": ["a", "b"]}}, ONE),
    ({"conversations": [{"speaker": "human", "text": "a"}]}, ONE),
    ({"messages": '{"role": "user", "content": "a"}'}, ONE),
    ({"prompt": '[{"from": "human", "value": "a"}]'}, ONE),
    ({"prompt": '{"a": 1}'}, [("user", '{"a": 1}')]),
    ({"prompt": '["role", "content"]'}, [("user", '["role", "content"]')]),
    ({"system": "s", "conversations": [{"from": "human", "value": "a"}]}, [("system", "s"), *ONE]),
    ({"system_prompt": "s", "question": "a"}, [("system", "s"), *ONE]),
    ({"system_prompt": "s", "messages": [{"role": "system", "content": "own"}, user("a")]},
     [("system", "own"), *ONE]),
    ({"system": "gpt-4", "prompt": "a", "system_prompt": 7}, ONE),
    ({"text": "one\r\ntwo"}, [("user", "one\ntwo")]),
    ({"text": "A human: what is it?"}, [("user", "A human: what is it?")]),
    ({"text": "Write a dialogue.\n\nHuman: hi"}, [("user", "Write a dialogue.\n\nHuman: hi")]),
    ({"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]}, ONE),
]  # fmt: skip


@pytest.mark.parametrize(("row", "messages"), READ, ids=[json.dumps(row)[:60] for row, _ in READ])
def test_a_prompt_is_read_where_its_meaning_is_plain(
    tmp_path: Path, row: dict[str, Any], messages: list[tuple[str, str]]
) -> None:
    (prompt,) = prompts(write(tmp_path / "p.jsonl", [row]))
    assert said(prompt["messages"]) == messages


ODD: list[tuple[Any, str]] = [
    ('{"prompt": "a"', "not valid JSON"),
    ("[1, 2]", "not a JSON object"),
    ({"messages": [user("weather?"), assistant(None, tool_calls=[CALL]), {"role": "tool", "content": "rain"},
                   user("so?")]}, "a tool's turn"),
    ({"messages": [user("a"), {"role": "function", "name": "f", "content": "b"}, user("c")]}, "a tool's turn"),
    ({"conversations": [{"from": "human", "value": "a"}, {"from": "observation", "value": "b"},
                        {"from": "human", "value": "c"}]}, "a tool's turn"),
    ({"messages": [user("a"), assistant("let me see", function_call={"name": "f"}), user("c")]}, "a tool's turn"),
    ({"messages": [user([{"type": "text", "text": "what is it?"}, IMAGE])]}, "an image in a turn"),
    ({"messages": [user([{"type": None, "image": {"path": "a.png"}}])]}, "an image in a turn"),
    ({"messages": [user([{"type": "input_audio", "input_audio": {}}])]}, "a part of a turn that is not a text"),
    ({"messages": [user([7])]}, "a part of a turn that is not a text"),
    ({"messages": [user(None)]}, "a turn without a text"),
    ({"messages": [user([])]}, "a turn without a text"),
    ({"messages": [{"role": "user"}]}, "a turn without a text"),
    ({"messages": [user("a"), assistant(None), user("c")]}, "a turn without a text"),
    ({"messages": [user(7)]}, "a content that is not a text"),
    ({"messages": [{"role": "robot", "content": "a"}]}, "a role that is not known"),
    ({"messages": [{"role": ["user"], "content": "a"}]}, "a role that is not known"),
    ({"messages": [{"content": "a"}]}, "a role that is not known"),
    ({"messages": ["a", user("b")]}, "a turn without a role"),
    ({"messages": ["a", "b"]}, "no conversation"),
    ({"messages": {"a": 1}}, "a role that is not known"),
    ({"messages": "[user: a]"}, "`messages` is not a JSON list"),
    ({"messages": [{"role": "system", "content": "no user"}]}, "no user turn to answer"),
    ({"messages": [assistant("b")]}, "no user turn to answer"),
    ({"messages": [user("a"), {"role": "system", "content": "s"}]}, "no user turn to answer"),
    ({"text": "\n\nAssistant: b"}, "no user turn to answer"),
    ({"messages": []}, "no prompt"),
    ({"messages": None}, "no prompt"),
    ({"query": "a"}, "no prompt"),
    ({}, "no prompt"),
    ({"text": "A chat.\n\nHuman: a\n\nAssistant: b"}, "a transcript behind other text"),
    ({"text": "<s>[INST] a [/INST] b </s>"}, "a text that a chat template made"),
    ({"text": "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb"}, "a text that a chat template made"),
    ({"prompt": ""}, "a blank prompt"),
    ({"prompt": " \n\t"}, "a blank prompt"),
    ({"text": "\n\nHuman:\n\nAssistant: b"}, "a blank prompt"),
    ({"prompt": 7}, "no conversation"),
    ({"prompt": True}, "no conversation"),
]  # fmt: skip


def test_odd_prompts_are_left_out_and_counted_with_their_places(tmp_path: Path) -> None:
    good = [{"prompt": f"question {n}"} for n in range(2)]
    for number, (row, reason) in enumerate(ODD):
        left_out = LeftOut()
        path = write(tmp_path / f"{number}.jsonl", [good[0], row, good[1]])
        assert len(prompts(path, left_out)) == 2, row
        assert dict(left_out) == {reason: 1}, row
        (line,) = left_out.lines
        assert line.startswith(f"{path}: 1 of 3 rows left out, {reason}") and line.endswith(": row 2")
        assert len(line) < 400 and "\n" not in line
        with pytest.raises(InputError, match="none of the 1 rows"):
            prompts(write(tmp_path / "alone.jsonl", [row]))


def test_the_rows_of_a_file_in_any_order(tmp_path: Path) -> None:
    """No row decides how another one is read, not even which column holds the prompt."""
    rows = [row for row, _ in READ] + [row for row, _ in ODD]
    forward, backward = LeftOut(), LeftOut()
    here = prompts(write(tmp_path / "a.jsonl", rows), forward)
    there = prompts(write(tmp_path / "b.jsonl", rows[::-1]), backward)
    assert {p["id"] for p in here} == {p["id"] for p in there}
    assert forward == backward and forward.total() - forward["same"] == len(ODD)


PAIRS: list[tuple[dict[str, Any], tuple[list[tuple[str, str]], str, str]]] = [
    ({"chosen": "\r\n\r\nHuman: a\r\n\r\nAssistant: b", "rejected": "\r\n\r\nHuman: a\r\n\r\nAssistant: c"},
     (ONE, "b", "c")),
    ({"chosen": "Human: a\n\nAssistant: b", "rejected": "Human: a\n\nAssistant: c"}, (ONE, "b", "c")),
    ({"question": "a", "chosen": "b", "rejected": "c"}, (ONE, "b", "c")),
    ({"prompt": "a", "chosen": [assistant("b")], "rejected": [assistant("c")]}, (ONE, "b", "c")),
    ({"prompt": "a", "chosen": assistant("b"), "rejected": assistant("c")}, (ONE, "b", "c")),
    ({"conversations": [{"from": "human", "value": "a"}], "chosen": {"from": "gpt", "value": "b"},
      "rejected": {"from": "gpt", "value": "c"}}, (ONE, "b", "c")),
    ({"prompt": "a", "chosen": '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]',
      "rejected": '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "c"}]'}, (ONE, "b", "c")),
    ({"system_prompt": "s", "question": "a", "chosen": "b", "rejected": "c"}, ([("system", "s"), *ONE], "b", "c")),
    ({"prompt": "a", "chosen": "A play:\n\nHuman: x\n\nAssistant: y", "rejected": "User: x\nAssistant: y"},
     (ONE, "A play:\n\nHuman: x\n\nAssistant: y", "User: x\nAssistant: y")),
    ({"prompt": "z", "chosen": [user("a"), assistant("y"), user("z"), assistant("b")],
      "rejected": [user("a"), assistant("y"), user("z"), assistant("c")]},
     ([*ONE, ("assistant", "y"), ("user", "z")], "b", "c")),
    ({"chosen": [{"role": "developer", "content": "s"}, user("a"), assistant(["b"])],
      "rejected": [{"role": "system", "content": "s"}, user("a"), assistant("c")]},
     ([("system", "s"), *ONE], "b", "c")),
]  # fmt: skip


@pytest.mark.parametrize(("row", "pair"), PAIRS, ids=[json.dumps(row)[:60] for row, _ in PAIRS])
def test_a_comparison_is_read_where_its_meaning_is_plain(
    tmp_path: Path, row: dict[str, Any], pair: tuple[list[tuple[str, str]], str, str]
) -> None:
    (read,) = read_comparisons(Comparisons(path=write(tmp_path / "c.jsonl", [row])))
    assert (said(read["messages"]), read["response_a"], read["response_b"]) == pair


ODD_PAIRS: list[tuple[Any, str]] = [
    ({"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c", "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c"},
     "`chosen` or `rejected` does not end with the assistant's turn"),
    ({"chosen": "\n\nHuman: a\n\nAssistant:", "rejected": "\n\nHuman: a\n\nAssistant: x"}, "an empty answer"),
    ({"prompt": "a", "chosen": " ", "rejected": "x"}, "an empty answer"),
    ({"prompt": "a", "chosen": "x", "rejected": ""}, "an empty answer"),
    ({"prompt": "a", "chosen": "x", "rejected": None}, "no `chosen` or no `rejected`"),
    ({"prompt": "a", "answer": "x"}, "no `chosen` or no `rejected`"),
    ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: b"}, "equal answers"),
    ({"prompt": "a", "chosen": "b", "rejected": "b\n"}, "equal answers"),
    ({"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
      "rejected": "\n\nHuman: a\n\nAssistant: other\n\nHuman: c\n\nAssistant: e"},
     "`chosen` and `rejected` differ before the assistant's last turn"),
    ({"chosen": "good", "rejected": "bad"}, "`chosen` or `rejected` does not end with the assistant's turn"),
    ({"chosen": "\n\nAssistant: b", "rejected": "\n\nAssistant: c"}, "no user turn to answer"),
    ({"prompt": " ", "chosen": "b", "rejected": "c"}, "a blank prompt"),
    ({"prompt": "a", "chosen": [], "rejected": "c"}, "no conversation"),
    ({"prompt": "a", "chosen": 1, "rejected": 2}, "no conversation"),
    ({"prompt": "a", "chosen": assistant(None, tool_calls=[CALL]), "rejected": "c"}, "a tool's turn"),
    ({"prompt": "a", "chosen": assistant([IMAGE]), "rejected": "c"}, "an image in a turn"),
    ({"prompt": "a", "chosen": "b", "rejected": "c", "target": 0.2}, "a wrong target"),
    ({"prompt": "a", "chosen": "b", "rejected": "c", "target": "high"}, "a wrong target"),
    ({"prompt": "a", "response_a": "b", "response_b": "c", "preferred": "both"}, "a wrong `preferred`"),
    ("{", "not valid JSON"),
]  # fmt: skip


def test_odd_comparisons_are_left_out_and_counted(tmp_path: Path) -> None:
    good = [{"prompt": "a", "chosen": "b", "rejected": f"c{n}"} for n in range(2)]
    for number, (row, reason) in enumerate(ODD_PAIRS):
        left_out = LeftOut()
        source = Comparisons(path=write(tmp_path / f"{number}.jsonl", [good[0], row, good[1]]))
        assert len(read_comparisons(source, 0, left_out)) == 2, row
        assert dict(left_out) == {reason: 1}, row


def test_columns_beside_the_prompt_may_hold_anything(tmp_path: Path) -> None:
    values: list[Any] = ["x", 3, 2.5, True, ["k", 1], {"a": {"b": None}}, None, "half \ud800"]
    path = write(tmp_path / "p.jsonl", [
        {"prompt": f"p{n}", "family": value, "source": value, "split": "train", "other": value}
        for n, value in enumerate(values)
    ])  # fmt: skip
    rows = prompts(path)
    assert [r["family"] for r in rows] == [
        "x",
        "3",
        "2.5",
        "True",
        '["k", 1]',
        '{"a": {"b": null}}',
        None,
        "half �",
    ]
    assert rows[1]["source"] == "3" and rows[6]["source"] == path
    to_table(rows, Prompt)
    table = pa.table({"prompt": ["a", "b"], "family": [1.5, float("nan")], "split": [None, None]})
    pq.write_table(table, tmp_path / "p.parquet")
    assert [r["family"] for r in prompts(str(tmp_path / "p.parquet"))] == ["1.5", None]


def test_the_bound_on_odd_rows_is_of_each_source(tmp_path: Path) -> None:
    good = [{"prompt": f"question {n}"} for n in range(38)]
    odd = [{"prompt": ""}, '{"prompt', {"prompt": " "}]
    path = write(tmp_path / "p.jsonl", good[:10] + odd + good[10:])
    assert len(prompts(path, LeftOut(0.1))) == 38
    with pytest.raises(InputError) as e:
        prompts(path, LeftOut(0.05))
    assert str(e.value) == (
        f"{path}: row 11: a blank prompt; 3 of the 41 rows of {path} cannot be used, more than max_error_rate=0.05; "
        "mend or remove them, or raise max_error_rate"
    )
    one = write(tmp_path / "one.jsonl", [good[0], odd[0]])
    assert len(prompts(one, LeftOut(0.05))) == 1, "one odd row is never the end"
    with pytest.raises(
        InputError, match=r"row 2: a blank prompt; 1 of the 2 rows .* and none may be left out"
    ):
        prompts(one, LeftOut(0.0))


def test_a_folder_names_the_file_and_three_rows_of_each_reason(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [{"prompt": "a"}])
    write(tmp_path / "b.jsonl", [{"prompt": "b"}, "", *[{"prompt": " "}] * 4, b"\xff".decode("latin-1")])
    (tmp_path / "c.jsonl").write_bytes(b'{"prompt": "caf\xe9"}\n{"prompt": "c"}\n')
    left_out = LeftOut()
    assert len(prompts(str(tmp_path), left_out)) == 3
    b, c = tmp_path / "b.jsonl", tmp_path / "c.jsonl"
    assert left_out.lines == [
        f"{tmp_path}: 4 of 9 rows left out, a blank prompt: {b}: row 3, {b}: row 4, {b}: row 5, …",
        f"{tmp_path}: 1 of 9 rows left out, not valid JSON (Expecting value; give one JSON object per line): "
        f"{b}: row 7",
        f"{tmp_path}: 1 of 9 rows left out, not UTF-8: {c}: row 1",
    ]


def test_what_datasets_computed_beside_a_saved_split_is_no_data(tmp_path: Path) -> None:
    for name, text in (("data-00000-of-00001.arrow", "a"), ("cache-0123456789abcdef.arrow", "b"),
                       ("cache-0123456789abcdef_00000_of_00002.arrow", "c")):  # fmt: skip
        table = pa.table({"prompt": [text]})
        with pa.ipc.new_stream(tmp_path / name, table.schema) as out:
            out.write_table(table)
    assert [p["messages"][0]["content"] for p in prompts(str(tmp_path))] == ["a"]


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["role", "content", "from", "value", "type", "text", "parts", "tool_calls"]), inner, max_size=3
    ),
    max_leaves=8,
)  # fmt: skip
NAMES = st.sampled_from(
    ["messages", "conversations", "prompt", "text", "chosen", "rejected", "family", "other"]
)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.dictionaries(NAMES, ANYTHING, max_size=4))
def test_any_row_is_read_or_odd(row: dict[str, Any]) -> None:
    """Whatever is read is a conversation of texts that somebody asks something in; nothing else is raised."""
    for read in (prompt_of, lambda r: compared(r)[0]):
        messages, odd = None, ""
        try:
            messages = read(row)
        except OddRow as e:
            odd = str(e)
        if messages is None:
            assert 0 < len(odd) < 400
            continue
        assert messages[-1]["role"] == "user" and messages[-1]["content"].strip()
        for turn in messages:
            assert turn["role"] in ("system", "user", "assistant") and isinstance(turn["content"], str)


TURNS = st.lists(st.text("ab:?\n ").map(str.strip).filter(bool), min_size=1, max_size=5)


@given(TURNS, st.sampled_from(["\n\n", "\r\n\r\n"]), st.booleans())
def test_a_transcript_is_what_its_speakers_said(turns: list[str], blank: str, leading: bool) -> None:
    speakers = ("Human", "Assistant")
    text = "".join(f"{blank}{speakers[n % 2]}: {turn}" for n, turn in enumerate(turns))
    messages = to_messages(text if leading else text.removeprefix(blank))
    assert [m["content"] for m in messages] == turns
    assert [m["role"] for m in messages] == [("user", "assistant")[n % 2] for n in range(len(turns))]
