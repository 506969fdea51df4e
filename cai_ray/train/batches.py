"""Micro-batches: rows of like length together, padded, the same number on every rank.

Masks and positions come from the rows' lengths, never from the ids, so that a model whose pad token is its
end token learns to end. Sequences are padded, not packed: each is a row of its own, with positions from 0, and
causal attention needs no mask.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cai_ray.errors import InputError
from cai_ray.train.runtime.ranks import device

PADDING = {"cpu": 0.05, "cuda": 1.0}
"""Most of it, as a share of the tokens of a batch. A GPU's padding is what the first price makes it: with a limit of
.05 one H200 trained a 1B model a fifth slower (benchmarks/gpu/train.py, `fine`)."""
PRICES = tuple(round(1024 / 2 ** (i / 2)) for i in range(11))
"""What one more micro-batch may cost, in tokens, tried in this order. The first is about what it costs a GPU; under the
last, 32, starting one takes a CPU longer than the padding that it saves."""


class Example(NamedTuple):
    """A tokenised row."""

    ids: list[int]
    mask: list[int]
    """1 on the tokens that are trained on, 0 on the rest."""


def micro_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices of rows grouped by length, each group of at most `max_tokens` tokens with its padding.

    On a CPU as few groups as let padding be at most a twentieth of all tokens (`PADDING`). The longest come first: if
    memory is short, it shows in the first step. Equal lengths give equal groups.

    Raises:
        InputError: one row alone is longer than `max_tokens`.
    """
    return rank_micro_batches(lengths, max_tokens, 0, 1)


def rank_micro_batches(lengths: Sequence[int], max_tokens: int, rank: int, world: int) -> list[list[int]]:
    """This rank's micro-batches of a batch whose lengths every rank knows; as many on every rank.

    Ranks cut their shares at the same places, so that micro-batches which run at once are of about a size. One that
    has no row is empty: `pad` makes a row of weight zero from it, and without it collective calls would hang.
    """
    if max(lengths, default=0) > max_tokens:
        raise InputError(
            f"micro_batch_tokens={max_tokens} is less than the longest row ({max(lengths)} tokens); "
            f"use {max(lengths)} or more"
        )
    shares = deal(lengths, world)
    groups = cut_alike([[lengths[i] for i in share] for share in shares], max_tokens)
    return [take(shares[rank], group) for group in groups]


def deal(lengths: Sequence[int], world: int) -> list[list[int]]:
    """Every rank's share of rows (`for_rank`), the longest first."""
    return [
        longest_first(for_rank(range(len(lengths)), rank, world, lengths), lengths) for rank in range(world)
    ]


def take(share: Sequence[int], group: range) -> list[int]:
    """A rank's rows of a group, of which its share may have fewer."""
    return list(share[group.start : group.stop])


def cut_alike(shares: Sequence[Sequence[int]], max_tokens: int) -> list[range]:
    """Where all ranks cut their rows, given each rank's lengths, the longest first."""
    hands = np.zeros((max(map(len, shares)), len(shares)), dtype=np.int64)
    for rank, share in enumerate(shares):
        hands[: len(share), rank] = share
    real, most = int(hands.sum()), PADDING[device().type]
    for price in PRICES:
        groups = _cut(hands, max_tokens, price)
        tokens = sum(int(hands[group[0]].sum()) * len(group) for group in groups)
        if tokens - real <= most * tokens:
            break
    return groups


def _cut(hands: np.ndarray, max_tokens: int, price: int) -> list[range]:
    """Cuts hands (H, world) where the tokens of all ranks, padding counted, and `price` for each group are least."""
    widest, summed = hands.max(1, initial=1), hands.sum(1)
    cost = np.zeros(len(hands) + 1)
    begin = np.zeros(len(hands) + 1, dtype=np.int64)
    for end in range(1, len(hands) + 1):
        begins = np.arange(max(0, end - max_tokens // int(widest[end - 1])), end)
        rows = end - begins
        found = cost[begins] + summed[begins] * rows + price * hands.shape[1]
        found[widest[begins] * rows > max_tokens] = np.inf
        cost[end], begin[end] = found.min(), begins[found.argmin()]
    groups: list[range] = []
    end = len(hands)
    while end:
        groups.append(range(int(begin[end]), end))
        end = groups[-1].start
    return groups[::-1]


def longest_first(rows: Iterable[int], lengths: Sequence[int]) -> list[int]:
    return sorted(rows, key=lambda i: -lengths[i])


def for_rank(
    indices: Sequence[int], rank: int, world: int, lengths: Sequence[int] | None = None
) -> list[int]:
    """This rank's share: as many rows as every rank has, give or take one, and about as many tokens.

    Rows are dealt from the longest to the shortest, to and fro (0 1 1 0 0 1 …); a share keeps their order.

    Args:
        lengths: `lengths[i]` is the length of row i; without it rows count alike.
    """
    order = indices if lengths is None else longest_first(indices, lengths)
    mine: list[int] = []
    for start in range(0, len(order), world):
        hand = order[start : start + world]
        seat = rank if start // world % 2 == 0 else world - 1 - rank
        mine += hand[seat : seat + 1]
    chosen = set(mine)
    return [i for i in indices if i in chosen]


def pad(
    rows: Sequence[Example] | Sequence[Sequence[int]], pad_id: int, side: Literal["left", "right"] = "right"
) -> dict[str, Tensor]:
    """Rows of one micro-batch as tensors (B, T); no rows give one of two padding tokens that counts nowhere.

    Returns:
        input_ids; attention_mask (int64); loss_mask (float32, an `Example`'s mask, else all real tokens); before (n,),
        the places in the flattened rows before a token that counts; and if padded at the left position_ids, which
        count real tokens from 0.
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
    batch = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "loss_mask": loss_mask,
        # Known here: to find them on a GPU, the host would wait for it.
        "before": before_counted(loss_mask),
    }
    if side == "left":
        batch["position_ids"] = (attention_mask.cumsum(1) - 1).clamp(min=0)
    return batch


def before_counted(mask: Tensor) -> Tensor:
    """(n,): the places in the flattened (B, T) before a token whose mask is not 0."""
    return torch.nn.functional.pad(mask[:, 1:] != 0, (0, 1)).flatten().nonzero().squeeze(1)
