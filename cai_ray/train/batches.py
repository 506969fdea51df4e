"""Micro-batches: rows of similar length, padded, as many on every rank.

Masks and positions come from the rows' lengths, never from the ids, so that a model whose pad token is its end token
learns to end. Sequences are padded, not packed: each is a row of its own with positions from 0, and causal attention
needs no mask.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cai_ray.train.runtime.ranks import device

PADDING = {"cpu": 0.05, "cuda": 1.0}
"""The largest share of a batch's tokens that may be padding. A GPU has no limit but the first price: with a limit of
.05 one H200 trained a 1B model a fifth slower (benchmarks/gpu/train.py, `fine`)."""
PRICES = tuple(round(1024 / 2 ** (i / 2)) for i in range(11))
"""The price of one more micro-batch in tokens of padding, tried in this order. The first is about what it costs a GPU.
Below the last, 32, starting one takes a CPU longer than the padding that it saves."""


class Example(NamedTuple):
    """A tokenised row."""

    ids: list[int]
    mask: list[int]
    """1 on the tokens that are trained on, 0 on the others."""


def micro_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices of rows grouped by length, each group of at most `max_tokens` tokens with its padding.

    On a CPU there are as few groups as keep padding below a twentieth of all tokens (`PADDING`). The longest rows come
    first: if memory is short, it shows in the first step. Equal lengths give equal groups. A row that is longer than
    `max_tokens` is a group of its own.
    """
    return rank_micro_batches(lengths, max_tokens, 0, 1)


def rank_micro_batches(lengths: Sequence[int], max_tokens: int, rank: int, world: int) -> list[list[int]]:
    """This rank's micro-batches of a batch whose lengths every rank knows; every rank has as many.

    All ranks split their shares at the same places, so that micro-batches that run at the same time have about the same
    size. A micro-batch may be empty: `pad` makes a row of weight zero from it. Without it collective calls would hang.
    """
    shares = rank_shares(lengths, world)
    groups = split_shares([[lengths[i] for i in share] for share in shares], max_tokens)
    return [select(shares[rank], group) for group in groups]


def rank_shares(lengths: Sequence[int], world: int) -> list[list[int]]:
    """Every rank's share of the rows (`for_rank`), the longest first."""
    return [
        longest_first(for_rank(range(len(lengths)), rank, world, lengths), lengths) for rank in range(world)
    ]


def select(share: Sequence[int], group: range) -> list[int]:
    """A rank's rows of a group; fewer than the group spans, or none, if its share ends before."""
    return list(share[group.start : group.stop])


def split_shares(shares: Sequence[Sequence[int]], max_tokens: int) -> list[range]:
    """The groups that all ranks split their shares into, as ranges of positions in a share.

    Args:
        shares: the lengths of each rank's rows, the longest first.
    """
    rounds = np.zeros((max(map(len, shares)), len(shares)), dtype=np.int64)
    for rank, share in enumerate(shares):
        rounds[: len(share), rank] = share
    real, max_padding = int(rounds.sum()), PADDING[device().type]
    for price in PRICES:
        groups = _cheapest_groups(rounds, max_tokens, price)
        tokens = sum(int(rounds[group[0]].sum()) * len(group) for group in groups)
        if tokens - real <= max_padding * tokens:
            break
    return groups


def _cheapest_groups(rounds: np.ndarray, max_tokens: int, price: int) -> list[range]:
    """Splits rounds (R, world) so that the tokens of all ranks, with padding and `price` for each group, are fewest.

    Dynamic programming over the end of a group.

    Args:
        rounds: [r, rank] is the length of the r-th row in a rank's share; 0 if it has none.
    """
    widest, summed = rounds.max(1, initial=1), rounds.sum(1)
    cost = np.zeros(len(rounds) + 1)
    begin = np.zeros(len(rounds) + 1, dtype=np.int64)
    for end in range(1, len(rounds) + 1):
        begins = np.arange(max(0, end - max(1, max_tokens // int(widest[end - 1]))), end)
        rows = end - begins
        costs = cost[begins] + summed[begins] * rows + price * rounds.shape[1]
        costs[(widest[begins] * rows > max_tokens) & (rows > 1)] = np.inf  # a longer row stands alone
        cost[end], begin[end] = costs.min(), begins[costs.argmin()]
    groups: list[range] = []
    end = len(rounds)
    while end:
        groups.append(range(int(begin[end]), end))
        end = groups[-1].start
    return groups[::-1]


def longest_first(rows: Iterable[int], lengths: Sequence[int]) -> list[int]:
    """Rows by their lengths, the longest first; rows of equal length keep their order."""
    return sorted(rows, key=lambda i: -lengths[i])


def for_rank(
    indices: Sequence[int], rank: int, world: int, lengths: Sequence[int] | None = None
) -> list[int]:
    """This rank's share: as many rows as every other rank has, give or take one, and about as many tokens.

    Rows go to ranks from the longest to the shortest in alternating order (0 1 1 0 0 1 …). A share keeps their order.

    Args:
        lengths: `lengths[i]` is the length of row i; without it all rows count the same.
    """
    order = indices if lengths is None else longest_first(indices, lengths)
    mine: list[int] = []
    for start in range(0, len(order), world):
        turn = order[start : start + world]
        place = rank if start // world % 2 == 0 else world - 1 - rank
        mine += turn[place : place + 1]
    chosen = set(mine)
    return [i for i in indices if i in chosen]


def pad(
    rows: Sequence[Example] | Sequence[Sequence[int]], pad_id: int, side: Literal["left", "right"] = "right"
) -> dict[str, Tensor]:
    """The rows of one micro-batch as tensors (B, T); without rows, one row of padding that counts nowhere.

    Returns:
        `input_ids`; `attention_mask` (int64); `loss_mask` (float32: an `Example`'s mask, else 1 on all real tokens);
        `before` (n,), the places in the flattened rows before a token that counts; and, if padded at the left,
        `position_ids`, which count real tokens from 0.
    """
    pairs = [(list(r.ids), list(r.mask)) if isinstance(r, Example) else (list(r), [1] * len(r)) for r in rows]
    # Even a row that counts nowhere has something to attend to: a softmax over nothing is NaN.
    pairs = pairs or [([pad_id] * 2, [0] * 2)]
    width = max(len(ids) for ids, _ in pairs)
    input_ids = torch.full((len(pairs), width), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    loss_mask = torch.zeros(input_ids.shape)
    for row, (ids, mask) in enumerate(pairs):
        if len(ids) != len(mask):
            raise ValueError(f"row {row}: {len(ids)} ids and a mask of {len(mask)}")
        place = slice(0, len(ids)) if side == "right" else slice(width - len(ids), width)
        input_ids[row, place] = torch.tensor(ids, dtype=torch.int64)
        attention_mask[row, place] = 1
        loss_mask[row, place] = torch.tensor(mask, dtype=torch.float32)
    batch = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "loss_mask": loss_mask,
        # Found here: to find them on a GPU, the host would wait for it.
        "before": before_counted(loss_mask),
    }
    if side == "left":
        batch["position_ids"] = (attention_mask.cumsum(1) - 1).clamp(min=0)
    return batch


def before_counted(mask: Tensor) -> Tensor:
    """(n,): the places in the flattened (B, T) before a token whose mask is not 0."""
    return torch.nn.functional.pad(mask[:, 1:] != 0, (0, 1)).flatten().nonzero().squeeze(1)
