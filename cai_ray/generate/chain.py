"""The two parts of a generation stage: a chain, and the rows that go through it."""

from __future__ import annotations

from collections.abc import Awaitable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from cai_ray.cluster.usage import Usage
from cai_ray.config.judge import PromptedModel
from cai_ray.engine.metered import Metered
from cai_ray.engine.protocol import Engine
from cai_ray.errors import RowError

Takes = TypeVar("Takes", bound=Mapping[str, Any])
Gives = TypeVar("Gives", bound=Mapping[str, Any])
_Takes = TypeVar("_Takes", bound=Mapping[str, Any], contravariant=True)
_Gives = TypeVar("_Gives", bound=Mapping[str, Any], covariant=True)


class Chain(Protocol[_Takes, _Gives]):
    """Walks one row through its engine calls: takes a record, and gives another. Picklable.

    It raises RowError where the row cannot be finished. The row then keeps what was made of it until then (`keeping`).
    """

    def __call__(self, engine: Engine, row: _Takes, /) -> Awaitable[_Gives]: ...


@contextmanager
def keeping(made: Mapping[str, object], *engines: Metered) -> Iterator[None]:
    """Lets a row that fails keep what the chain has made of it by then: the columns `made`, and what engines used."""
    try:
        yield
    except RowError as e:
        usage = sum((engine.usage for engine in engines), Usage())
        e.made = {**made, "usage": usage.as_record()}
        raise


class Rows(NamedTuple, Generic[Takes]):
    """Rows with an `id` of their own, and their model: a role, folder or id, or the settings of a model."""

    rows: Iterable[Takes]
    model: PromptedModel | str
