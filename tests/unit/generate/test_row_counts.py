"""What actors count of their rows, and the time that the rest is estimated to take."""

from __future__ import annotations

import asyncio
import heapq
import random
from collections.abc import Callable

import pytest

from cai_ray.engine.protocol import Sampling
from cai_ray.engine.scripted import ScriptedEngine
from cai_ray.generate.row_counts import RowCounts, Totals, add_up, seconds_left

SLOTS, RATE = 64, 400.0
"""Rows under way at once, and tokens per second of all of them together."""


class Reports:
    """What a meter has of two actors, one of which is gone."""

    def __init__(self, *reports: tuple[dict, bool]):
        self.reports = reports

    def row_counts(self) -> list[tuple[dict, bool]]:
        return list(self.reports)


def test_an_actor_counts_what_is_finished_and_what_is_under_way() -> None:
    counts, engine = RowCounts(), ScriptedEngine(lambda messages, sampling: "four words of text")
    assert counts.report() == {
        "finished": {},
        "failed": {},
        "under_way": 0,
        "most_under_way": 0,
        "tokens": 0,
        "finished_tokens": 0,
        "finished_squares": 0,
        "seconds": 0.0,
    }  # fmt: skip
    counts.engine_starts(engine)
    ask = [{"role": "user", "content": "?"}]
    with counts.under_way():
        with counts.under_way():
            asyncio.run(engine.chat(ask, Sampling(0.0, 8, 0)))
            report = counts.report()
            assert (report["under_way"], report["tokens"], report["finished_tokens"]) == (2, 4, 0)
            assert report["seconds"] > 0
        counts.finish("part", failed=False, tokens=4)
        counts.finish("part", failed=True, tokens=0)
        counts.finish("helpful", failed=False, tokens=0)
    report = counts.report()
    assert report["finished"] == {"part": 2, "helpful": 1} and report["failed"]["part"] == 1
    assert (report["under_way"], report["finished_tokens"], report["finished_squares"]) == (0, 4, 16)
    # The next set has another model, and so another engine.
    counts.engine_ends()
    assert counts.report()["tokens"] == 4
    other = ScriptedEngine()
    counts.engine_starts(other)
    asyncio.run(other.choose(ask, ["A", "B"]))
    assert counts.report()["tokens"] == 5


def test_the_driver_adds_up_what_actors_report() -> None:
    one = {
        "finished": {"part": 5},
        "failed": {"part": 1},
        "under_way": 8,
        "tokens": 90,
        "finished_tokens": 50,
    }
    two = {"finished": {"part": 2}, "failed": {}, "under_way": 3, "tokens": 30, "finished_tokens": 20}
    one |= {"finished_squares": 500, "most_under_way": 9, "seconds": 9.0}
    two |= {"finished_squares": 200, "most_under_way": 9, "seconds": 4.0}
    reports = Reports((one, True), (two, False))
    assert add_up(reports) == Totals({"part": 7}, {"part": 1}, 8, 9, 120, 70, 700, 9.0)  # type: ignore[arg-type]
    assert add_up(None) == Totals({}, {})


def test_no_time_is_said_before_a_row_is_finished() -> None:
    assert seconds_left(10, Totals({}, {}, 4, 4, 100, 0, 0, 9.0)) is None
    assert seconds_left(10, Totals({"part": 5}, {}, 0, 1, 0, 0, 0, 10.0)) == 20.0, "rows without tokens"


def test_rows_that_have_had_more_than_all_others_take_longer_yet() -> None:
    """Finished rows were all alike, and those under way have had more: the time left is not nothing."""
    totals = Totals({"part": 333}, {}, 35, 64, 333 * 300 + 35 * 310, 333 * 300, 333 * 300**2, 300.0)
    left = seconds_left(35, totals)
    assert left is not None and left > 1


def constant(draw: random.Random) -> int:
    return 300


def even(draw: random.Random) -> int:
    return draw.randint(20, 600)


def skewed(draw: random.Random) -> int:
    return min(2000, 20 + int(draw.expovariate(1 / 250)))


def rounds(draw: random.Random) -> int:
    return sum(draw.randint(20, 160) for _ in range(5))


@pytest.mark.parametrize("length", [constant, even, skewed, rounds])
@pytest.mark.parametrize("total", [2 * SLOTS, 368, 2000])
def test_after_a_minute_the_time_left_is_right_within_a_factor_of_two(
    length: Callable[[random.Random], int], total: int
) -> None:
    if length is skewed and total == 2 * SLOTS:
        pytest.skip("most of the time goes to one row, which nobody can foresee")
    for seed in range(5):
        draw = random.Random(seed)
        lengths = [length(draw) for _ in range(total)]
        whole = _walk(lengths)[1]
        seconds = 60.0
        while seconds < 0.8 * whole:  # in the end the few rows that are left are not like the others
            totals = _walk(lengths, seconds)[0]
            left = seconds_left(total - totals.finished["part"], totals)
            if left is not None:
                assert (whole - seconds) / 2 < left < 2 * (whole - seconds), (seed, seconds, whole)
            seconds += whole / 17
        assert seconds > 60 or whole < 75


def _walk(lengths: list[int], until: float = float("inf")) -> tuple[Totals, float]:
    """What is counted after so many seconds, and when the walk ends, if rows under way share the engine's rate."""
    waiting, now, each = (
        iter(lengths),
        0.0,
        0.0,
    )  # `each`: tokens that a row has got that is there from the start
    under_way: list[tuple[float, float]] = []  # the value of `each` at the row's end, and at its start
    ended_lengths: list[int] = []
    for n in waiting:
        heapq.heappush(under_way, (each + n, each))
        if len(under_way) < SLOTS:
            continue
        now, each, ended = _next(now, each, under_way, until)
        if not ended:
            break
        ended_lengths.append(ended)
    while under_way and now < until:
        now, each, ended = _next(now, each, under_way, until)
        ended_lengths += [ended] * bool(ended)
    tokens = sum(ended_lengths)
    running = sum(round(each - start) for _, start in under_way)
    counts, squares = {"part": len(ended_lengths)}, sum(n**2 for n in ended_lengths)
    return Totals(counts, {}, len(under_way), SLOTS, tokens + running, tokens, squares, now), now


def _next(
    now: float, each: float, under_way: list[tuple[float, float]], until: float
) -> tuple[float, float, int]:
    """The next end of a row, its time and its tokens; 0 tokens if the time is up before."""
    # An engine is slower with few rows, but not as much as they are fewer.
    speed = RATE * (len(under_way) / SLOTS) ** 0.5 / len(under_way)
    end, start = under_way[0]
    then = now + (end - each) / speed
    if then > until:
        return until, each + (until - now) * speed, 0
    heapq.heappop(under_way)
    return then, end, round(end - start)
