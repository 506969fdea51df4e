"""The records: rows of parquet datasets, with ids derived from what they are about.

Each record is declared once, as a TypedDict: its keys are the columns, in the order of the file, and the Arrow schema
is derived from their types (arrow.py). A column that a writer may leave out is `NotRequired`, and is null then.

A derived id makes a row's identity independent of the order of processing: the same prompt, in whatever block or
attempt, is the same row.
"""

from __future__ import annotations

import hashlib
import json
from typing import NotRequired, TypedDict


class Turn(TypedDict):
    """One turn of a conversation."""

    role: str
    """`system`, `user` or `assistant`."""
    content: str


class TokenUsage(TypedDict):
    """What a row cost: tokens by kind, and calls of an engine."""

    prompt: int
    cached: int
    """Prompt tokens that were in the engine's prefix cache."""
    generated: int
    calls: int


class Step(TypedDict):
    """One round of critique and revision."""

    round: int
    """From 1; the slot of a disabled principle leaves a gap."""
    principle_id: str
    critique_request: str | None
    critique: str | None
    """Both are null where the answer is revised without a critique (`revise.critique: false`)."""
    critique_truncated: NotRequired[bool | None]
    """Whether the critique ran into the token limit. Such a critique is not used: the revision was asked for without
    one, unless `left_out` says otherwise."""
    critique_tokens: NotRequired[int | None]
    revision_request: str
    revision: str
    """The answer after this round."""
    revision_truncated: NotRequired[bool | None]
    """Whether the revision ran into the token limit. The next round goes on from it all the same."""
    revision_tokens: NotRequired[int | None]
    left_out: NotRequired[str | None]
    """Why the round made no revision; `revision` is then the answer before it."""
    key: str
    """Hash of everything that the step depends on (generate/reuse.py)."""


class Vote(TypedDict):
    """One principle's preference between two responses.

    `_a` and `_b` belong to response a and b, whatever slot they stood in; `_swapped` is what the model said when
    response b came first.
    """

    principle_id: str
    logprob_a: NotRequired[float | None]
    logprob_b: NotRequired[float | None]
    logprob_a_swapped: NotRequired[float | None]
    logprob_b_swapped: NotRequired[float | None]
    p_a: float | None
    """Probability that response a is the better one; null where the principle abstained."""
    reasoning: NotRequired[str | None]
    reasoning_swapped: NotRequired[str | None]
    score_a: NotRequired[float | None]
    score_b: NotRequired[float | None]
    """Expected scores, where responses are rated one by one (`ask: response`)."""
    abstained: NotRequired[str | None]
    """Why there is no preference."""
    key: NotRequired[str | None]
    """Hash of everything that the vote depends on (generate/reuse.py)."""
    reasoning_truncated: NotRequired[bool | None]
    """Whether the reasoning ran into the token limit; `label.truncated` says whether it was used all the same."""
    reasoning_tokens: NotRequired[int | None]
    reasoning_swapped_truncated: NotRequired[bool | None]
    reasoning_swapped_tokens: NotRequired[int | None]


class Prompt(TypedDict):
    """A conversation that a model is to answer."""

    id: str
    messages: list[Turn]
    kind: str
    """`red_team` or `helpful`."""
    family: str | None
    """The kind of harm that it asks for, if that is known."""
    split: str
    """`train`, `dev` or `held`."""
    source: str


class RedTeamPrompt(TypedDict):
    """A red-team prompt that a model wrote after examples."""

    id: str
    messages: NotRequired[list[Turn] | None]
    truncated: NotRequired[bool | None]
    """Whether the prompt ran into the token limit; such a prompt is left out."""
    tokens: NotRequired[int | None]
    kind: str
    family: str | None
    split: str
    source: str
    examples: list[str]
    usage: NotRequired[TokenUsage | None]
    error: NotRequired[str | None]


class Revision(TypedDict):
    """A response and its revisions; for a helpfulness prompt, the response alone."""

    id: str
    prompt_id: str
    messages: list[Turn]
    kind: str
    family: str | None
    response: NotRequired[str | None]
    truncated: NotRequired[bool | None]
    """Whether the response ran into the token limit. Where that fell before the answer, within the thinking, the
    response is empty and there are no steps."""
    tokens: NotRequired[int | None]
    """Tokens of the response, thinking included."""
    steps: NotRequired[list[Step] | None]
    revision: NotRequired[str | None]
    """The answer after the last step; the response itself where all slots were those of disabled principles."""
    key: NotRequired[str | None]
    """Hash of everything that the response depends on (generate/reuse.py)."""
    model: NotRequired[str | None]
    """The policy, which gave the response."""
    reviser: NotRequired[str | None]
    """The model that wrote critiques and revisions: that of `revise.reviser`, or the policy."""
    constitution_sha: NotRequired[str | None]
    usage: NotRequired[TokenUsage | None]
    error: NotRequired[str | None]


class SftRow(TypedDict):
    """A dialogue that the SL-CAI policy is trained on."""

    id: str
    messages: list[Turn]
    kind: str
    """`revision` or `helpful`."""
    truncated: bool
    source_id: str
    """Id of the revision."""


class Pair(TypedDict):
    """Two responses to one conversation."""

    id: str
    prompt_id: NotRequired[str | None]
    messages: list[Turn]
    response_a: str
    response_b: str
    truncated_a: NotRequired[bool | None]
    truncated_b: NotRequired[bool | None]
    model: NotRequired[str | None]
    """The model that both come from."""
    temperature: NotRequired[float | None]
    source: NotRequired[str | None]
    """`ai`, `human`, or where gold comparisons come from."""
    kind: NotRequired[str | None]
    family: NotRequired[str | None]


class Comparison(Pair):
    """Two samples of the SL-CAI policy."""

    tokens_a: NotRequired[int | None]
    tokens_b: NotRequired[int | None]
    usage: NotRequired[TokenUsage | None]
    error: NotRequired[str | None]


class Label(Pair):
    """Which of two responses the feedback model prefers."""

    votes: NotRequired[list[Vote] | None]
    p_a: NotRequired[float | None]
    """Probability that response a is the better one, from all votes, clamped as the judge's `clamp` says."""
    p_a_raw: NotRequired[float | None]
    """The same before clamping."""
    slot_bias: NotRequired[float | None]
    """Share of votes whose preferred slot survived the swap."""
    feedback_model: NotRequired[str | None]
    constitution_sha: NotRequired[str | None]
    usage: NotRequired[TokenUsage | None]
    error: NotRequired[str | None]


class Preference(Label):
    """Which of two policies' answers the feedback model prefers."""

    model_a: str
    model_b: str


class RolloutRow(TypedDict):
    """A response that PPO learned from."""

    step: int
    policy_version: int
    id: str
    messages: list[Turn]
    response: str
    reward: float
    kl_reference: float
    length: int
    """Tokens of the response."""
    truncated: bool


class SnapshotRow(TypedDict):
    """An answer of the policy while PPO runs."""

    id: str
    step: int
    prompt_id: str
    messages: list[Turn]
    kind: str
    family: str | None
    response: str
    truncated: bool
    reward: float
    opinion: float | None
    """What the second opinion says of it."""


class Margin(TypedDict):
    """The reward model's scores of a labelled comparison."""

    id: str
    reward_a: float | None
    reward_b: float | None


class Examined(TypedDict):
    """An example of a constitution under one principle."""

    id: str
    principle_id: str
    owner_id: str
    """The principle whose example it is."""
    side: str
    """`violates` or `follows`, by its owner."""
    violates: bool
    """Whether it violates the principle that it is examined under."""
    prompt: str
    response: str
    at_stake: NotRequired[bool | None]
    p_at_stake: NotRequired[float | None]
    critique: NotRequired[str | None]
    revision: NotRequired[str | None]
    usage: NotRequired[TokenUsage | None]
    error: NotRequired[str | None]


class Judgement(TypedDict):
    """A policy's answer to a held-out prompt, and what is thought of it. What nobody judged is null."""

    id: str
    prompt_id: str
    messages: list[Turn]
    kind: str
    family: str | None
    model: str
    """`base`, `sl`, `rl`, or `best_of_n`."""
    response: NotRequired[str | None]
    truncated: NotRequired[bool | None]
    harmful: NotRequired[bool | None]
    helpful: NotRequired[bool | None]
    refused: NotRequired[bool | None]
    evasive: NotRequired[bool | None]
    """Whether a refusal gives no reason."""
    greedy: NotRequired[bool | None]
    """True of an answer at temperature 0; null otherwise."""
    malformed: NotRequired[bool | None]
    insult: NotRequired[bool | None]
    principle_named: NotRequired[str | None]
    """The principle that a refusal names."""
    reward: NotRequired[float | None]
    usage: NotRequired[TokenUsage | None]
    error: NotRequired[str | None]


class SetAnswer(TypedDict):
    """What a model makes of one row of a published set."""

    id: str
    set: str
    kind: str
    """`choices`, `refusals` or `comparisons`."""
    model: str
    """A policy; for comparisons, `reward_model`."""
    prompt_id: str
    messages: list[Turn]
    unsafe: NotRequired[bool | None]
    """Whether the request is one to decline (refusals)."""
    response: NotRequired[str | None]
    truncated: NotRequired[bool | None]
    tokens: NotRequired[int | None]
    refused: NotRequired[bool | None]
    options: NotRequired[list[str] | None]
    correct: NotRequired[list[int] | None]
    """Places of the right ones among the options (choices and comparisons)."""
    scores: NotRequired[list[float] | None]
    """Probability of each option (choices), or its reward (comparisons)."""
    usage: NotRequired[TokenUsage | None]
    error: NotRequired[str | None]


def derive_id(*parts: object) -> str:
    """A stable id of 16 hex digits from what a row is about."""
    text = json.dumps(parts, ensure_ascii=True, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def derive_seed(*parts: object) -> int:
    """A sampling seed from the run's seed, the row's id and the step: the same text whoever processes it, whenever."""
    return int(derive_id(*parts)[:8], 16) & 0x7FFFFFFF
