"""Comparisons whose better response is known: they measure the labeller, and train nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import islice
from typing import Any

from cai_ray.data.formats import clean
from cai_ray.data.sources import iter_rows, to_messages
from cai_ray.errors import InputError
from cai_ray.storage.records import Pair, derive_id


class GoldComparison(Pair):
    """Two responses, and which is the better one: 1 means response a, 0 response b, 0.5 neither."""

    gold: float
    gold_by_principle: dict[str, float] | None
    """The same by principle, where the file has it."""


def read_gold_comparisons(path: str, limit: int | None, seed: int) -> list[GoldComparison]:
    """The first `limit` comparisons of `label.gold`.

    Raises:
        InputError: a row lacks something, or none prefers one of its two responses.
    """
    comparisons = [
        _comparison(row, path, f"label.gold={path}: row {number}")
        for number, row in enumerate(islice(iter_rows(path, seed), limit), 1)
    ]
    if all(c["gold"] == 0.5 for c in comparisons):
        raise InputError(f"label.gold={path}: no row prefers one of its responses (gold is 0.5 in all)")
    return comparisons


def _comparison(row: Mapping[str, Any], path: str, where: str) -> GoldComparison:
    if missing := [n for n in ("messages", "response_a", "response_b", "gold") if row.get(n) is None]:
        raise InputError(f"{where} lacks {', '.join(missing)}")
    if not all(isinstance(row[k], str) for k in ("response_a", "response_b")):
        raise InputError(f"{where}: response_a and response_b must be texts")
    by_principle = row.get("gold_by_principle")
    if not isinstance(by_principle, dict | None):
        raise InputError(
            f"{where}: gold_by_principle maps ids of principles to numbers, got {str(by_principle)[:80]!r}"
        )
    return {
        "id": derive_id("gold", row["messages"], row["response_a"], row["response_b"]),
        "messages": to_messages(row["messages"], where),
        "response_a": clean(row["response_a"]),
        "response_b": clean(row["response_b"]),
        "source": clean(str(row.get("source") or path)),
        "gold": _preference(row["gold"], where),
        "gold_by_principle": by_principle
        and {
            clean(str(k)): _preference(v, f"{where}, {k}") for k, v in by_principle.items() if v is not None
        },
    }


def _preference(value: Any, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 <= number <= 1:
        raise InputError(
            f"{where}: gold {str(value)[:80]!r} is not a number from 0 (b is better) to 1 (a is better)"
        )
    return number
