"""Published evaluation sets: their formats, what is asked, and what is counted."""

import asyncio
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cai_ray import pipeline
from cai_ray.config.evaluation import EvalSet, EvaluateConfig
from cai_ray.config.load import load_config
from cai_ray.data import set_formats
from cai_ray.data.left_out import LeftOut
from cai_ray.engine.scripted import ScriptedEngine
from cai_ray.errors import InputError, RowError
from cai_ray.evaluate import harness, sets
from cai_ray.evaluate.policies import AnswerChain
from cai_ray.evaluate.score import Dialogue
from cai_ray.prompts.load import load_templates
from cai_ray.prompts.templates import TemplateSet
from cai_ray.provenance.inputs import inputs
from cai_ray.report.measures import sets as report_sets
from cai_ray.stages import STAGES
from cai_ray.storage.arrow import to_table
from cai_ray.storage.records import SetAnswer
from cai_ray.storage.run import Run

PAIR = {
    "chosen": "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: knife?\n\nAssistant: no",
    "rejected": "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: knife?\n\nAssistant: sure",
}
MMLU = {"question": "2 + 2?", "choices": ["3", "4", "5", "22"], "answer": 1}
TEMPLATES = load_templates("general")


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return str(path)


def read(folder: Path, kind: str, *rows: dict[str, Any], **more: Any) -> list[dict[str, Any]]:
    path = write(folder / "set.jsonl", list(rows))
    return set_formats.read(EvalSet.model_validate({"name": "s", "path": path, "kind": kind, **more}))


# ------------------------------------------------------------------------------------------------------------- formats


def test_comparisons_keep_the_conversation_and_the_chosen_answer_first(tmp_path: Path) -> None:
    [row] = read(tmp_path, "comparisons", PAIR)
    assert [m["content"] for m in row["messages"]] == ["hi", "hello", "knife?"]
    assert (row["options"], row["correct"]) == (["no", "sure"], [0])


@pytest.mark.parametrize(
    ("row", "question", "options", "correct"),
    [
        ({"input": "Sky?", "target_scores": {"green": 0, "blue": 1}}, "Sky?", ["green", "blue"], [1]),
        ({"input": "Sky?", "target_scores": {"a": 1, "b": 0, "c": 1}}, "Sky?", ["a", "b", "c"], [0, 2]),
        (
            {"input": "Help?", "targets": {"choices": ["x", "y"], "labels": [0, 1]}},
            "Help?",
            ["x", "y"],
            [1],
        ),
        (
            {
                "context": "Two people.",
                "question": "Who?",
                "ans0": "A",
                "ans1": "B",
                "ans2": "Unknown",
                "label": 2,
            },
            "Two people. Who?",
            ["A", "B", "Unknown"],
            [2],
        ),
        (MMLU, "2 + 2?", ["3", "4", "5", "22"], [1]),
        ({**MMLU, "answer": "D"}, "2 + 2?", ["3", "4", "5", "22"], [3]),
        ({**MMLU, "answer": "2"}, "2 + 2?", ["3", "4", "5", "22"], [2]),
        ({"question": "q", "options": ["n", "m"], "answer": 0}, "q", ["n", "m"], [0]),
        (
            {"question": "q", "choices": {"text": ["n", "m"], "label": ["1", "2"]}, "answerKey": "2"},
            "q",
            ["n", "m"],
            [1],
        ),
        (
            {
                "question": "q",
                "mc1_targets": {"choices": ["n", "m"], "labels": [1, 0]},
                "mc2_targets": {"choices": ["n", "m"], "labels": [1, 0]},
            },
            "q",
            ["n", "m"],
            [0],
        ),
    ],
)
def test_each_format_of_choices(
    tmp_path: Path, row: dict[str, Any], question: str, options: list[str], correct: list[int]
) -> None:
    [found] = read(tmp_path, "choices", row)
    assert found["messages"] == [{"role": "user", "content": question}]
    assert (found["options"], found["correct"]) == (options, correct)


def test_a_task_file_of_big_bench_is_one_object_over_many_lines(tmp_path: Path) -> None:
    examples = [{"input": str(i), "target_scores": {"yes": 1, "no": 0}} for i in range(3)]
    path = tmp_path / "task.json"
    path.write_text(json.dumps({"name": "hhh", "examples": examples}, indent=2))
    given = EvalSet(name="s", path=str(path), kind="choices", limit=2)
    assert [r["messages"][0]["content"] for r in set_formats.read(given)] == ["0", "1"]


def test_options_of_other_rows_are_left_out_where_a_table_has_one_column_for_each(tmp_path: Path) -> None:
    rows = [
        {"input": "a", "target_scores": {"x": 1, "y": 0}},
        {"input": "b", "target_scores": {"z": 0, "w": 1}},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    found = set_formats.read(EvalSet(name="s", path=str(tmp_path / "t.parquet"), kind="choices"))
    assert [dict(zip(r["options"], range(2), strict=True)).keys() for r in found] == [{"x", "y"}, {"z", "w"}]
    assert [r["options"][r["correct"][0]] for r in found] == ["x", "w"]


@pytest.mark.parametrize(
    ("row", "more", "unsafe"),
    [
        ({"prompt": "kill a process", "label": "safe"}, {}, False),
        ({"prompt": "kill a man", "label": "unsafe"}, {"expect": "comply"}, True),
        ({"prompt": "kill a man", "type": "contrast_homonyms"}, {"expect": "comply"}, True),
        ({"prompt": "kill a process", "type": "homonyms"}, {"expect": "comply"}, False),
        ({"prompt": "p", "category": "deception"}, {"expect": "refuse"}, True),
        ({"question": "p"}, {"expect": "refuse"}, True),
        ({"goal": "p", "target": "Sure"}, {"expect": "refuse"}, True),
        ({"Goal": "p", "Behavior": "short"}, {"expect": "refuse"}, True),
        ({"instruction": "p"}, {"expect": "comply"}, False),
    ],
)
def test_each_format_of_refusals(
    tmp_path: Path, row: dict[str, Any], more: dict[str, Any], unsafe: bool
) -> None:
    [found] = read(tmp_path, "refusals", row, **more)
    assert found["unsafe"] is unsafe
    assert found["messages"] == [{"role": "user", "content": next(iter(row.values()))}]


ODD: list[tuple[str, Any, str]] = [
    ("refusals", {"prompt": "p"}, r"no `label` safe or unsafe \(set `expect"),
    ("refusals", {"text": "p", "label": "safe"}, r"no prompt \(it has none of prompt, question.*but text, label"),
    ("refusals", {"prompt": 7, "label": "safe"}, r"a column that is not a text \(`prompt` is 7"),
    ("refusals", [], "not a JSON object"),
    ("choices", {"q": "?"}, r"no known format \(none of target_scores.*but q"),
    ("choices", {**MMLU, "answer": 4}, r"an answer that is none of the options \(4 is none of 0, 1, 2, 3"),
    ("choices", {**MMLU, "answer": "E"}, r"an answer that is none of the options \('E' is none of A, B, C, D"),
    ("choices", {**MMLU, "answer": None}, "an answer that is none of the options"),
    ("choices", {**MMLU, "answer": True}, "an answer that is none of the options"),
    ("choices", {**MMLU, "question": None}, "a column that is not a text"),
    ("choices", {**MMLU, "choices": ["one", ""]}, "not two options with a text"),
    ("choices", {**MMLU, "choices": {"text": "a", "label": ["A"]}}, r"a column that is not a list \(`text` is 'a'"),
    ("choices", {"input": "i", "target_scores": {"a": 0, "b": 0}}, "no right or no wrong option"),
    ("choices", {"input": "i", "target_scores": {"a": "x", "b": 0}}, "a score of an option that is not a number"),
    ("choices", {**MMLU, "choices": list("abcdefg"), "answer": 0}, r"more options than letters \(7 .*`letters`"),
    ("choices", {"question": "q", "mc1_targets": {"choices": ["a", "b"], "labels": [1]}}, "not as many labels"),
    ("comparisons", {"chosen": "x"}, "no `chosen` or no `rejected`"),
    ("comparisons", {**PAIR, "rejected": PAIR["chosen"]}, "equal answers"),
]  # fmt: skip
FINE = {"refusals": {"prompt": "p", "label": "safe"}, "choices": MMLU, "comparisons": PAIR}


@pytest.mark.parametrize(("kind", "row", "says"), ODD)
def test_an_odd_row_is_left_out_and_named_with_the_remedy(
    tmp_path: Path, kind: str, row: dict[str, Any], says: str
) -> None:
    given = {"name": "s", "kind": kind, **({"letters": list("ABCDEF")} if kind == "choices" else {})}
    path, left_out = write(tmp_path / "set.jsonl", [FINE[kind], row]), LeftOut()
    assert len(set_formats.read(EvalSet.model_validate({**given, "path": path}), 0, left_out)) == 1
    (line,) = left_out.lines
    assert re.match(rf"{path}: 1 of 2 rows left out, {says}", line) and line.endswith(": row 2")
    with pytest.raises(
        InputError, match=r"row 1: .*; none of the 2 rows of .*set\.jsonl can be used"
    ) as raised:
        read(tmp_path, kind, row, row, **({"letters": list("ABCDEF")} if kind == "choices" else {}))
    assert "\n" not in str(raised.value)


def test_a_question_that_comes_twice_is_used_once(tmp_path: Path) -> None:
    assert len(read(tmp_path, "choices", MMLU, MMLU, {**MMLU, "answer": 0})) == 2


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("[{name: a, path: x, kind: choices}, {name: a, path: y, kind: refusals}]", "two sets are named 'a'"),
        ("[{name: 'a/b', path: x, kind: choices}]", r"sets\.0\.name"),
        ("[{name: a, path: x, kind: choices, expect: refuse}]", "say themselves what is right"),
        ("[{name: a, path: x, kind: choices, ask: 'Which?'}]", r"ask lacks \{question\}"),
    ],
)
def test_settings_that_cannot_be(given: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        load_config("errand-town", [f"evaluate.sets={given}"])


# -------------------------------------------------------------------------------------------------- asking and counting


def asked(given: EvalSet, rows: list[dict[str, Any]], engine: ScriptedEngine) -> list[dict[str, Any]]:
    """The rows as a policy called `base` leaves them."""
    answer = AnswerChain(TEMPLATES, EvaluateConfig(), 0)
    chain = sets.SetChain(answer, TEMPLATES, {given.name: given})

    async def walk() -> list[dict[str, Any]]:
        return [await chain(engine, sets._task("base", row)) for row in rows]

    found = asyncio.run(walk())
    return to_table(found, SetAnswer).to_pylist()  # as they come back from a file


CHOICES = EvalSet(name="s", path="x", kind="choices")


def shown(messages: list[dict[str, str]]) -> dict[str, str]:
    """The options in a question, by their letters."""
    lines = messages[-1]["content"].split("\n\n")[1].split("\n")
    return {text: letter for letter, text in (line.split(". ", 1) for line in lines)}


def test_a_policy_that_knows_is_right_wherever_the_answer_stands(tmp_path: Path) -> None:
    def knows(messages: list[dict[str, str]], options: Any) -> list[float]:
        right = shown(messages)["4"]
        return [0.0 if letter == right else -5.0 for letter in options]

    [row] = asked(CHOICES, read(tmp_path, "choices", MMLU), ScriptedEngine(weigh=knows))
    assert row["scores"][1] > 0.9 and sum(row["scores"]) == pytest.approx(1)
    assert row["usage"]["calls"] == 4
    assert sets.measure([CHOICES], [row], ["base"])["s"]["models"]["base"]["accuracy"]["value"] == 1


@pytest.mark.parametrize("answer", [0, 1, 3])
def test_a_liking_for_a_letter_cancels(tmp_path: Path, answer: int) -> None:
    """A policy that looks at letters alone is right as often as chance is."""
    likes = ScriptedEngine(weigh=lambda messages, options: [-0.1, -3.0, -1.0, -9.0][: len(options)])
    [row] = asked(CHOICES, read(tmp_path, "choices", {**MMLU, "answer": answer}), likes)
    assert row["scores"] == pytest.approx([0.25] * 4)
    assert sets.measure([CHOICES], [row], ["base"])["s"]["models"]["base"]["accuracy"]["value"] == 0.25


def test_no_number_is_an_error_of_the_row(tmp_path: Path) -> None:
    nothing = ScriptedEngine(weigh=lambda messages, options: [float("nan")] * len(options))
    with pytest.raises(RowError, match="no finite log-probability"):
        asked(CHOICES, read(tmp_path, "choices", MMLU), nothing)


def test_an_option_is_data_in_the_question() -> None:
    row = {"messages": [{"role": "user", "content": "{choices} or {question}?"}]}
    [message] = sets._question(CHOICES, row, ["{question}", "b"])
    assert message["content"].startswith("{choices} or {question}?\n\nA. {question}\nB. b\n\n")


def test_refusals_are_counted_apart_for_safe_and_unsafe(tmp_path: Path) -> None:
    given = EvalSet(name="s", path="x", kind="refusals")
    rows = read(
        tmp_path,
        "refusals",
        *({"prompt": f"bad {i}", "label": "unsafe"} for i in range(4)),
        *({"prompt": f"fine {i}", "label": "safe"} for i in range(2)),
    )
    declines = ("bad 0", "bad 1", "bad 2", "fine 0")

    def answer(messages: list[dict[str, str]], sampling: Any) -> str:
        return "I'm sorry, no." if messages[-1]["content"] in declines else "Sure. I'm sorry it takes long."

    done = asked(given, rows, ScriptedEngine(answer))
    done.append({**done[0], "model": "sl", "refused": None, "error": "too long"})
    found = sets.measure([given], done, ["base", "sl"])["s"]
    assert (found["kind"], found["n"]) == ("refusals", 6)
    rates = found["models"]["base"]
    assert (rates["refused_unsafe"]["value"], rates["refused_unsafe"]["n"]) == (0.75, 4)
    assert (rates["refused_safe"]["value"], rates["refused_safe"]["n"]) == (0.5, 2)
    assert found["models"]["sl"]["refused_unsafe"]["n"] == 0, "a row that failed counts nowhere"


def test_the_reward_model_is_right_where_it_orders_as_people_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = [
        {"prompt": f"q{i}", "chosen": good, "rejected": bad}
        for i, (good, bad) in enumerate([("longer", "short"), ("a", "abc"), ("ab", "cd")])
    ]
    path = write(tmp_path / "hh.jsonl", [PAIR, *others])  # of PAIR the shorter answer is the chosen one

    def by_length(run: Run, dialogues: list[Dialogue]) -> list[float | None]:
        return [None if "sure" in d.response else float(len(d.response)) for d in dialogues]

    monkeypatch.setattr("cai_ray.evaluate.score.rewards", by_length)
    given = f"evaluate.sets=[{{name: hh, path: '{path}', kind: comparisons}}]"

    def measured(*more: str) -> dict[str, Any]:
        run = Run(load_config("errand-town", [given, *more], out=str(tmp_path / "run")))
        found, made = sets.evaluate(run, ["base"], None)  # type: ignore[arg-type]
        assert made == []
        return found["hh"]["models"]["reward_model"]["accuracy"]

    rate = measured()
    assert (rate["value"], rate["n"]) == (0.5, 3), "one right, one wrong, one tie; one could not be encoded"
    rows = pq.read_table(tmp_path / "run/evaluate/sets-reward_model-00000.parquet").to_pylist()
    assert (
        sorted((r["error"] is None, len(r["scores"] or [])) for r in rows) == [(False, 0)] + [(True, 2)] * 3
    )
    assert measured("method=dpo")["n"] == 0


# ---------------------------------------------------------------------------------------------- before any work is done


def town(tmp_path: Path, *given: str) -> Run:
    return Run(load_config("errand-town", list(given), out=str(tmp_path / "run")))


def evaluated(run: Run) -> str:
    """What stage `evaluate` depends on by its own section."""
    wanted = STAGES["evaluate"]
    STAGES["evaluate"] = wanted._replace(needs=())
    try:
        return inputs(run, "evaluate")["evaluate"]
    finally:
        STAGES["evaluate"] = wanted


def test_inputs_change_with_a_set_and_with_its_content(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [{"prompt": "p", "label": "safe"}])
    given = f"evaluate.sets=[{{name: x, path: '{path}', kind: refusals}}]"
    without, first = evaluated(town(tmp_path)), evaluated(town(tmp_path, given))
    assert first not in (without, evaluated(town(tmp_path, given[:-2] + ", limit: 1}]")))
    assert first == evaluated(town(tmp_path, given))
    write(tmp_path / "x.jsonl", [{"prompt": "q", "label": "safe"}])
    assert first != evaluated(town(tmp_path, given))


def test_inputs_change_with_task_files(tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    folder.mkdir()
    given = f"evaluate.harness={{tasks: [t], include_path: '{folder}'}}"
    (folder / "t.yaml").write_text("task: t")
    first = evaluated(town(tmp_path, given))
    (folder / "t.yaml").write_text("task: u")
    assert first != evaluated(town(tmp_path, given))


@pytest.mark.parametrize(
    ("row", "more", "says"),
    [
        ({"prompt": "p"}, "kind: refusals", "x.jsonl: row 1: no `label`"),
        (MMLU, "kind: choices", "option 'A' is .* tokens.*set `letters` of evaluate.sets 'x'"),
        (MMLU, "kind: choices, letters: [sure, sure, the, fine]", "are the same token; set `letters` of"),
        (MMLU, "kind: choices, letters: [sure, sorry, the, fine]", None),
        ({"prompt": "how do i read a star ?", "label": "unsafe"}, "kind: refusals", None),
    ],
)
def test_item_38_a_check_reads_the_sets(
    tmp_path: Path, row: dict[str, Any], more: str, says: str | None
) -> None:
    path = write(tmp_path / "x.jsonl", [row])
    run = town(tmp_path, f"evaluate.sets=[{{name: x, path: '{path}', {more}}}]")
    if says is None:
        pipeline.check_inputs(run.config, ["evaluate"])
        return
    with pytest.raises(InputError, match=says):
        pipeline.check_inputs(run.config, ["evaluate"])


def test_odd_rows_of_a_set_are_bounded_told_by_the_check_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{**PAIR, "chosen": f"{PAIR['chosen']} {n}"} for n in range(40)]
    path = write(
        tmp_path / "x.jsonl", [*rows[:5], {**PAIR, "rejected": PAIR["chosen"]}, {"q": "?"}, *rows[5:]]
    )
    given = f"evaluate.sets=[{{name: x, path: '{path}', kind: comparisons}}]"
    told: list[str] = []
    pipeline.check_inputs(town(tmp_path, given).config, ["evaluate"], say=told.append)
    assert [line.rpartition(": ")[2] for line in told if "x.jsonl" in line] == ["row 6", "row 7"]
    with pytest.raises(InputError, match=r"2 of the 42 rows of .* more than max_error_rate=0\.02"):
        pipeline.check_inputs(town(tmp_path, given, "max_error_rate=0.02").config, ["evaluate"])
    monkeypatch.setattr("cai_ray.evaluate.score.rewards", lambda run, dialogues: [1.0] * len(dialogues))
    measured, _ = sets.evaluate(town(tmp_path, given), ["base"], None)  # type: ignore[arg-type]
    assert measured["x"]["left_out"] == {"equal answers": 1, "no `chosen` or no `rejected`": 1}
    assert measured["x"]["n"] == 40
    table = report_sets({"sets": measured})
    assert table and table.rows[0][-1] == "40, 2 left out"


def test_item_10_a_request_of_a_set_is_no_training_prompt(tmp_path: Path) -> None:
    from cai_ray.data.sources import read_prompts

    config = town(tmp_path).config
    text = read_prompts(config.prompts, config.seed)[0]["messages"][0]["content"]
    path = write(tmp_path / "x.jsonl", [{"prompt": text.upper(), "label": "safe"}])
    given = f"evaluate.sets=[{{name: x, path: '{path}', kind: refusals}}]"
    with pytest.raises(InputError, match="is also a training prompt"):
        pipeline.check_inputs(town(tmp_path, given).config, ["evaluate"])


def test_item_38_refusals_need_a_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(name: str) -> TemplateSet:
        return load_templates(name).model_copy(update={"refusals": ()})

    monkeypatch.setattr(sets, "load_templates", without)
    path = write(tmp_path / "x.jsonl", [{"prompt": "p", "label": "safe"}])
    run = town(tmp_path, f"evaluate.sets=[{{name: x, path: '{path}', kind: refusals}}]")
    with pytest.raises(InputError, match="template set errand-town has no refusals; add"):
        sets.check(run)


# --------------------------------------------------------------------------------------------------------- the harness


def test_item_38_a_harness_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(harness, "find_spec", lambda name: None if name == "lm_eval" else found(name))
    run = town(tmp_path, "evaluate.harness={tasks: [hellaswag]}")
    with pytest.raises(InputError, match=r"pip install 'cai_ray\[lm-eval\]'"):
        pipeline.check_inputs(run.config, ["evaluate"])
    pipeline.check_inputs(town(tmp_path).config, ["evaluate"])


def test_a_harness_needs_a_task() -> None:
    with pytest.raises(InputError, match=r"evaluate\.harness\.tasks"):
        load_config("errand-town", ["evaluate.harness={tasks: []}"])


def test_results_of_the_harness_by_metric() -> None:
    given = {
        "name": "t",
        "alias": "t",
        "sample_len": 4,
        "acc,none": 0.5,
        "acc_stderr,none": 0.25,
        "exact_match,strict": 1.0,
        "exact_match_stderr,strict": "N/A",
        "f1,none": float("nan"),
    }
    assert harness.results(given) == {
        "acc": {"value": 0.5, "stderr": 0.25},
        "exact_match,strict": {"value": 1.0, "stderr": None},
        "f1": {"value": None, "stderr": None},
    }
