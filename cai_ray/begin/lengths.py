"""How long a first run's texts may be: by the data, and by what fits the model's context."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from cai_ray.begin.machine import Machine
from cai_ray.begin.model import ModelFacts, StepTokens
from cai_ray.errors import InputError, RowError
from cai_ray.storage.records import Prompt

_SHORTEST = 16
_BLOCK = 256
"""The context is a multiple of this."""
_TURN = 16
"""Tokens that a turn takes at most where a conversation is quoted in a prompt."""


class Lengths(NamedTuple):
    """Lengths in tokens."""

    prompt: int
    """The length that 95% of the prompts do not exceed."""
    answer: int
    """Most tokens of an answer, a critique or a revision."""
    context: int
    """The context that the engines need for all prompts that are kept."""
    seen: str
    """What says so."""


def prompt_lengths(model: ModelFacts, prompts: Iterable[Prompt]) -> dict[str, int]:
    """The lengths of prompts by id, room for quoting them included; one that the model cannot read is left out."""
    lengths = {}
    for prompt in prompts:
        try:
            tokens = model.prompt_tokens(prompt["messages"])
        except RowError:
            continue
        lengths[prompt["id"]] = tokens + _TURN * (len(prompt["messages"]) - 1)
    return lengths


def choose_lengths(
    model: ModelFacts, steps: StepTokens, lengths: Mapping[str, int], answers: Sequence[str], machine: Machine
) -> Lengths:
    """Lengths for which the prompts of the steps fit the model's context.

    Args:
        lengths: of the prompts, by id.
        answers: some answers of the data.

    Raises:
        InputError: the context has no room for the steps.
    """
    if not lengths:
        raise InputError(f"model {model.name}: its chat template refuses every prompt; name another model")
    usual, most = (256, 512) if machine.gpus else (64, 96)
    answer, seen = usual, f"usual for a first run {'on GPUs' if machine.gpus else 'without a GPU'}"
    if answers:
        long = quantile([model.text_tokens(text) for text in answers], 0.9)
        answer = min(max(-(-long // _SHORTEST) * _SHORTEST, usual), most)
        seen = f"90% of the data's answers have at most {long} tokens"
        # A model writes at its own length: what is short in the data would cut it off.
        seen += f", and a model's own mostly {usual}" if long < usual else ""
        seen += f", but more than {most} take long here" if long > most else ""
    prompt, context = quantile(lengths.values(), 0.95), model.shape.context
    while steps.needed(prompt, answer) > context and answer > _SHORTEST:
        answer = max(_SHORTEST, answer // 2)
        seen = f"the context of {context} tokens has no room for more"
    if (needed := steps.needed(quantile(lengths.values(), 0.5), answer)) > context:
        raise InputError(
            f"model {model.name}: its context of {context} tokens is too short; the prompts of template set "
            f"{model.templates_name} and a middling prompt of the data need {needed}; use a model with a longer context"
        )
    blocks = -(-steps.needed(prompt, answer) // _BLOCK) * _BLOCK
    return Lengths(prompt, answer, min(context, blocks), seen)


def quantile(values: Iterable[int], share: float) -> int:
    """The smallest value that this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
