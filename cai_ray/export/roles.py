"""What an export knows of the models and stages of a run: what makes a model, and what its card says of it."""

from __future__ import annotations

from typing import NamedTuple

from cai_ray.stages import ROLES as MODELS
from cai_ray.stages import upstream_of

ROWS = {
    "revise": "prompts answered, criticised and revised",
    "sft": "rows of supervised fine-tuning",
    "compare": "pairs of answers",
    "label": "AI labels",
    "rm": "comparisons the reward model was trained and tested on",
    "ppo": "answers sampled in PPO",
    "dpo": "comparisons the policy was trained and tested on",
}
"""What the rows of a stage are."""


class RoleCard(NamedTuple):
    title: str
    about: str
    stages: tuple[str, ...]
    """Those that made the model: sections of the configuration, and rows that its card counts."""
    tags: tuple[str, ...]
    pipeline_tag: str
    limitations: tuple[str, ...]


def role_of(name: str, method: str, reviser: str | None = None) -> RoleCard:
    """The role `sl`, `rm` or `rl` in a run of a method.

    Args:
        reviser: the name of the model that wrote critiques and revisions, if that was not the policy.
    """
    role = _RL_BY_DPO if name == "rl" and method == "dpo" else _ROLES[name]
    if name != "sl" or reviser is None:
        return role
    return role._replace(about=_ABOUT_SL.format(who=reviser))


def _through(stage: str, method: str) -> tuple[str, ...]:
    """A stage and all that it rests on, in order."""
    return (*upstream_of(stage, method), stage)


_POLICY_LIMITATIONS = (
    "It can still help with what the constitution forbids, and decline what it allows. The intervals above are over "
    "prompts of one kind; they say nothing about other prompts, languages, longer conversations or attacks.",
    "The labels are a model's opinion of a short document. What that model does not see, and what the document's "
    "authors did not think of, nobody taught this policy.",
)
_ABOUT_SL = (
    "A language model, fine-tuned on its own answers after {who} had criticised and revised them by "
    "a constitution."
)
_ROLES = {
    "sl": RoleCard(
        f"{MODELS['sl'].title} policy",
        _ABOUT_SL.format(who="it"),
        _through("sft", "ppo"),
        ("sft",),
        "text-generation",
        _POLICY_LIMITATIONS,
    ),
    "rm": RoleCard(
        MODELS["rm"].title,
        "It scores answers. It was trained on a feedback model's soft preferences by a constitution, and on human "
        "comparisons of helpfulness where there were any.",
        tuple(s for s in _through("rm", "ppo") if s not in _through("sft", "ppo")),
        ("reward-model",),
        "text-classification",
        (
            "A score means something only beside other answers to the same prompt; it is not a probability of harm.",
            "A policy that is trained against it finds its faults. It was made for answers like those of the SL-CAI "
            "policy of the same run.",
            "It has the feedback model's blind spots: nobody checked its labels one by one.",
        ),
    ),
    "rl": RoleCard(
        f"{MODELS['rl'].title} policy",
        "The SL-CAI policy after reinforcement learning (PPO) against the reward model of the same run.",
        _through("ppo", "ppo"),
        ("ppo", "rlaif"),
        "text-generation",
        (
            *_POLICY_LIMITATIONS,
            "It was trained against a learnt reward: answers may please the reward model more than a reader.",
        ),
    ),
}
_RL_BY_DPO = RoleCard(
    f"{MODELS['rl'].title} policy",
    "The SL-CAI policy after direct preference optimisation (DPO) on a feedback model's soft preferences by a "
    "constitution, and on human comparisons of helpfulness where there were any.",
    _through("dpo", "dpo"),
    ("dpo", "rlaif"),
    "text-generation",
    _POLICY_LIMITATIONS,
)
