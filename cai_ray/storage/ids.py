"""Ids by the million, in eight bytes each."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Set

import numpy as np


def id_number(id: str) -> int:
    """A derived id (16 hex digits) as a number; numbers are in the order of their ids."""
    return int(id, 16)


class IdSet(Set[str]):
    """A set of ids. Derived ids take eight bytes instead of the hundred of a text in a `frozenset`."""

    def __init__(self, ids: Iterable[str] = ()):
        numbers, others = array("Q"), set()
        for id in ids:
            if (number := _derived(id)) is None:
                others.add(id)
            else:
                numbers.append(number)
        self._numbers, self._others = _unique(numbers), frozenset(others)

    @classmethod
    def of_numbers(cls, numbers: array[int]) -> IdSet:
        """The set of derived ids that are given as numbers (`id_number`)."""
        new = cls()
        new._numbers = _unique(numbers)
        return new

    def __contains__(self, id: object) -> bool:
        if (number := _derived(id)) is None:
            return id in self._others
        place = bisect_left(self._numbers, number)
        return place < len(self._numbers) and self._numbers[place] == number

    def __len__(self) -> int:
        return len(self._numbers) + len(self._others)

    def __iter__(self) -> Iterator[str]:
        yield from (f"{number:016x}" for number in self._numbers)
        yield from self._others


def _unique(numbers: array[int]) -> array[int]:
    return array("Q", np.unique(np.array(numbers)).tobytes())


def _derived(id: object) -> int | None:
    """The number of an id that `derive_id` made; None of any other."""
    if not isinstance(id, str) or len(id) != 16:
        return None
    try:
        number = id_number(id)
    except ValueError:
        return None
    return number if f"{number:016x}" == id else None  # int() also reads capitals, blanks and underscores
