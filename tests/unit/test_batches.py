"""Micro-batches and padding."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cai_ray.errors import InputError
from cai_ray.train.batches import Example, fill, for_rank, micro_batches, pad, rank_micro_batches

LENGTHS = st.lists(st.integers(1, 50), max_size=40)


def test_item_14_eos_counts_though_it_pads():
    """A model whose pad token is its end token still sees, and learns, the end token."""
    eos = 2
    rows = [Example([5, 6, 7, eos], [0, 0, 1, 1]), Example([5, eos], [0, 1])]
    for side in ("left", "right"):
        batch = pad(rows, pad_id=eos, side=side)
        for i, row in enumerate(rows):
            real = batch["attention_mask"][i].bool()
            assert batch["input_ids"][i][real].tolist() == row.ids
            assert batch["loss_mask"][i][real].tolist() == row.mask
            assert (batch["loss_mask"][i][~real] == 0).all()
        assert batch["loss_mask"].sum() == 3
    plain = pad([r.ids for r in rows], pad_id=eos)
    assert plain["loss_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


def test_item_33_positions_follow_the_attention_mask():
    left = pad([[5, 6, 7, 8], [5, 6]], pad_id=0, side="left")
    assert left["position_ids"].tolist() == [[0, 1, 2, 3], [0, 0, 0, 1]]
    right = pad([[5, 6, 7, 8], [5, 6]], pad_id=0)
    assert right["position_ids"][1, :2].tolist() == [0, 1]
    for batch in (left, right):
        for row in range(2):
            real = batch["attention_mask"][row].bool()
            assert batch["position_ids"][row][real].tolist() == list(range(int(real.sum())))


@given(LENGTHS, st.integers(50, 200))
def test_micro_batches_hold_every_row_once_within_the_limit(lengths, limit):
    groups = micro_batches(lengths, limit)
    assert sorted(i for g in groups for i in g) == list(range(len(lengths)))
    assert all(g and len(g) * max(lengths[i] for i in g) <= limit for g in groups)


def test_micro_batches_put_like_lengths_together():
    assert micro_batches([3, 9, 4, 10], 20) == [[3, 1], [2, 0]]
    with pytest.raises(InputError, match=r"micro_batch_tokens=8 .* \(9 tokens\); use 9 or more"):
        micro_batches([3, 9], 8)


@given(LENGTHS, st.integers(1, 5))
def test_for_rank_shares_rows_and_tokens(lengths, world):
    shares = [for_rank(range(len(lengths)), r, world, lengths) for r in range(world)]
    assert sorted(i for s in shares for i in s) == list(range(len(lengths)))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    tokens = [sum(lengths[i] for i in s) for s in shares]
    # Dealing to and fro keeps any two ranks within one longest row of each other.
    assert max(tokens) - min(tokens) <= max(lengths, default=0)
    assert all(s == sorted(s) for s in shares)


@given(LENGTHS, st.integers(1, 4))
def test_every_rank_runs_as_many_micro_batches(lengths, world):
    ranks = [rank_micro_batches(lengths, 60, r, world) for r in range(world)]
    assert len({len(groups) for groups in ranks}) == 1
    assert sorted(i for groups in ranks for g in groups for i in g) == list(range(len(lengths)))


def test_empty_micro_batch_counts_nowhere():
    assert fill([[1]], 3) == [[1], [], []]
    with pytest.raises(ValueError, match="2 micro-batches do not fit in 1"):
        fill([[1], [2]], 1)
    batch = pad([], pad_id=3)
    assert batch["loss_mask"].sum() == 0
    assert batch["attention_mask"].sum() == 2
    assert batch["input_ids"].dtype == torch.int64


def test_a_mask_of_another_length_is_refused():
    with pytest.raises(ValueError, match="row 0: 2 ids and a mask of 1"):
        pad([Example([1, 2], [1])], pad_id=0)
