"""Prompts and human comparisons from files in the formats people have (formats.py, conversations.py).

Sources whose path starts with `town:` are drawn from the embedded world. Rows whose meaning is not plain are left out
and counted (left_out.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, TypedDict

from cai_ray.config.sources import Comparisons, PromptSource
from cai_ray.data import formats
from cai_ray.data.conversations import compared, prompt_of
from cai_ray.data.formats import clean
from cai_ray.data.left_out import LeftOut, OddRow, SourceRow, read_source, short
from cai_ray.data.near_duplicates import NearDuplicates
from cai_ray.data.overlap import normalised
from cai_ray.errors import InputError
from cai_ray.storage.records import Prompt, Turn, derive_id

KINDS = ("red_team", "helpful")


def read_prompts(sources: Iterable[PromptSource], seed: int, left_out: LeftOut | None = None) -> list[Prompt]:
    """The prompts of all sources, each conversation once, in the order of the sources.

    Args:
        left_out: counts the rows that cannot be used, that repeat an earlier one (`same`), or nearly repeat one
            (`near`).

    Raises:
        InputError: a file is missing or unreadable, or too many of its rows cannot be used (`OddRows.check`).
    """
    sources = list(sources)
    prompts: dict[str, Prompt] = {}
    left_out = LeftOut() if left_out is None else left_out
    # One index for each threshold, over the prompts of all sources: the same list may be split over files.
    near = {t: NearDuplicates(t) for s in sources if (t := s.near_duplicates) is not None}
    for source in sources:
        for prompt in iter_prompts(source, seed, left_out):
            if prompt["id"] in prompts:
                left_out["same"] += 1
                continue
            text = normalised(prompt["messages"]) if near else ""
            seen = {threshold: index.seen(text) for threshold, index in near.items()}
            if source.near_duplicates is not None and seen[source.near_duplicates]:
                left_out["near"] += 1
                continue
            prompts[prompt["id"]] = prompt
    return list(prompts.values())


def iter_prompts(source: PromptSource, seed: int, left_out: LeftOut) -> Iterator[Prompt]:
    """The prompts of one source as they stand, one at a time. Args and errors as of `read_prompts`."""

    def read(row: Mapping[str, Any]) -> Prompt:
        messages = prompt_of(row, source.column)
        kind = source.kind or row.get("kind")
        if kind not in KINDS:
            raise OddRow("no kind", f"kind {short(kind)}; set `kind: red_team` or `helpful` on the source")
        split = as_text(row.get("split")) or "train"
        return {
            "id": derive_id(messages, kind, split),
            "messages": messages,
            "kind": kind,
            "family": as_text(row.get("family")),
            "split": split,
            "source": as_text(row.get("source")) or source.path,
        }

    return read_source(source.path, _rows(source.path, source.limit, seed), read, left_out)


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


def read_comparisons(
    source: Comparisons, seed: int = 0, left_out: LeftOut | None = None
) -> list[HumanComparison]:
    """Human comparisons.

    A row of the file has `chosen` and `rejected`; or response_a, response_b and `preferred` (a or b; a row where it is
    empty is skipped), as `cai-ray contested` writes them.

    Args:
        left_out: counts the rows that cannot be used.

    Raises:
        InputError: the file is missing or unreadable, or too many of its rows cannot be used (`OddRows.check`).
    """
    return list(iter_comparisons(source, seed, LeftOut() if left_out is None else left_out))


def iter_comparisons(source: Comparisons, seed: int, left_out: LeftOut) -> Iterator[HumanComparison]:
    """The same, one at a time."""

    def read(row: Mapping[str, Any]) -> HumanComparison | None:
        if "preferred" in row:
            if not row["preferred"]:
                return None
            row = _decided(row)
        messages, chosen, rejected = compared(row)
        return {
            "id": derive_id("human", messages, chosen, rejected),
            "messages": messages,
            "response_a": chosen,
            "response_b": rejected,
            "p_a": _target(source.target if row.get("target") is None else row["target"]),
            "source": "human",
        }

    return read_source(source.path, _rows(source.path, source.limit, seed), read, left_out)


def _target(value: Any) -> float:
    try:
        target = float(value)
    except (TypeError, ValueError, OverflowError) as e:
        raise OddRow("a wrong target", f"target {short(value)} is not a number; give one in (0.5, 1]") from e
    if not 0.5 < target <= 1:
        raise OddRow("a wrong target", f"target {target} is not in (0.5, 1]")
    return target


def _decided(row: Mapping[str, Any]) -> dict[str, Any]:
    """A contested comparison that somebody has decided, as chosen and rejected."""
    preferred = str(row["preferred"]).strip().lower()
    if preferred not in ("a", "b"):
        raise OddRow(
            "a wrong `preferred`",
            f"preferred {short(preferred)} is not a or b; leave it empty to skip the row",
        )
    responses = [row.get(f"response_{side}") for side in (preferred, "b" if preferred == "a" else "a")]
    return {**row, **dict(zip(("chosen", "rejected"), responses, strict=True))}


def iter_rows(path: str, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Rows of a source: of the embedded world (`town:`), or of files (formats.py).

    Raises:
        InputError: the source is missing, unreadable, empty, or in an unknown format; or a row cannot be read.
    """
    for row in iter_source_rows(path, seed):
        if isinstance(row.values, OddRow):
            raise InputError(f"{row.place}: {row.values}")
        yield row.values


def iter_source_rows(path: str, seed: int = 0) -> Iterator[SourceRow]:
    """The same rows with their places; those that cannot be read are among them."""
    if path.startswith("town:"):
        from cai_ray.data import town

        for number, values in enumerate(town.rows(path.removeprefix("town:"), seed), 1):
            yield SourceRow(path, number, values)
    else:
        yield from formats.iter_source_rows(path)


def as_text(value: Any) -> str | None:
    """A cell of a column beside the prompt, which may be of any type, as a text; None if it says nothing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, dict | list):
        return clean(json.dumps(value, ensure_ascii=False, default=str))
    return clean(str(value))


def _rows(path: str, limit: int | None, seed: int) -> Iterator[SourceRow]:
    return islice(iter_source_rows(path, seed), limit)
