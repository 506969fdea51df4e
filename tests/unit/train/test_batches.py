"""Micro-batches and padding."""

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cai_ray.train.batches import Example, for_rank, micro_batches, pad, rank_micro_batches

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
    for row in range(2):
        real = left["attention_mask"][row].bool()
        assert left["position_ids"][row][real].tolist() == list(range(int(real.sum())))
    assert "position_ids" not in pad([[5, 6, 7, 8], [5, 6]], pad_id=0)  # a model counts these by itself


@pytest.mark.parametrize("side", ["left", "right"])
def test_places_before_what_counts_are_found_beforehand(side):
    batch = pad([Example([5, 6, 7, 8], [0, 0, 1, 1]), Example([5, 6], [0, 1])], pad_id=0, side=side)
    chosen = batch["input_ids"].flatten()[batch["before"]]
    assert chosen.tolist() == [6, 7, 5]


@given(LENGTHS, st.integers(50, 200))
def test_micro_batches_hold_every_row_once_within_the_limit(lengths, limit):
    groups = micro_batches(lengths, limit)
    assert sorted(i for g in groups for i in g) == list(range(len(lengths)))
    assert all(g and len(g) * max(lengths[i] for i in g) <= limit for g in groups)


def test_micro_batches_put_like_lengths_together():
    assert micro_batches([3, 9, 4, 10], 20) == [[3, 1], [2, 0]]


@given(LENGTHS, st.integers(1, 60), st.integers(1, 3))
def test_a_row_longer_than_a_micro_batch_has_one_of_its_own(lengths, limit, world):
    ranks = [rank_micro_batches(lengths, limit, r, world) for r in range(world)]
    assert sorted(i for groups in ranks for g in groups for i in g) == list(range(len(lengths)))
    assert len({len(groups) for groups in ranks}) == 1
    for group in (g for groups in ranks for g in groups if g):
        assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= limit


def skewed(count, median=200, longest=1024, seed=0):
    g = torch.Generator().manual_seed(seed)
    lengths = median * torch.exp(0.8 * torch.randn(count, generator=g))
    return lengths.long().clamp(8, longest).tolist()


@pytest.mark.parametrize(
    ("rows", "median", "world", "most"),
    [(16, 200, 1, 8), (64, 200, 2, 13), (256, 200, 4, 20), (512, 30, 1, 24)],
)
def test_padding_is_at_most_a_twentieth_of_the_tokens(rows, median, world, most):
    lengths = skewed(rows, median)
    groups = [rank_micro_batches(lengths, 8192, r, world) for r in range(world)]
    tokens = sum(len(g) * max(lengths[i] for i in g) for ranks in groups for g in ranks if g)
    assert tokens - sum(lengths) <= 0.05 * tokens
    assert len(groups[0]) <= most  # a micro-batch for every row would have no padding


def test_micro_batches_that_run_at_once_are_of_a_size():
    """Ranks wait for one another in each of them, where gradients or weights are partitioned."""
    lengths = skewed(128)
    ranks = [rank_micro_batches(lengths, 8192, r, 2) for r in range(2)]
    sizes = [[len(g) * max(lengths[i] for i in g) for g in groups] for groups in ranks]
    slower = sum(max(pair) for pair in zip(*sizes, strict=True))
    assert slower <= 1.05 * sum(map(sum, sizes)) / 2


def test_micro_batches_of_many_rows_take_no_time():
    lengths = skewed(4000, median=40)
    started = time.perf_counter()
    micro_batches(lengths, 16384)
    assert time.perf_counter() - started < 5


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
    assert [rank_micro_batches([9, 3, 2], 9, r, 2) for r in range(2)] == [[[0], []], [[1], [2]]]
    batch = pad([], pad_id=3)
    assert batch["loss_mask"].sum() == 0
    assert batch["attention_mask"].sum() == 2
    assert batch["input_ids"].dtype == torch.int64


def test_a_mask_of_another_length_is_refused():
    with pytest.raises(ValueError, match="row 0: 2 ids and a mask of 1"):
        pad([Example([1, 2], [1])], pad_id=0)
