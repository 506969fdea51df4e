"""Micro-batches: rows of like length together, padded, the same number on every rank.

Masks and positions come from the rows' lengths, never from the ids, so that a model whose pad token is its
end token learns to end. Sequences are padded, not packed: each is a row of its own, with positions from 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from cai_ray.errors import InputError


class Example(NamedTuple):
    """A tokenised row."""

    ids: list[int]
    mask: list[int]
    """1 on the tokens that are trained on, 0 on the rest."""


def micro_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices of rows grouped by length, each group of at most `max_tokens` tokens with its padding.

    The longest come first: if memory is short, it shows at once. Equal lengths give equal groups.

    Raises:
        InputError: one row alone is longer than `max_tokens`.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    if order and lengths[order[0]] > max_tokens:
        raise InputError(
            f"micro_batch_tokens={max_tokens} is less than the longest row ({lengths[order[0]]} tokens); "
            f"use {lengths[order[0]]} or more"
        )
    groups: list[list[int]] = []
    for i in order:
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= max_tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def for_rank(
    indices: Sequence[int], rank: int, world: int, lengths: Sequence[int] | None = None
) -> list[int]:
    """This rank's share: as many rows as every rank has, give or take one, and about as many tokens.

    Rows are dealt from the longest to the shortest, to and fro (0 1 1 0 0 1 …); a share keeps their order.

    Args:
        lengths: `lengths[i]` is the length of row i; without it rows count alike.
    """
    order = list(indices)
    if lengths is not None:
        order.sort(key=lambda i: -lengths[i])
    mine = []
    for start in range(0, len(order), world):
        hand = order[start : start + world]
        seat = rank if start // world % 2 == 0 else world - 1 - rank
        mine += hand[seat : seat + 1]
    chosen = set(mine)
    return [i for i in indices if i in chosen]


def fill(groups: list[list[int]], count: int) -> list[list[int]]:
    """Adds empty groups up to `count`. Every rank must run as many micro-batches, or collective calls hang;
    `pad` makes a row of weight zero from an empty group."""
    if len(groups) > count:
        raise ValueError(f"{len(groups)} micro-batches do not fit in {count}")
    return groups + [[] for _ in range(count - len(groups))]


def rank_micro_batches(lengths: Sequence[int], max_tokens: int, rank: int, world: int) -> list[list[int]]:
    """This rank's micro-batches of a batch whose lengths every rank knows; as many on every rank."""
    shares = [for_rank(range(len(lengths)), r, world, lengths) for r in range(world)]
    groups = [
        [[share[i] for i in group] for group in micro_batches([lengths[i] for i in share], max_tokens)]
        for share in shares
    ]
    return fill(groups[rank], max(len(g) for g in groups))


def pad(
    rows: Sequence[Example] | Sequence[Sequence[int]], pad_id: int, side: Literal["left", "right"] = "right"
) -> dict[str, Tensor]:
    """Rows of one micro-batch as tensors (B, T); no rows give one of two padding tokens that counts nowhere.

    Returns:
        input_ids; attention_mask (int64); loss_mask (float32, an `Example`'s mask, else all real tokens);
        position_ids, which count real tokens from 0.
    """
    pairs = [(list(r.ids), list(r.mask)) if isinstance(r, Example) else (list(r), [1] * len(r)) for r in rows]
    # The model attends to something even in a row that counts nowhere: a softmax over nothing is NaN.
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
    # Without a gap, which would begin a packed sequence.
    positions = torch.arange(width).expand(len(pairs), -1)
    if side == "left":
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "loss_mask": loss_mask,
        "position_ids": positions,
    }
