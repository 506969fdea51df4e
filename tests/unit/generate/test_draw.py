"""Which principle a row meets: docs/method.md item 7."""

from collections import Counter

from cai_ray import constitution
from cai_ray.generate.draw import draw

PRINCIPLES = constitution.load("errand-town").principles


def drawn(principles=PRINCIPLES, n=4, replacement=False, row_id="r", seed=0):
    return draw(principles, n, seed=seed, row_id=row_id, replacement=replacement)


def test_item_07_draws_depend_on_seed_row_and_principles_alone() -> None:
    for replacement in (False, True):
        assert drawn(replacement=replacement) == drawn(tuple(reversed(PRINCIPLES)), replacement=replacement)
    rows = {tuple(p.id for p in drawn(row_id=f"r{i}") if p) for i in range(50)}
    assert len(rows) > 20, "rows draw differently"
    assert [drawn(seed=s) for s in range(5)] != [drawn(seed=0)] * 5


def test_item_07_a_principle_that_goes_redraws_its_own_rows_only() -> None:
    fewer = PRINCIPLES[1:]
    for i in range(300):
        before = drawn(n=1, replacement=True, row_id=f"r{i}")[0]
        after = drawn(fewer, n=1, replacement=True, row_id=f"r{i}")[0]
        if before.id != PRINCIPLES[0].id:
            assert after == before
    # What the 5th principle had falls on the others.
    assert all(p is not None for p in drawn(fewer, n=4))


def test_item_07_draws_are_proportional_to_weights() -> None:
    heavy = (PRINCIPLES[0].model_copy(update={"weight": 4.0}), *PRINCIPLES[1:])
    counts = Counter(draw(heavy, 1, seed=0, row_id=f"r{i}", replacement=True)[0].id for i in range(4000))
    assert abs(counts[PRINCIPLES[0].id] / 4000 - 0.5) < 0.03
    assert all(abs(counts[p.id] / 4000 - 0.125) < 0.02 for p in PRINCIPLES[1:])


def test_a_disabled_principle_keeps_its_slot() -> None:
    off = (PRINCIPLES[0].model_copy(update={"enabled": False}), *PRINCIPLES[1:])
    for i in range(100):
        before, after = drawn(row_id=f"r{i}"), drawn(off, row_id=f"r{i}")
        assert [p.id if p and p.id != PRINCIPLES[0].id else None for p in before] == [
            p.id if p else None for p in after
        ]


def test_without_replacement_no_principle_comes_twice() -> None:
    ids = [p.id for p in drawn(n=9)]
    assert len(ids) == 5 and len(set(ids)) == 5
