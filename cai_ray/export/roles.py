"""What an export knows of the models and stages of a run: what makes a model, and what its card says of it."""

from __future__ import annotations

from typing import NamedTuple

MODELS = {"ppo": {"sl": "sft", "rm": "rm", "rl": "ppo"}, "dpo": {"sl": "sft", "rl": "dpo"}}
"""By the run's method: the stage that makes the model of a role."""
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


class Role(NamedTuple):
    title: str
    about: str
    stages: tuple[str, ...]
    """Those that made the model: sections of the configuration, and rows that its card counts."""
    tags: tuple[str, ...]
    pipeline_tag: str
    limitations: tuple[str, ...]


def role_of(name: str, method: str) -> Role:
    """The role `sl`, `rm` or `rl` in a run of a method."""
    return _RL_BY_DPO if name == "rl" and method == "dpo" else _ROLES[name]


_POLICY_LIMITATIONS = (
    "It can still help with what the constitution forbids, and decline what it allows. The intervals above are over "
    "prompts of one kind; they say nothing about other prompts, languages, longer conversations or attacks.",
    "The labels are a model's opinion of a short document. What that model does not see, and what the document's "
    "authors did not think of, nobody taught this policy.",
)
_ROLES = {
    "sl": Role(
        "SL-CAI policy",
        "A language model, fine-tuned on its own answers after it had criticised and revised them by a constitution.",
        ("revise", "sft"),
        ("sft",),
        "text-generation",
        _POLICY_LIMITATIONS,
    ),
    "rm": Role(
        "reward model",
        "It scores answers. It was trained on a feedback model's soft preferences by a constitution, and on human "
        "comparisons of helpfulness where there were any.",
        ("compare", "label", "rm"),
        ("reward-model",),
        "text-classification",
        (
            "A score means something only beside other answers to the same prompt; it is not a probability of harm.",
            "A policy that is trained against it finds its faults. It was made for answers like those of the SL-CAI "
            "policy of the same run.",
            "It has the feedback model's blind spots: nobody checked its labels one by one.",
        ),
    ),
    "rl": Role(
        "RL-CAI policy",
        "The SL-CAI policy after reinforcement learning (PPO) against the reward model of the same run.",
        ("revise", "sft", "compare", "label", "rm", "ppo"),
        ("ppo", "rlaif"),
        "text-generation",
        (
            *_POLICY_LIMITATIONS,
            "It was trained against a learnt reward: answers may please the reward model more than a reader.",
        ),
    ),
}
_RL_BY_DPO = Role(
    "RL-CAI policy",
    "The SL-CAI policy after direct preference optimisation (DPO) on a feedback model's soft preferences by a "
    "constitution, and on human comparisons of helpfulness where there were any.",
    ("revise", "sft", "compare", "label", "dpo"),
    ("dpo", "rlaif"),
    "text-generation",
    _POLICY_LIMITATIONS,
)
