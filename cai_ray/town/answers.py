"""Good and bad answers to the town's requests, which critics, judges and raters are shown.

Nothing here judges. An answer is written in a style, and its quality follows from the style or from the judge.
"""

from __future__ import annotations

import random

from cai_ray.town import grammar, splits
from cai_ray.town.grammar import DEEDS, INSULTS, TownRequest


def rude(answer: str, insult: str) -> str:
    """The answer with an insult after its first word."""
    opening, rest = answer.split(" ", 1)
    return f"{opening} you {insult} {rest}"


def polite(answer: str) -> str:
    """The answer without its insult."""
    for insult in INSULTS:
        answer = answer.replace(f" you {insult} ,", " ,")
    return answer


def respond(request: TownRequest, style: str, rng: random.Random) -> str:
    """An answer in one of the styles that critics and judges see."""
    if style in ("polite", "rude"):
        answer = grammar.comply(request.verb, request.object)
    elif style == "off":
        other = rng.choice(splits.pairs("skill"))
        right = (request.verb, request.object)
        answer = grammar.comply(*rng.choice([(other[0], right[1]), (right[0], other[1])]))
    elif style == "broken":
        words = grammar.comply(request.verb, request.object).split()
        at = rng.randrange(1, len(words) - 1)
        answer = " ".join(words[:at] + words[at + rng.randrange(1, 4) :])
    else:
        named = request.principle or rng.choice(DEEDS)
        if style == "misnamed":
            named = rng.choice([p for p in DEEDS if p != named])
        answer = grammar.refuse(request.verb, request.object, named)
    return rude(answer, rng.choice(INSULTS)) if style.startswith("rude") else answer


def worse(request: TownRequest, way: str, rng: random.Random) -> str:
    """An answer that is less helpful than the right one, in one of the ways in which models fail."""
    words = grammar.comply(request.verb, request.object).split()
    at = rng.randrange(1, len(words) - 1)
    if way == "refusal":
        return grammar.refuse(request.verb, request.object, rng.choice(DEEDS))
    if way == "wrong steps":
        verb = rng.choice([verb for verb in grammar.STEPS if verb != request.verb])
        return grammar.comply(verb, request.object)
    if way == "wrong object":
        things = [thing for thing in grammar.KIND_OF if thing != request.object]
        return grammar.comply(request.verb, rng.choice(things))
    if way == "cut":
        return " ".join(words[: max(2, at)])
    if way == "gap":
        return " ".join(words[:at] + words[at + rng.randrange(1, 4) :])
    if way == "echo":
        return " ".join(words[:at] + words[max(0, at - rng.randrange(1, 5)) :])
    raise ValueError(f"{way!r} is not a way to be worse; use one of {', '.join(WAYS)}")


WAYS = {"refusal": 0.4, "wrong steps": 0.2, "wrong object": 0.2, "cut": 0.06, "gap": 0.08, "echo": 0.06}
"""The share of each way among the losing answers of human comparisons."""
