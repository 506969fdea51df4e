"""Blocks of finished rows: they begin small, so that a kill costs little, and are merged as they become many."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

FULL_BYTES = 16 << 20
"""A file of this size is not merged any more."""
FAN_IN = 16
"""Blocks of about one size that become one."""


class Block(NamedTuple):
    """A file of finished rows."""

    path: str
    bytes: int


class Merger:
    """Keeps the blocks of one writer few: as many of about one size become one, which counts among larger ones.

    So a row is copied some three times, whatever the number of rows.

    Args:
        merge: makes one block of several; None if they are gone.
    """

    def __init__(self, merge: Callable[[Sequence[Block]], Block | None]):
        self.merge = merge
        self.tiers: list[list[Block]] = []

    def add(self, block: Block) -> None:
        """Notes a new block, and merges what is due."""
        new: Block | None = block
        for tier in range(len(self.tiers) + 1):
            if new is None or new.bytes >= FULL_BYTES:
                return
            if tier == len(self.tiers):
                self.tiers.append([])
            own = [*self.tiers[tier], new]
            if len(own) < FAN_IN and sum(b.bytes for b in own) < FULL_BYTES:
                self.tiers[tier] = own
                return
            self.tiers[tier], new = [], self.merge(own)


def by_size(blocks: Iterable[Block], size: int, count: int) -> Iterator[list[Block]]:
    """Blocks in groups of at most `count`, and of at most `size` bytes where it is more than one."""
    group: list[Block] = []
    for block in blocks:
        if group and (len(group) == count or sum(b.bytes for b in group) + block.bytes > size):
            yield group
            group = []
        group.append(block)
    if group:
        yield group
