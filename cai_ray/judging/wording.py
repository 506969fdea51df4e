"""What the words of answers tell without a judge: refusals and their reasons, shared phrases, diversity."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from cai_ray.judging.quality import is_loop, is_refusal
from cai_ray.prompts.templates import TemplateSet
from cai_ray.storage.records import Judgement

PHRASE_WORDS = 5
"""Words of a phrase that many responses may share."""


def evades(text: str, reasons: Sequence[str]) -> bool:
    """Whether a refusal gives no reason: none of a template set's `reasons` matches in it."""
    return not any(re.search(rule, text) for rule in reasons)


def is_malformed(text: str, truncated: bool) -> bool:
    """Whether a text is cut off, empty or repeats itself."""
    return truncated or not text.strip() or is_loop(text)


def judged_by_rules(row: Judgement, templates: TemplateSet) -> Judgement:
    """An answer with `refused`, `evasive` and `malformed` as the template set's rules tell.

    What a judge has filled in stays. Without rules the columns stay empty.
    """
    text = str(row["response"])
    refused = row.get("refused")
    if refused is None and templates.refusals:
        refused = is_refusal(text, templates.refusals)
    malformed = row.get("malformed")
    return {
        **row,
        "refused": refused,
        "evasive": evades(text, templates.reasons) if refused and templates.reasons else None,
        "malformed": is_malformed(text, bool(row["truncated"])) if malformed is None else malformed,
    }


def phrases(responses: Sequence[str], most: int = 20) -> dict[str, float]:
    """The share of responses that contain each of the commonest phrases. After overtraining, Bai et al. 2022 found
    "you are valid, valued, and cared for"."""
    counts: Counter[str] = Counter()
    for text in responses:
        words = text.casefold().split()
        counts.update({" ".join(words[i : i + PHRASE_WORDS]) for i in range(len(words) - PHRASE_WORDS + 1)})
    # Ties are ordered by the phrase itself, so that the same responses always give the same result.
    common = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:most]
    return {phrase: count / len(responses) for phrase, count in common if count > 1}


def wording(responses: Sequence[str]) -> dict[str, Any]:
    """Measures the wording of one policy's responses: commonest phrase, length and diversity.

    Returns:
        phrase, the commonest; boilerplate, its share; words, the mean per response; unique, the share of responses that
        occur once; distinct_2, distinct pairs of neighbouring words over all such pairs (Li et al. 2016,
        arXiv 1510.03055).
    """
    if not responses:
        return {"phrase": None, "boilerplate": None, "words": None, "unique": None, "distinct_2": None}
    phrase, share = next(iter(phrases(responses, 1).items()), (None, 0.0))
    words = [text.casefold().split() for text in responses]
    pairs = Counter(pair for some in words for pair in pairwise(some))
    counts = Counter(responses)
    return {
        "phrase": phrase,
        "boilerplate": share,
        "words": sum(map(len, words)) / len(words),
        "unique": sum(1 for n in counts.values() if n == 1) / len(responses),
        "distinct_2": len(pairs) / pairs.total() if pairs else None,
    }
