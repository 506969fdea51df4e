"""Micro-batches of comparisons on a rank, and what a model reads of both responses.

Both responses of a comparison are in the same micro-batch, since its loss needs both, but perhaps not in the same
forward pass: a pass takes rows of similar length.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cai_ray.config.training import TrainConfig
from cai_ray.train.batches import longest_first, pad, rank_shares, select, split_shares
from cai_ray.train.dialogues import Dialogues
from cai_ray.train.runtime.ranks import rank, to_device, world_size


class MicroBatch(NamedTuple):
    """Comparisons that share a backward pass."""

    pairs: list[int]
    passes: list[list[int]]
    """Their responses, as dialogues (2i and 2i + 1 of comparison i), by forward pass."""


RowValues = Callable[[dict[str, Tensor]], Tensor]
"""Gives a number for each row of padded inputs (`batches.pad`)."""


class Pairs:
    """The comparisons on a rank.

    Args:
        responses: dialogues 2i and 2i + 1 are the responses a and b of comparison i.
        p_a: (comparisons,), the labels.
        human: (comparisons,), whether a person gave the label.
    """

    def __init__(self, responses: Dialogues, p_a: np.ndarray, human: np.ndarray, pad_id: int):
        self.responses, self.p_a, self.human, self.pad_id = responses, p_a, human, pad_id
        self._lengths = responses.lengths

    def __len__(self) -> int:
        return len(self.p_a)

    def tokens(self, batch: list[int]) -> int:
        """Tokens of both responses of these comparisons, prompts included."""
        return sum(self._lengths[2 * i] + self._lengths[2 * i + 1] for i in batch)

    def micro_batches(self, batch: list[int], cfg: TrainConfig) -> list[MicroBatch]:
        """This rank's micro-batches of at most `cfg.micro_batch_tokens` with padding; every rank has as many passes."""

        max_tokens = cfg.micro_batch_tokens
        sizes = [self._lengths[2 * i] + self._lengths[2 * i + 1] for i in batch]
        dealt = rank_shares(sizes, world_size())
        shares = [[batch[i] for i in share] for share in dealt]
        filled = np.cumsum([max(sizes[i] for i in turn if i is not None) for turn in zip_longest(*dealt)])
        out: list[MicroBatch] = []
        start = 0
        while start < len(filled):
            before = filled[start - 1] if start else 0
            end = int(
                np.searchsorted(filled, before + 0.95 * max_tokens, side="right")
            )  # the rest may be padding
            end = max(end, start + 1)
            while True:
                ranks, tokens = self._passes([share[start:end] for share in shares], max_tokens)
                if tokens <= max_tokens or end == start + 1:
                    break
                end = (start + end) // 2
            out.append(ranks[rank()])
            start = end
        return out

    def _passes(self, pairs: list[list[int]], max_tokens: int) -> tuple[list[MicroBatch], int]:
        """One micro-batch for every rank, and the most tokens that any of them has with padding."""
        rows = [longest_first((2 * i + side for i in own for side in (0, 1)), self._lengths) for own in pairs]
        lengths = [[self._lengths[row] for row in own] for own in rows]
        groups = split_shares(lengths, max_tokens)
        tokens = sum(
            max(own[group.start] for own in lengths if group.start < len(own)) * len(group)
            for group in groups
        )
        return [
            MicroBatch(p, [select(own, group) for group in groups])
            for p, own in zip(pairs, rows, strict=True)
        ], tokens

    def sides(self, micro_batch: MicroBatch, row_values: RowValues) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A number for each response a, one for each response b, the labels, and whether a person labelled.

        All (pairs,); empty for a micro-batch without comparisons.

        Args:
            row_values: gives the numbers, by a forward pass.
        """

        passes = [pad([self.responses[i] for i in rows], self.pad_id) for rows in micro_batch.passes]
        outputs = [row_values(to_device(inputs)) for inputs in passes]
        values = torch.cat([out[: len(rows)] for out, rows in zip(outputs, micro_batch.passes, strict=True)])
        place = {row: k for k, row in enumerate(row for rows in micro_batch.passes for row in rows)}
        pairs = micro_batch.pairs

        def tensor(numbers: Any, dtype: torch.dtype) -> Tensor:
            return torch.as_tensor(numbers, dtype=dtype).to(values.device, non_blocking=True)

        a, b = (values[tensor([place[2 * i + side] for i in pairs], torch.int64)] for side in (0, 1))
        return a, b, tensor(self.p_a[pairs], torch.float32), tensor(self.human[pairs], torch.bool)


def load_pairs(args: dict[str, Any]) -> Pairs:
    """The comparisons from what a loop was given (`ComparisonData.shared`)."""
    import ray

    return Pairs(ray.get(args["responses"]), ray.get(args["p_a"]), ray.get(args["human"]), args["pad_id"])
