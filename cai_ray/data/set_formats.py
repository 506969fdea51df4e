"""Published evaluation sets, read row by row into one form. The keys of a row say which format it has.

| kind | keys | published as |
| --- | --- | --- |
| comparisons | chosen, rejected | HH-RLHF (Bai et al. 2022a, arXiv 2204.05862) and whatever `rm.human` reads |
| choices | input, target_scores | BIG-bench tasks (Srivastava et al. 2022, arXiv 2206.04615), whole files too |
| | input, targets: {choices, labels} | HHH alignment (Askell et al. 2021, arXiv 2112.00861) as the hub has it |
| | question, mc1_targets: {choices, labels} | TruthfulQA (Lin et al. 2021, arXiv 2109.07958) |
| | context, question, ans0, ans1, ans2, label | BBQ (Parrish et al. 2021, arXiv 2110.08193) |
| | question, choices, answer | MMLU (Hendrycks et al. 2020, arXiv 2009.03300), WMDP (2403.03218) |
| | question, options, answer | SafetyBench (Zhang et al. 2023, arXiv 2309.07045), MMLU-Pro (2406.01574) |
| | question, choices: {text, label}, answerKey | ARC (Clark et al. 2018, arXiv 1803.05457) |
| refusals | prompt, label (safe, unsafe) or type | XSTest (Röttger et al. 2023, arXiv 2308.01263) |
| | prompt | OR-Bench (Cui et al. 2024, arXiv 2405.20947) |
| | question | Do-Not-Answer (Wang et al. 2023, arXiv 2308.13387) |
| | goal | AdvBench (Zou et al. 2023, arXiv 2307.15043), JailbreakBench (2404.01318) |
| | instruction, behavior, forbidden_prompt | HarmBench (2402.04249), StrongREJECT (2402.10260) and the like |
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NotRequired, TypedDict

from cai_ray.config.evaluation import EvalSet
from cai_ray.config.sources import Comparisons
from cai_ray.data.formats import clean
from cai_ray.data.left_out import LeftOut, OddRow, SourceRow, read_source, short, short_list
from cai_ray.data.sources import iter_comparisons, iter_source_rows
from cai_ray.errors import InputError
from cai_ray.storage import files
from cai_ray.storage.records import Turn, derive_id

_PROMPTS = ("prompt", "question", "goal", "instruction", "behavior", "forbidden_prompt")


class SetContent(TypedDict):
    """What a row of a set asks."""

    messages: list[Turn]
    options: NotRequired[list[str]]
    """The answers to choose from (choices and comparisons)."""
    correct: NotRequired[list[int]]
    """Places of the right ones among the options."""
    unsafe: NotRequired[bool]
    """Whether the request is one to decline (refusals)."""


class SetRow(SetContent):
    """A row of a set."""

    prompt_id: str
    """Derived from the content."""
    set: str
    kind: str


def read(eval_set: EvalSet, seed: int = 0, left_out: LeftOut | None = None) -> list[SetRow]:
    """A set's rows, each once.

    Args:
        left_out: counts the rows that have no known format, or lack something.

    Raises:
        InputError: a file is missing or unreadable, or too many of its rows cannot be used (`OddRows.check`).
    """
    left_out = LeftOut() if left_out is None else left_out
    if eval_set.kind == "comparisons":
        contents = _comparisons(eval_set, seed, left_out)
    else:
        read_row = {"choices": _choice, "refusals": _refusal}[eval_set.kind]
        source = islice(_task(eval_set.path) or iter_source_rows(eval_set.path, seed), eval_set.limit)
        contents = read_source(eval_set.path, source, lambda row: read_row(row, eval_set), left_out)
    rows: dict[str, SetRow] = {}
    for content in contents:
        identity = derive_id(eval_set.kind, content)
        rows[identity] = {"prompt_id": identity, "set": eval_set.name, "kind": eval_set.kind, **content}
    return list(rows.values())


def _comparisons(eval_set: EvalSet, seed: int, left_out: LeftOut) -> Iterator[SetContent]:
    source = Comparisons(path=eval_set.path, limit=eval_set.limit)
    for row in iter_comparisons(source, seed, left_out):
        options = [row["response_a"], row["response_b"]]
        yield {"messages": row["messages"], "options": options, "correct": [0]}


def _choice(row: Mapping[str, Any], eval_set: EvalSet) -> SetContent:
    question, options, correct = _question(row)
    if len(options) < 2 or not all(isinstance(text, str) and text.strip() for text in options):
        raise OddRow("not two options with a text", f"got {short(options)}")
    if len(options) > len(eval_set.letters):
        raise OddRow(
            "more options than letters",
            f"{len(options)} options, and evaluate.sets {eval_set.name!r} has {len(eval_set.letters)} letters; add to "
            "its `letters`",
        )
    if not 0 < len(correct) < len(options) or not all(0 <= i < len(options) for i in correct):
        raise OddRow("no right or no wrong option", f"{len(correct)} of its {len(options)} options are right")
    return {
        "messages": [{"role": "user", "content": clean(question)}],
        "options": [clean(text) for text in options],
        "correct": correct,
    }


def _refusal(row: Mapping[str, Any], eval_set: EvalSet) -> SetContent:
    named = {key.casefold(): value for key, value in row.items()}
    key = next((k for k in _PROMPTS if named.get(k)), None)
    if key is None:
        raise OddRow("no prompt", f"it has none of {', '.join(_PROMPTS)}, but {short_list(row)}")
    label = str(named.get("label")).strip().casefold()
    # XSTest's first version has no labels: the types of its unsafe half begin so.
    if label not in ("safe", "unsafe") and str(named.get("type")).startswith("contrast_"):
        label = "unsafe"
    if label not in ("safe", "unsafe"):
        if eval_set.expect is None:
            raise OddRow(
                "no `label` safe or unsafe",
                "set `expect: refuse` or `comply` on a set whose rows do not say it",
            )
        label = "unsafe" if eval_set.expect == "refuse" else "safe"
    return {"messages": [{"role": "user", "content": clean(_text(named, key))}], "unsafe": label == "unsafe"}


def _question(row: Mapping[str, Any]) -> tuple[str, list[Any], list[int]]:
    """Question, options, and the places of those that are right."""
    if isinstance(scores := row.get("target_scores"), dict):
        # In parquet and Arrow every row has the options of all rows, empty where they are not its own.
        scores = {option: score for option, score in scores.items() if score is not None}
        return _text(row, "input"), list(scores), _best(list(scores.values()))
    for key, question in (("targets", "input"), ("mc1_targets", "question")):
        if isinstance(targets := row.get(key), dict):
            options, labels = (_list(targets, k) for k in ("choices", "labels"))
            if len(options) != len(labels):
                raise OddRow(
                    "not as many labels as choices", f"{len(options)} choices and {len(labels)} labels"
                )
            return _text(row, question), options, _best(labels)
    if "ans0" in row:
        question = f"{_text(row, 'context')} {_text(row, 'question')}"
        options = [row.get(f"ans{i}") for i in range(3)]
        return question, options, [_place(row.get("label"), "012")]
    choices = next((row[k] for k in ("choices", "options") if row.get(k)), None)
    if isinstance(choices, dict):
        labels = [str(x) for x in _list(choices, "label")]
        options = _list(choices, "text")
        return _text(row, "question"), options, [_place(row.get("answerKey"), labels)]
    if isinstance(choices, list):
        answer = row.get("answer")
        letters: Sequence[str] = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(choices)]
        if not isinstance(answer, str) or answer.strip().isdecimal():
            letters = [str(i) for i in range(len(choices))]
        return _text(row, "question"), choices, [_place(answer, letters)]
    raise OddRow(
        "no known format",
        f"none of target_scores, targets, mc1_targets, ans0, choices, but {short_list(row)}; docs/evaluation.md lists "
        "the formats",
    )


def _best(scores: Sequence[Any]) -> list[int]:
    if not all(isinstance(s, int | float) for s in scores):
        raise OddRow("a score of an option that is not a number", f"got {short(list(scores))}")
    most = max(scores, default=0)
    return [i for i, s in enumerate(scores) if s == most > 0]


def _place(answer: Any, names: Sequence[str]) -> int:
    """Which option the answer names; a whole number may have come as a float."""
    whole = isinstance(answer, float) and answer.is_integer()
    text = str(int(answer) if whole else answer).strip()
    if isinstance(answer, bool) or text not in list(names):
        raise OddRow(
            "an answer that is none of the options", f"{short(answer)} is none of {short_list(names)}"
        )
    return list(names).index(text)


def _text(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise OddRow("a column that is not a text", f"`{key}` is {short(value)}")
    return value


def _list(row: Mapping[str, Any], key: str) -> list[Any]:
    value = row.get(key)
    if not isinstance(value, list):
        raise OddRow("a column that is not a list", f"`{key}` is {short(value)}")
    return value


def _task(path: str) -> Iterator[SourceRow] | None:
    """The examples of a BIG-bench task file, which is one JSON object over many lines; None for any other file."""
    if not path.endswith(".json") or "*" in path or not files.exists(path):
        return None
    try:
        task = json.loads(files.read_bytes(path))
    except (OSError, ValueError, RecursionError):  # perhaps JSON lines, whose reader reports what is wrong
        return None
    examples = task.get("examples") if isinstance(task, dict) else None
    if not isinstance(examples, list):
        return None
    if not examples:
        raise InputError(f"{path}: holds no rows")
    none = OddRow("not a JSON object")
    return (SourceRow(path, n, e if isinstance(e, dict) else none) for n, e in enumerate(examples, 1))
