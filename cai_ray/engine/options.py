"""Computes the log-probabilities of options from the likeliest tokens, which are all that an endpoint gives."""

from __future__ import annotations

import math
from collections.abc import Sequence

from cai_ray.errors import Abstained, InputError

# Log-probabilities are rounded, so what is left over beside the likeliest tokens is known no better than this.
_LEAST = 1e-6


def check_options(options: Sequence[str]) -> None:
    """Raises InputError if options cannot be told apart by their tokens' text."""
    stripped = [o.strip() for o in options]
    if not all(stripped) or len(set(stripped)) != len(stripped):
        raise InputError(f"options {list(options)} differ in spaces alone; choose others in the template set")


def option_logprobs(top: Sequence[tuple[str, float]], options: Sequence[str]) -> list[float]:
    """Log-probability of each option as the first token, from only the likeliest tokens.

    Tokens that differ from an option only in surrounding spaces are the same choice: their probabilities add up. An
    option that is not in the list is given the largest probability it can have: that of the list's least likely
    token, or what the list leaves over if that is less. So the label is nearer to one half than the model's own, never
    further from it.

    Raises:
        Abstained: no option is in the list.
    """
    matches = [[logprob for token, logprob in top if token.strip() == o.strip()] for o in options]
    if not any(matches):
        raise Abstained(f"abstention: none of {list(options)} is among the likeliest first tokens")
    left = 1 - sum(math.exp(logprob) for _, logprob in top)
    bound = min(math.log(max(left, _LEAST)), *(logprob for _, logprob in top))
    return [max(m) + math.log(sum(math.exp(x - max(m)) for x in m)) if m else bound for m in matches]
