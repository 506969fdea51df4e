"""How long the texts of a stage are, how many a limit cut off, and which limit would have held most of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cai_ray.config.judge import JudgeConfig

HELD = 0.95
"""The share of texts that the named limit holds."""


class TextLimit(NamedTuple):
    """A limit on the length of texts."""

    setting: str
    tokens: int


class TextKind(NamedTuple):
    """Texts of one kind, and the columns of a stage's rows that tell of them. `steps.x` is column x of the steps."""

    name: str
    tokens: str
    truncated: str
    limit: TextLimit


def reasoning_kinds(key: str, judge: JudgeConfig) -> list[TextKind]:
    """Where a judge's votes have the lengths of its reasoning. `key` is the judge's section of the configuration."""
    if judge.answer != "reasoned":
        return []
    limit = TextLimit(f"{key}.reasoning_max_tokens", judge.reasoning_max_tokens)
    return [
        TextKind("reasoning", f"votes.{name}_tokens", f"votes.{name}_truncated", limit)
        for name in ("reasoning", "reasoning_swapped")
    ]


def text_kinds(chain: object) -> Sequence[TextKind]:
    """The kinds of texts that a chain says its rows hold; none if it says nothing."""
    kinds: Sequence[TextKind] = getattr(chain, "text_kinds", ())
    return kinds


class TextLengths:
    """Counts lengths, table by table; the memory is that of the different lengths. Kinds of one name count together."""

    def __init__(self, kinds: Sequence[TextKind]):
        self.kinds = kinds
        self.whole: dict[str, Counter[int]] = {kind.name: Counter() for kind in kinds}
        self.cut: dict[str, Counter[int]] = {kind.name: Counter() for kind in kinds}

    def add(self, table: pa.Table) -> None:
        """Counts the texts of some rows. Length 0 stands for one that an endpoint did not say."""
        for kind in self.kinds:
            truncated, tokens = _column(table, kind.truncated), _column(table, kind.tokens)
            there = pc.is_valid(truncated)
            cut = truncated.filter(there).to_numpy(zero_copy_only=False).astype(bool)
            lengths = pc.fill_null(tokens.filter(there), 0).to_numpy(zero_copy_only=False)
            for counts, chosen in ((self.whole, lengths[~cut]), (self.cut, lengths[cut])):
                values, numbers = np.unique(chosen, return_counts=True)
                counts[kind.name].update(dict(zip(values.tolist(), numbers.tolist(), strict=True)))

    def summary(self) -> dict[str, dict[str, Any]]:
        """The summary of each kind of which there are texts, for the manifest (`summarise`)."""
        limits = {kind.name: kind.limit for kind in self.kinds}
        return {
            name: summarise(self.whole[name], self.cut[name], limit)
            for name, limit in limits.items()
            if self.whole[name] or self.cut[name]
        }


def summarise(whole: Mapping[int, int], cut: Mapping[int, int], limit: TextLimit) -> dict[str, Any]:
    """Lengths of texts of one kind, in tokens.

    Args:
        whole: how many texts of each length the model ended itself; length 0 is one that is not known.
        cut: how many of each length were cut off.

    Returns:
        `texts`, `truncated`; `median`, `p95` and `max` of the lengths seen, a cut text counting with what there is of
        it (None if no length is known); `setting` and `limit`; and `limit_for_95`, the limit that would have held 95%
        of the texts. How long a cut text would have become is not known. So if more than 5% were cut, that is the text
        "more than N". `cut_below_limit`: of the truncated ones, those that ended before the limit, since the context
        was full.
    """
    ended = Counter({length: number for length, number in whole.items() if length})
    stopped = Counter({length: number for length, number in cut.items() if length})
    seen = ended + stopped
    at_95 = math.ceil(HELD * seen.total())
    needed: int | str | None = _quantile(ended, at_95)
    if needed is None and seen:
        needed = f"more than {max(stopped)}"
    return {
        "texts": sum(whole.values()) + sum(cut.values()),
        "truncated": sum(cut.values()),
        "cut_below_limit": sum(number for length, number in stopped.items() if length < limit.tokens),
        "median": _quantile(seen, math.ceil(seen.total() / 2)),
        "p95": _quantile(seen, at_95),
        "max": max(seen, default=None),
        "setting": limit.setting,
        "limit": limit.tokens,
        "limit_for_95": needed,
    }


def describe_lengths(stage: str, summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """The line for the end of a stage."""
    return f"{stage}: tokens (median, 95%, longest): " + "; ".join(
        _describe(name, summary) for name, summary in summaries.items()
    )


def _describe(name: str, summary: Mapping[str, Any]) -> str:
    known = summary["median"] is not None
    line = (
        f"{name} {summary['median']}, {summary['p95']}, {summary['max']}" if known else f"{name} (not known)"
    )
    if not summary["truncated"]:
        return f"{line}, none of {summary['texts']} cut"
    line += f", {summary['truncated']} of {summary['texts']} cut at {summary['setting']}={summary['limit']}"
    if summary["cut_below_limit"]:
        line += f" ({summary['cut_below_limit']} of them before it, where the context was full)"
    return f"{line}, 95% need {summary['limit_for_95']}" if known else line


def _quantile(counts: Mapping[int, int], rank: int) -> int | None:
    """The length number `rank`, from 1, of lengths in rising order; None if there are not as many."""
    for length in sorted(counts):
        rank -= counts[length]
        if rank <= 0:
            return length
    return None


def _column(table: pa.Table, path: str) -> Any:
    name, _, inner = path.partition(".")
    column = table[name].combine_chunks()
    return pc.struct_field(pc.list_flatten(column), inner) if inner else column
