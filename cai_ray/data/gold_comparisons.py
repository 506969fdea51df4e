"""Comparisons whose better response is known: they measure the labeller, and train nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import islice
from typing import Any

from cai_ray.config.run import RunConfig
from cai_ray.data.conversations import conversation_of
from cai_ray.data.formats import clean
from cai_ray.data.left_out import LeftOut, OddRow, read_source, short
from cai_ray.data.sources import as_text, iter_source_rows
from cai_ray.errors import InputError
from cai_ray.storage.records import Pair, derive_id


class GoldComparison(Pair):
    """Two responses, and which is the better one: 1 means response a, 0 response b, 0.5 neither."""

    gold: float
    gold_by_principle: dict[str, float] | None
    """The same by principle, where the file has it."""


def read_gold_comparisons(config: RunConfig, left_out: LeftOut | None = None) -> list[GoldComparison]:
    """The comparisons of `label.gold`; none where it is not set.

    Args:
        left_out: counts the rows that cannot be used.

    Raises:
        InputError: the file is missing or unreadable, too many of its rows cannot be used (`OddRows.check`), or none
            prefers one of its two responses.
    """
    path = config.label.gold
    if not path:
        return []
    rows = islice(iter_source_rows(path, config.seed), config.label.gold_limit)
    left_out = LeftOut(config.max_error_rate) if left_out is None else left_out
    comparisons = list(read_source(path, rows, lambda row: _comparison(row, path), left_out))
    if all(c["gold"] == 0.5 for c in comparisons):
        raise InputError(f"label.gold={path}: no row prefers one of its responses (gold is 0.5 in all)")
    return comparisons


def _comparison(row: Mapping[str, Any], path: str) -> GoldComparison:
    if missing := [n for n in ("messages", "response_a", "response_b", "gold") if row.get(n) is None]:
        raise OddRow("a gold comparison that lacks something", f"lacks {', '.join(missing)}")
    if not all(isinstance(row[k], str) for k in ("response_a", "response_b")):
        raise OddRow("a response that is not a text", "response_a and response_b must be texts")
    by_principle = row.get("gold_by_principle")
    if not isinstance(by_principle, dict | None):
        raise OddRow(
            "a wrong gold_by_principle",
            f"gold_by_principle maps ids of principles to numbers, got {short(by_principle)}",
        )
    return {
        "id": derive_id("gold", row["messages"], row["response_a"], row["response_b"]),
        "messages": conversation_of(row),
        "response_a": clean(row["response_a"]),
        "response_b": clean(row["response_b"]),
        "source": as_text(row.get("source")) or path,
        "gold": _preference(row["gold"]),
        "gold_by_principle": by_principle
        and {clean(str(k)): _preference(v, f"{k}: ") for k, v in by_principle.items() if v is not None},
    }


def _preference(value: Any, of: str = "") -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 <= number <= 1:
        raise OddRow(
            "a wrong gold", f"{of}gold {short(value)} is not a number from 0 (b is better) to 1 (a is better)"
        )
    return number
