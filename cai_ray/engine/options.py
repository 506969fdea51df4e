"""Computes the log-probabilities of options from the likeliest tokens, which are all that an endpoint gives."""

from __future__ import annotations

import math
from collections.abc import Sequence

from cai_ray.config.engine import EngineConfig
from cai_ray.engine.chat_completion import ChatCompletion, TryAgain, read_first_tokens
from cai_ray.errors import Abstained, InputError, RowError

# Log-probabilities are rounded, so what is left over beside the likeliest tokens is known no better than this.
_LEAST = 1e-6
# One token alone tells enough if it leaves no more than this to all others.
_LEFT_BY_ONE = 0.01
# An endpoint that has log-probabilities may fail to give them once; one that has none says so at once.
_ATTEMPTS = 3
_SPACES = " \t\r\n\u2581\u0120\u010a"  # the last three are how vocabularies spell a blank and a line break


def check_options(options: Sequence[str]) -> None:
    """Raises InputError if options cannot be told apart by their tokens' text."""
    stripped = [o.strip() for o in options]
    if not all(stripped) or len(set(stripped)) != len(stripped):
        raise InputError(f"options {list(options)} differ in spaces alone; choose others in the template set")


def check_logprobs(engine: EngineConfig, key: str) -> None:
    """Raises InputError if the settings keep an endpoint from giving log-probabilities.

    Args:
        key: the setting that describes the engine.
    """
    left_out = {k for k, v in engine.extra.items() if v is None} | set(engine.leave_out)
    if names := sorted(left_out & {"logprobs", "top_logprobs"}):
        raise InputError(
            f"{key}: {', '.join(names)} is left out, and the probabilities of the options cannot be read without; take "
            "it out of leave_out and extra, and use a model and an endpoint that give log-probabilities"
        )


def option_logprobs(top: Sequence[tuple[str, float]], options: Sequence[str]) -> list[float]:
    """Log-probability of each option as the first token, from only the likeliest tokens.

    Tokens that differ from an option only in surrounding spaces are the same choice: their probabilities add up. An
    option that is not in the list is given the largest probability it can have: that of the list's least likely
    token, or what the list leaves over if that is less. So the label is nearer to one half than the model's own, never
    further from it.

    Raises:
        Abstained: no option is in the list.
    """
    matches = [[p for token, p in top if token.strip(_SPACES) == o.strip()] for o in options]
    if not any(matches):
        raise Abstained(f"abstention: none of {list(options)} is among the likeliest first tokens")
    bound = min(math.log(max(_left_over(top), _LEAST)), *(logprob for _, logprob in top))
    return [max(m) + math.log(sum(math.exp(x - max(m)) for x in m)) if m else bound for m in matches]


class FirstTokens:
    """Reads the likeliest first tokens of one endpoint's answers, and remembers that it can give them.

    Args:
        name: the endpoint, for errors.
    """

    def __init__(self, name: str, asked: int):
        self._name, self._asked = name, asked
        self.most = 0
        """The longest list so far."""

    def read(self, answer: ChatCompletion) -> list[tuple[str, float]]:
        """The likeliest first tokens with their log-probabilities.

        Raises:
            InputError: the endpoint has given none yet, or one alone, so that every row would fail.
            RowError: it has given some before, but not in this answer.
            TryAgain: the list is empty.
        """
        remedy = "use a model and an endpoint that have them, such as a `vllm serve`"
        try:
            top = read_first_tokens(answer)
        except ValueError as e:
            raise self._missing(str(e), remedy, least=1) from None
        if top is None:
            if (reason := answer.choices[0].ends) not in ("stop", "length"):  # such as content_filter
                raise RowError(f"the endpoint ended the answer with finish_reason {reason!r}")
            raise self._missing("the endpoint gave no log-probabilities", remedy, least=1)
        if not top:
            again = "" if self.most else remedy
            raise TryAgain("answered an empty list of log-probabilities", remedy=again, attempts=_ATTEMPTS)
        if len(top) == 1 and _left_over(top) > _LEFT_BY_ONE:
            what = (
                f"the endpoint gave one log-probability that is a finite number, of {self._asked} asked for"
            )
            raise self._missing(
                what,
                "raise top_logprobs if it is below what the endpoint can give, switch its own top_k and top_p off, or "
                + remedy,
                least=2,
            )
        self.most = max(self.most, len(top))
        return top

    def _missing(self, what: str, remedy: str, least: int) -> RowError | InputError:
        """The error of one answer, or of all of them while no list had at least so many tokens."""
        return RowError(what) if self.most >= least else InputError(f"{self._name}: {what}; {remedy}")


def _left_over(top: Sequence[tuple[str, float]]) -> float:
    """The probability of all tokens that are not in the list."""
    return 1 - sum(math.exp(logprob) for _, logprob in top)
