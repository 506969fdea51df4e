"""The records: rows of parquet datasets, with ids derived from what they are about.

A derived id makes a row's identity independent of the order of processing: the same prompt, in whatever block
or attempt, is the same row. `SCHEMAS` lists the columns.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pyarrow as pa

_text = pa.string()
MESSAGES = pa.list_(pa.struct([("role", _text), ("content", _text)]))
USAGE = pa.struct([(name, pa.int64()) for name in ("prompt", "cached", "generated", "calls")])
STEP = pa.struct(
    [
        ("round", pa.int64()),
        *(
            (n, _text)
            for n in ("principle_id", "critique_request", "critique", "revision_request", "revision", "key")
        ),
    ]
)
VOTE = pa.struct(
    [
        ("principle_id", _text),
        ("logprob_a", pa.float64()),
        ("logprob_b", pa.float64()),
        ("logprob_a_swapped", pa.float64()),
        ("logprob_b_swapped", pa.float64()),
        ("p_a", pa.float64()),
        ("reasoning", _text),
        ("reasoning_swapped", _text),
        ("score_a", pa.float64()),
        ("score_b", pa.float64()),
        ("abstained", _text),
        ("key", _text),
    ]
)

PROMPT = [
    ("id", _text),
    ("messages", MESSAGES),
    ("kind", _text),
    ("family", _text),
    ("split", _text),
    ("source", _text),
]
COMPARISON = [
    ("id", _text),
    ("prompt_id", _text),
    ("messages", MESSAGES),
    ("response_a", _text),
    ("response_b", _text),
    ("truncated_a", pa.bool_()),
    ("truncated_b", pa.bool_()),
    ("model", _text),
    ("temperature", pa.float64()),
    ("source", _text),
    ("kind", _text),
    ("family", _text),
    ("usage", USAGE),
    ("error", _text),
]

SCHEMAS: dict[str, pa.Schema] = {
    "prompts": pa.schema(PROMPT),
    "revisions": pa.schema(
        [
            ("id", _text),
            ("prompt_id", _text),
            ("messages", MESSAGES),
            ("kind", _text),
            ("family", _text),
            ("response", _text),
            ("truncated", pa.bool_()),
            ("steps", pa.list_(STEP)),
            ("revision", _text),
            ("key", _text),
            ("model", _text),
            ("constitution_sha", _text),
            ("usage", USAGE),
            ("error", _text),
        ]
    ),
    "red_team": pa.schema(
        [*PROMPT, ("examples", pa.list_(_text)), ("usage", USAGE), ("error", _text)],
    ),
    "sft": pa.schema(
        [
            ("id", _text),
            ("messages", MESSAGES),
            ("kind", _text),
            ("truncated", pa.bool_()),
            ("source_id", _text),
        ]
    ),
    "comparisons": pa.schema(COMPARISON),
    "labels": pa.schema(
        [
            *[c for c in COMPARISON if c[0] not in ("usage", "error")],
            ("votes", pa.list_(VOTE)),
            ("p_a", pa.float64()),
            ("p_a_raw", pa.float64()),
            ("slot_bias", pa.float64()),
            ("feedback_model", _text),
            ("constitution_sha", _text),
            ("usage", USAGE),
            ("error", _text),
        ]
    ),
    "rollouts": pa.schema(
        [
            ("step", pa.int64()),
            ("policy_version", pa.int64()),
            ("id", _text),
            ("messages", MESSAGES),
            ("response", _text),
            ("reward", pa.float64()),
            ("kl_reference", pa.float64()),
            ("length", pa.int64()),
            ("truncated", pa.bool_()),
        ]
    ),
    "examined": pa.schema(
        [
            ("id", _text),
            ("principle_id", _text),
            ("owner_id", _text),
            ("side", _text),
            ("violates", pa.bool_()),
            ("prompt", _text),
            ("response", _text),
            ("at_stake", pa.bool_()),
            ("p_at_stake", pa.float64()),
            ("critique", _text),
            ("revision", _text),
            ("usage", USAGE),
            ("error", _text),
        ]
    ),
    "margins": pa.schema([("id", _text), ("reward_a", pa.float64()), ("reward_b", pa.float64())]),
    "snapshots": pa.schema(
        [
            ("id", _text),
            ("step", pa.int64()),
            ("prompt_id", _text),
            ("messages", MESSAGES),
            ("kind", _text),
            ("family", _text),
            ("response", _text),
            ("truncated", pa.bool_()),
            ("reward", pa.float64()),
            ("opinion", pa.float64()),
        ]
    ),
    "judgements": pa.schema(
        [
            ("id", _text),
            ("prompt_id", _text),
            ("messages", MESSAGES),
            ("kind", _text),
            ("family", _text),
            ("model", _text),
            ("response", _text),
            ("truncated", pa.bool_()),
            ("harmful", pa.bool_()),
            ("helpful", pa.bool_()),
            ("refused", pa.bool_()),
            ("evasive", pa.bool_()),
            ("greedy", pa.bool_()),
            ("malformed", pa.bool_()),
            ("insult", pa.bool_()),
            ("principle_named", _text),
            ("reward", pa.float64()),
            ("usage", USAGE),
            ("error", _text),
        ]
    ),
    "sets": pa.schema(
        [
            ("id", _text),
            ("set", _text),
            ("kind", _text),
            ("model", _text),
            ("prompt_id", _text),
            ("messages", MESSAGES),
            ("unsafe", pa.bool_()),
            ("response", _text),
            ("truncated", pa.bool_()),
            ("refused", pa.bool_()),
            ("options", pa.list_(_text)),
            ("correct", pa.list_(pa.int64())),
            ("scores", pa.list_(pa.float64())),
            ("usage", USAGE),
            ("error", _text),
        ]
    ),
}


def derive_id(*parts: object) -> str:
    """A stable id of 16 hex digits from what a row is about."""
    text = json.dumps(parts, ensure_ascii=True, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def derive_seed(*parts: object) -> int:
    """A sampling seed from the run's seed, the row's id and the step: the same text whoever processes it, whenever."""
    return int(derive_id(*parts)[:8], 16) & 0x7FFFFFFF


def to_table(rows: list[dict[str, Any]], schema: str) -> pa.Table:
    """Rows as an Arrow table of the named schema; columns a row lacks are null."""
    fields = SCHEMAS[schema]
    return pa.Table.from_pylist(
        [{name: row.get(name) for name in fields.names} for row in rows], schema=fields
    )
