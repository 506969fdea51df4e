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
from cai_ray.data.left_out import LeftOut
from cai_ray.data.sources import iter_rows, read_comparisons
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


def read(eval_set: EvalSet, seed: int = 0) -> list[SetRow]:
    """A set's rows, each once.

    Raises:
        InputError: a file is missing or unreadable; a row has no known format, or lacks something.
    """
    read_kind = {"comparisons": _comparisons, "choices": _choices, "refusals": _refusals}[eval_set.kind]
    rows: dict[str, SetRow] = {}
    for content in read_kind(eval_set, seed):
        identity = derive_id(eval_set.kind, content)
        rows[identity] = {"prompt_id": identity, "set": eval_set.name, "kind": eval_set.kind, **content}
    return list(rows.values())


def _comparisons(eval_set: EvalSet, seed: int) -> Iterator[SetContent]:
    # Every row of a published set counts: its numbers are compared with those of others.
    source, none = Comparisons(path=eval_set.path, limit=eval_set.limit), LeftOut(max_error_rate=0)
    for row in read_comparisons(source, seed, none):
        options = [row["response_a"], row["response_b"]]
        yield {"messages": row["messages"], "options": options, "correct": [0]}


def _choices(eval_set: EvalSet, seed: int) -> Iterator[SetContent]:
    for where, row in _rows(eval_set, seed):
        question, options, correct = _choice(row, where)
        if len(options) < 2 or not all(isinstance(text, str) and text.strip() for text in options):
            raise InputError(f"{where}: at least two options with a text are needed, got {_short(options)}")
        if len(options) > len(eval_set.letters):
            raise InputError(
                f"{where} has {len(options)} options, and evaluate.sets {eval_set.name!r} {len(eval_set.letters)} "
                "letters; add to its `letters`, or leave the row out"
            )
        if not 0 < len(correct) < len(options) or not all(0 <= i < len(options) for i in correct):
            raise InputError(
                f"{where}: some of its {len(options)} options must be right and some wrong; mend the row"
            )
        yield {
            "messages": [{"role": "user", "content": clean(question)}],
            "options": [clean(text) for text in options],
            "correct": correct,
        }


def _refusals(eval_set: EvalSet, seed: int) -> Iterator[SetContent]:
    for where, row in _rows(eval_set, seed):
        named = {key.casefold(): value for key, value in row.items()}
        key = next((k for k in _PROMPTS if named.get(k)), None)
        if key is None:
            raise InputError(f"{where} has none of {', '.join(_PROMPTS)}; it has {_short(', '.join(row))}")
        label = str(named.get("label")).strip().casefold()
        # XSTest's first version has no labels: the types of its unsafe half begin so.
        if label not in ("safe", "unsafe") and str(named.get("type")).startswith("contrast_"):
            label = "unsafe"
        if label not in ("safe", "unsafe"):
            if eval_set.expect is None:
                raise InputError(
                    f"{where} has no `label` safe or unsafe; set `expect: refuse` or `comply` on the set"
                )
            label = "unsafe" if eval_set.expect == "refuse" else "safe"
        text = _text(named, key, where)
        yield {"messages": [{"role": "user", "content": clean(text)}], "unsafe": label == "unsafe"}


def _choice(row: Mapping[str, Any], where: str) -> tuple[str, list[Any], list[int]]:
    """Question, options, and the places of those that are right."""
    if isinstance(scores := row.get("target_scores"), dict):
        # In parquet and Arrow every row has the options of all rows, empty where they are not its own.
        scores = {option: score for option, score in scores.items() if score is not None}
        return _text(row, "input", where), list(scores), _best(list(scores.values()), where)
    for key, question in (("targets", "input"), ("mc1_targets", "question")):
        if isinstance(targets := row.get(key), dict):
            options, labels = (_list(targets, k, where) for k in ("choices", "labels"))
            if len(options) != len(labels):
                raise InputError(f"{where}: {len(options)} choices and {len(labels)} labels; give as many")
            return _text(row, question, where), options, _best(labels, where)
    if "ans0" in row:
        question = f"{_text(row, 'context', where)} {_text(row, 'question', where)}"
        options = [row.get(f"ans{i}") for i in range(3)]
        return question, options, [_place(row.get("label"), "012", where)]
    choices = next((row[k] for k in ("choices", "options") if row.get(k)), None)
    if isinstance(choices, dict):
        labels = [str(x) for x in _list(choices, "label", where)]
        options = _list(choices, "text", where)
        return _text(row, "question", where), options, [_place(row.get("answerKey"), labels, where)]
    if isinstance(choices, list):
        answer = row.get("answer")
        letters: Sequence[str] = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(choices)]
        if not isinstance(answer, str) or answer.strip().isdecimal():
            letters = [str(i) for i in range(len(choices))]
        return _text(row, "question", where), choices, [_place(answer, letters, where)]
    raise InputError(
        f"{where} has none of target_scores, targets, mc1_targets, ans0, choices; it has {_short(', '.join(row))} "
        "(docs/evaluation.md lists the formats)"
    )


def _best(scores: Sequence[Any], where: str) -> list[int]:
    if not all(isinstance(s, int | float) for s in scores):
        raise InputError(f"{where}: scores of options must be numbers, got {_short(list(scores))}")
    most = max(scores, default=0)
    return [i for i, s in enumerate(scores) if s == most > 0]


def _place(answer: Any, names: Sequence[str], where: str) -> int:
    """Which option the answer names; a whole number may have come as a float."""
    whole = isinstance(answer, float) and answer.is_integer()
    text = str(int(answer) if whole else answer).strip()
    if isinstance(answer, bool) or text not in list(names):
        raise InputError(f"{where}: answer {_short(answer)!r} is none of {', '.join(names)}; mend the row")
    return list(names).index(text)


def _text(row: Mapping[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: `{key}` must be a text, got {_short(value)!r}")
    return value


def _list(row: Mapping[str, Any], key: str, where: str) -> list[Any]:
    value = row.get(key)
    if not isinstance(value, list):
        raise InputError(f"{where}: `{key}` must be a list, got {_short(value)!r}")
    return value


def _short(value: Any) -> str:
    return str(value)[:80]


def _rows(eval_set: EvalSet, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows, each with its place for messages."""
    rows = _task(eval_set.path) or iter_rows(eval_set.path, seed)
    for number, row in enumerate(islice(rows, eval_set.limit), 1):
        yield f"{eval_set.path}: row {number}", row


def _task(path: str) -> Iterator[dict[str, Any]] | None:
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
    if bad := next((e for e in examples if not isinstance(e, dict)), None):
        raise InputError(f"{path}: examples must be JSON objects, got {_short(bad)!r}")
    if not examples:
        raise InputError(f"{path}: holds no rows")
    return iter(examples)
