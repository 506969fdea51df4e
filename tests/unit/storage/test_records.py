"""Records: one declaration each, from which the Arrow schema is derived."""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict

import pyarrow as pa
import pytest

from cai_ray.storage import records
from cai_ray.storage.arrow import arrow_type, schema_of, select, to_table
from cai_ray.storage.records import Label, Prompt, Turn


class Inner(TypedDict):
    number: int
    share: NotRequired[float | None]


class Sample(TypedDict):
    id: str
    one: NotRequired[Inner | None]
    many: list[Inner]
    flags: NotRequired[list[bool] | None]


class More(Sample):
    more: str


def test_the_schema_is_derived_from_the_annotations_in_their_order() -> None:
    inner = pa.struct([("number", pa.int64()), ("share", pa.float64())])
    assert schema_of(Sample) == pa.schema(
        [("id", pa.string()), ("one", inner), ("many", pa.list_(inner)), ("flags", pa.list_(pa.bool_()))]
    )
    assert schema_of(More).names == [*schema_of(Sample).names, "more"]


@pytest.mark.parametrize("annotation", [dict[str, int], Literal["a", "b"], int | str, bytes])
def test_an_annotation_without_an_arrow_type_is_an_error(annotation: Any) -> None:
    with pytest.raises(TypeError, match="has no Arrow type"):
        arrow_type(annotation)


def test_a_column_that_is_left_out_is_null() -> None:
    (row,) = to_table([{"id": "a", "many": [{"number": 1}]}], Sample).to_pylist()
    assert row == {"id": "a", "one": None, "many": [{"number": 1, "share": None}], "flags": None}
    assert to_table([], Sample).schema == schema_of(Sample)


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"id": "a", "pair": "0-1"}, "pair"),
        ({"id": "a", "one": {"number": 1, "note": "x"}}, "one.note"),
        ({"id": "a", "many": [{"number": 1}, {"numbers": 2}]}, "many.numbers"),
    ],
)
def test_a_column_that_the_record_does_not_declare_is_an_error(row: dict[str, Any], column: str) -> None:
    with pytest.raises(TypeError, match=f"column {column} is not declared"):
        to_table([{"id": "b"}, row], Sample)


def test_select_takes_the_columns_that_both_have() -> None:
    more: More = {"id": "a", "many": [], "more": "x"}
    assert select(more, Sample) == {"id": "a", "many": []}


def test_every_record_has_a_schema_and_says_what_it_is() -> None:
    declared = [
        value
        for value in vars(records).values()
        if isinstance(value, type) and hasattr(value, "__total__") and value.__module__ == records.__name__
    ]
    assert {Prompt, Label, Turn} <= {*declared}
    for record in declared:
        assert schema_of(record).names and record.__doc__, record


def test_columns_that_other_programs_read_stay_as_they_are() -> None:
    """A run directory is a contract."""
    turn = "struct<role: string, content: string>"
    assert [f"{f.name}: {f.type}" for f in schema_of(Prompt)] == [
        "id: string",
        f"messages: list<item: {turn}>",
        "kind: string",
        "family: string",
        "split: string",
        "source: string",
    ]
    assert ", ".join(schema_of(Label).names) == (
        "id, prompt_id, messages, response_a, response_b, truncated_a, truncated_b, model, temperature, source, kind, "
        "family, votes, p_a, p_a_raw, slot_bias, feedback_model, constitution_sha, usage, error"
    )
    votes = schema_of(Label).field("votes").type.value_type
    assert ", ".join(votes.field(i).name for i in range(votes.num_fields)) == (
        "principle_id, logprob_a, logprob_b, logprob_a_swapped, logprob_b_swapped, p_a, reasoning, reasoning_swapped, "
        "score_a, score_b, abstained, key, "
        "reasoning_truncated, reasoning_tokens, reasoning_swapped_truncated, reasoning_swapped_tokens"
    )
