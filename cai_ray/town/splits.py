"""Which requests are for what: the splits of the (verb, object) pairs, and draws of requests from them.

The base model learns its skills on `skill`, the pipeline works on `cai`, and nothing is trained on `dev` and `held`.
"""

from __future__ import annotations

import random
from functools import cache
from typing import Any, Literal

from cai_ray.town.grammar import DEEDS, FAMILIES, FAMILY_OF, KINDS, OWNERS, PHRASINGS, PLACES, TownRequest

Split = Literal["skill", "cai", "dev", "held"]

SPLITS: dict[Split, int] = {"skill": 30, "cai": 24, "dev": 9, "held": 9}
"""Pairs in each cell of 72 (six verbs of a family x twelve objects of a kind). There are 20 cells."""
_SPLIT_SEED = "errand-town"


@cache
def pairs(split: Split) -> tuple[tuple[str, str], ...]:
    """The (verb, object) pairs of a split, stratified by verb family and kind of object."""
    chosen: list[tuple[str, str]] = []
    offset = sum(list(SPLITS.values())[: list(SPLITS).index(split)])
    for family, kinds in PLACES.items():
        for kind in kinds:
            cell = [(verb, thing) for verb in FAMILIES[family] for thing in KINDS[kind]]
            random.Random(f"{_SPLIT_SEED}:{family}:{kind}").shuffle(cell)
            chosen += cell[offset : offset + SPLITS[split]]
    return tuple(chosen)


@cache
def requests(split: Split) -> dict[str, tuple[TownRequest, ...]]:
    """All requests about a split's pairs: harmful ones by principle, benign ones by 'fine:' + family."""
    groups: dict[str, list[TownRequest]] = {}
    for verb, thing in pairs(split):
        for owner in OWNERS:
            for phrasing in range(len(PHRASINGS)):
                request = TownRequest(verb, owner, thing, phrasing)
                key = request.principle or f"fine:{FAMILY_OF[verb]}"
                groups.setdefault(key, []).append(request)
    return {key: tuple(group) for key, group in groups.items()}


HARMFUL_SHARE = 0.46


def draw(split: Split, n: int, rng: random.Random, harmful_share: float = HARMFUL_SHARE) -> list[TownRequest]:
    """n requests, a share of them harmful, spread evenly over the families. They repeat only when all are used."""
    groups = requests(split)
    harmful = round(n * harmful_share)
    benign = [f"fine:{family}" for family in FAMILIES]
    drawn: list[TownRequest] = []
    for keys, count in ((list(DEEDS), harmful), (benign, n - harmful)):
        for i, key in enumerate(keys):
            k = count // len(keys) + (i < count % len(keys))
            while k > 0:
                some = rng.sample(groups[key], min(k, len(groups[key])))
                drawn += some
                k -= len(some)
    rng.shuffle(drawn)
    return drawn


def prompts(split: Split, n: int, seed: int | str) -> list[dict[str, Any]]:
    """n prompts of a split as rows. `family` is a harmful prompt's principle, or a benign prompt's verb family."""
    rows = []
    for i, request in enumerate(draw(split, n, random.Random(f"prompts:{split}:{seed}"))):
        rows.append(
            {
                "id": f"{split}-{seed}-{i:05d}",
                "text": request.text,
                "kind": "red_team" if request.principle else "helpful",
                "family": request.principle or FAMILY_OF[request.verb],
                "verb": request.verb,
                "owner": request.owner,
                "object": request.object,
            }
        )
    return rows
