"""Prompts and human comparisons from files in the formats people have.

A conversation is a list of messages, a plain text, or a transcript of the form
"\\n\\nHuman: … \\n\\nAssistant: …", of which every turn is kept. Sources whose path starts with `town:` are drawn
from the embedded world.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, TypedDict

from cai_ray.config.sources import Comparisons, PromptSource
from cai_ray.data import formats
from cai_ray.data.formats import clean
from cai_ray.data.near_duplicates import NearDuplicates
from cai_ray.errors import InputError
from cai_ray.storage.records import Prompt, Turn, derive_id

_COLUMNS = ("messages", "prompt", "text", "chosen")
_TURN = re.compile(r"\n\n(Human|Assistant): ?")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def read_prompts(
    sources: Iterable[PromptSource], seed: int, left_out: Counter[str] | None = None
) -> list[Prompt]:
    """The prompts of all sources, each conversation once, in the order of the sources.

    Args:
        left_out: counts the rows that repeat an earlier one (`same`), and those that nearly repeat one (`near`).

    Raises:
        InputError: a file is missing or unreadable, has no usable column, or its prompts have no kind.
    """
    sources = list(sources)
    prompts: dict[str, Prompt] = {}
    left_out = Counter() if left_out is None else left_out
    # One index for each threshold, over the prompts of all sources: the same list may be split over files.
    near = {t: NearDuplicates(t) for s in sources if (t := s.near_duplicates) is not None}
    for source in sources:
        column = source.column
        for number, row in enumerate(islice(iter_rows(source.path, seed), source.limit), 1):
            column = column or next((c for c in _COLUMNS if c in row), None)
            if column not in row:
                needed = column or " or ".join(_COLUMNS)
                raise InputError(
                    f"{source.path}: row {number} has no column {needed}; it has {', '.join(row)} "
                    "(set `column` to the one with prompts)"
                )
            messages = _prompt(row[column], source.path, number)
            kind = source.kind or row.get("kind")
            if kind not in ("red_team", "helpful"):
                raise InputError(
                    f"{source.path}: row {number} has kind {kind!r}; set `kind: red_team` or `helpful` on the source"
                )
            split = row.get("split") or "train"
            identity = derive_id(messages, kind, split)
            if identity in prompts:
                left_out["same"] += 1
                continue
            text = normalised(messages) if near else ""
            seen = {threshold: index.seen(text) for threshold, index in near.items()}
            if source.near_duplicates is not None and seen[source.near_duplicates]:
                left_out["near"] += 1
                continue
            prompts[identity] = {
                "id": identity,
                "messages": messages,
                "kind": kind,
                "family": row.get("family"),
                "split": split,
                "source": row.get("source") or source.path,
            }
    return list(prompts.values())


class HumanComparison(TypedDict):
    """Two responses of which people prefer the first."""

    id: str
    messages: list[Turn]
    response_a: str
    """The chosen one."""
    response_b: str
    p_a: float
    """How sure they are, in (0.5, 1]."""
    source: str


def read_comparisons(source: Comparisons, seed: int = 0) -> list[HumanComparison]:
    """Human comparisons.

    A row of the file has `chosen` and `rejected`; or response_a, response_b and `preferred` (a or b; a row where it is
    empty is skipped), as `cai-ray contested` writes them.

    Raises:
        InputError: the file is missing or unreadable, or a row is at fault.
    """
    comparisons: list[HumanComparison] = []
    for number, row in enumerate(islice(iter_rows(source.path, seed), source.limit), 1):
        where = f"{source.path}: row {number}"
        if "preferred" in row:
            if not row["preferred"]:
                continue
            row = _decided(row, where)
        if "chosen" not in row or "rejected" not in row:
            raise InputError(f"{where} lacks `chosen` or `rejected`; it has {', '.join(row)}")
        shared = row.get("messages") or row.get("prompt")
        if shared is not None:
            messages = _prompt(shared, source.path, number)
            chosen, rejected = (_answer(row[k], where) for k in ("chosen", "rejected"))
        else:
            good, bad = (to_messages(row[k], where) for k in ("chosen", "rejected"))
            if good[-1]["role"] != "assistant" or bad[-1]["role"] != "assistant" or good[:-1] != bad[:-1]:
                raise InputError(
                    f"{where}: `chosen` and `rejected` must share all turns but the assistant's last"
                )
            messages, chosen, rejected = good[:-1], good[-1]["content"], bad[-1]["content"]
        target = _target(source.target if row.get("target") is None else row["target"], where)
        comparisons.append(
            {
                "id": derive_id("human", messages, chosen, rejected),
                "messages": messages,
                "response_a": chosen,
                "response_b": rejected,
                "p_a": target,
                "source": "human",
            }
        )
    return comparisons


def _target(value: Any, where: str) -> float:
    try:
        target = float(value)
    except (TypeError, ValueError, OverflowError) as e:
        raise InputError(f"{where}: target {str(value)[:80]!r} is not a number; give one in (0.5, 1]") from e
    if not 0.5 < target <= 1:
        raise InputError(f"{where}: target {target} is not in (0.5, 1]")
    return target


def _decided(row: dict[str, Any], where: str) -> dict[str, Any]:
    """A contested comparison that somebody has decided, as chosen and rejected."""
    preferred = str(row["preferred"]).strip().lower()
    if preferred not in ("a", "b"):
        raise InputError(
            f"{where}: preferred {preferred[:40]!r} is not a or b; leave it empty to skip the row"
        )
    responses = [row.get(f"response_{side}") for side in (preferred, "b" if preferred == "a" else "a")]
    return {**row, **dict(zip(("chosen", "rejected"), responses, strict=True))}


def iter_rows(path: str, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Rows of a source: of the embedded world (`town:`), or of files (formats.py).

    Raises:
        InputError: the source is missing, unreadable, empty, or in an unknown format.
    """
    if path.startswith("town:"):
        from cai_ray.data import town

        yield from town.rows(path.removeprefix("town:"), seed)
    else:
        yield from formats.iter_rows(path)


def to_messages(value: Any, where: str) -> list[Turn]:
    """A conversation from messages, a transcript or a plain text.

    Raises:
        InputError: the value is none of the three.
    """
    if isinstance(value, str):
        parts = _TURN.split(value)
        if parts[0].strip() == "" and len(parts) > 1:
            return _joined(zip(parts[1::2], parts[2::2], strict=True))
        return [{"role": "user", "content": clean(value)}]
    if isinstance(value, list) and value:
        messages: list[Turn] = []
        for m in value:
            if not isinstance(m, dict) or not isinstance(m.get("content"), str):
                raise InputError(
                    f"{where}: a message must be {{role, content}} with a text, got {str(m)[:80]!r}"
                )
            if m.get("role") not in ("system", "user", "assistant"):
                raise InputError(f"{where}: role {m.get('role')!r} is not system, user or assistant")
            messages.append({"role": m["role"], "content": clean(m["content"])})
        return messages
    raise InputError(f"{where}: {str(value)[:80]!r} is not a conversation; give messages or a text")


def _joined(turns: Iterable[tuple[str, str]]) -> list[Turn]:
    """Messages of a transcript. Where a speaker comes twice in a row, as in some published ones, it is one turn."""
    messages: list[Turn] = []
    for who, text in turns:
        role, content = _ROLES[who], clean(text.strip())
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] = f"{messages[-1]['content']}\n\n{content}".strip()
        else:
            messages.append({"role": role, "content": content})
    return messages


def normalised(messages: Iterable[Turn]) -> str:
    """A conversation's text without differences in case, width and spacing: splits are compared by it."""
    text = "\n".join(m["content"] for m in messages)
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def check_disjoint(train: Iterable[Mapping[str, Any]], held: Iterable[Mapping[str, Any]]) -> None:
    """Raises InputError if an evaluation prompt is also used for training (docs/method.md, item 10)."""
    seen = {normalised(r["messages"]) for r in train}
    for row in held:
        if normalised(row["messages"]) in seen:
            text = row["messages"][-1]["content"][:80]
            raise InputError(
                f"evaluation prompt {text!r} is also a training prompt; remove it from one of the two"
            )


def _prompt(value: Any, path: str, number: int) -> list[Turn]:
    """A conversation up to where the assistant answers: a last assistant turn is left off."""
    messages = to_messages(value, f"{path}: row {number}")
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages or messages[-1]["role"] != "user":
        raise InputError(f"{path}: row {number} has no user turn to answer")
    return messages


def _answer(value: Any, where: str) -> str:
    if isinstance(value, str) and not _TURN.match(value):
        return clean(value)
    messages = to_messages(value, where)
    if messages[-1]["role"] != "assistant":
        raise InputError(f"{where}: the last message of `chosen` and `rejected` must be the assistant's")
    return messages[-1]["content"]
