"""The datasets of an export: which rows of the run they hold, with columns of TRL's conversational formats."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pyarrow as pa

from cai_ray.export.card_facts import public_name
from cai_ray.storage.arrow import arrow_type, schema_of
from cai_ray.storage.records import SftRow, Turn

_text, _float = pa.string(), pa.float64()
MESSAGES = arrow_type(list[Turn])
SCHEMAS = {
    "revisions": pa.schema(
        [
            ("id", _text),
            ("prompt", MESSAGES),
            ("completion", MESSAGES),
            ("kind", _text),
            ("family", _text),
            ("response", _text),
            (
                "steps",
                pa.list_(pa.struct([(n, _text) for n in ("principle_id", "critique", "revision")])),
            ),
            ("reviser", _text),
            ("truncated", pa.bool_()),
            ("constitution_sha", _text),
        ]
    ),
    "sft": schema_of(SftRow),
    "preferences": pa.schema(
        [
            ("id", _text),
            ("prompt", MESSAGES),
            ("chosen", MESSAGES),
            ("rejected", MESSAGES),
            ("p_chosen", _float),
            ("p_chosen_raw", _float),
            (
                "votes",
                pa.list_(pa.struct([("principle_id", _text), ("p_chosen", _float), ("abstained", _text)])),
            ),
            ("truncated_chosen", pa.bool_()),
            ("truncated_rejected", pa.bool_()),
            ("kind", _text),
            ("family", _text),
            ("feedback_model", _text),
            ("constitution_sha", _text),
        ]
    ),
}


def _revision(row: dict[str, Any], left_out: Counter[str]) -> dict[str, Any] | None:
    if row["error"]:
        return None
    steps = row["steps"] or []
    answer = row["response"] if row["revision"] is None else row["revision"]
    return {
        **{k: row[k] for k in ("id", "kind", "family", "response", "constitution_sha")},
        "prompt": row["messages"],
        "completion": _answer(answer),
        "steps": [{k: step[k] for k in ("principle_id", "critique", "revision")} for step in steps],
        "reviser": public_name(reviser) if (reviser := row.get("reviser")) else None,
        "truncated": bool(steps[-1].get("revision_truncated") if steps else row["truncated"]),
    }


def _sft(row: dict[str, Any], left_out: Counter[str]) -> dict[str, Any]:
    return row


def _preference(row: dict[str, Any], left_out: Counter[str]) -> dict[str, Any] | None:
    if row["error"] or row["p_a"] is None:
        left_out["with an error"] += 1
        return None
    if row["response_a"] == row["response_b"]:
        left_out["of two responses that are the same"] += 1
        return None
    chosen, rejected = ("a", "b") if row["p_a"] >= 0.5 else ("b", "a")

    def toward(p_a: float | None) -> float | None:
        """The probability of what was chosen, from that of a."""
        return p_a if p_a is None or chosen == "a" else 1 - p_a

    return {
        **{k: row[k] for k in ("id", "kind", "family", "feedback_model", "constitution_sha")},
        "prompt": row["messages"],
        "chosen": _answer(row[f"response_{chosen}"]),
        "rejected": _answer(row[f"response_{rejected}"]),
        "truncated_chosen": bool(row[f"truncated_{chosen}"]),
        "truncated_rejected": bool(row[f"truncated_{rejected}"]),
        "p_chosen": toward(row["p_a"]),
        "p_chosen_raw": toward(row["p_a_raw"]),
        "votes": [
            {
                "principle_id": vote["principle_id"],
                "p_chosen": toward(vote["p_a"]),
                "abstained": vote["abstained"],
            }
            for vote in row["votes"] or []
        ],
    }


def _answer(content: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": content}]


DATASETS: dict[str, tuple[str, Callable[[dict[str, Any], Counter[str]], dict[str, Any] | None]]] = {
    "revisions": ("revise", _revision),
    "sft": ("sft", _sft),
    "preferences": ("label", _preference),
}
"""Name to the stage that made the rows, and how a row is converted (None leaves it out)."""
