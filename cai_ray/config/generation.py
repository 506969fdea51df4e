"""Sections of the stages that generate."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from cai_ray.config.judge import JudgeConfig, PromptedModel
from cai_ray.config.section import Section, by_content, operational
from cai_ray.config.sources import PromptSource


class ReviseConfig(Section):
    """Stage `revise`: the helpful model answers, criticises its answer and revises it."""

    rounds: int = Field(default=4, ge=1)
    """Rounds of critique and revision for each red-team prompt."""
    draw: Literal["with_replacement", "without_replacement"] = "with_replacement"
    """How the principles of a prompt's rounds are drawn from the constitution."""
    temperature: float = Field(default=1.0, ge=0, le=2)
    """Sampling temperature of the first response."""
    critique: bool = True
    """Ask for a critique before each revision. Without one the template set's `direct` asks for the revision, as in
    section 3.5 of the paper."""
    revision_temperature: float = Field(default=0.0, ge=0, le=2)
    """Sampling temperature of critiques and revisions."""
    max_tokens: int = Field(default=512, gt=0)
    """Most tokens of a response or revision."""
    critique_max_tokens: int = Field(default=512, gt=0)
    """Most tokens of a critique."""
    helpful_samples: int = Field(default=1, ge=0)
    """Answers to each helpfulness prompt. They are trained on without a critique, to keep the policy helpful."""
    reviser: PromptedModel | None = None
    """The model that writes critiques and revisions, where the policy is too small to write them. The policy still
    gives the first answers. By default it does all of it."""
    limit: int | None = Field(default=None, gt=0)
    """Use only this many training prompts from the start."""


class RedTeamConfig(Section):
    """`cai-ray redteam`: a model writes more prompts like the run's own red-team prompts."""

    count: int = Field(default=1000, gt=0)
    """Prompts to write, the same number for each family."""
    oversample: float = Field(default=1.5, ge=1)
    """How many times as many prompts to ask for, since some repeat others."""
    examples: int = Field(default=5, gt=0)
    """Prompts of the same family that the model is shown each time."""
    near_duplicates: float = Field(default=0.7, gt=0, lt=1)
    """Leave out prompts that share more than this share of their character 5-grams with another prompt."""
    model: str = by_content("model", "base")
    """The model that writes: `base`, or a Hugging Face folder or id."""
    temperature: float = Field(default=1.0, gt=0, le=2)
    """Sampling temperature."""
    max_tokens: int = Field(default=256, gt=0)
    """Most tokens of a prompt."""


class CompareConfig(Section):
    """Stage `compare`: the SL-CAI policy answers each prompt several times, and the answers are paired."""

    samples: int = Field(default=2, ge=2)
    """Answers to each prompt. Every two of them are a comparison."""
    temperature: float = Field(default=1.0, gt=0, le=2)
    """Sampling temperature."""
    max_tokens: int = Field(default=512, gt=0)
    """Most tokens of an answer."""
    prompts: tuple[PromptSource, ...] = ()
    """Prompts of this stage. Defaults to the run's prompts."""
    truncated: Literal["drop", "keep"] = "keep"
    """Comparisons with an answer that was cut off at `max_tokens`: `keep` labels them, and trains on the cut answer
    without an end of turn; `drop` leaves them out."""
    limit: int | None = Field(default=None, gt=0)
    """Use only this many training prompts from the start."""


class LabelGates(Section):
    """Bounds on label/certificate.json that stop the run before `rm` or `dpo` (exit code 3). The labels are kept."""

    max_slot_bias: float | None = operational(None, ge=0, le=1)
    """Largest share of votes that prefer the same slot after the two responses are swapped."""
    max_ece: float | None = operational(None, ge=0, le=1)
    """Largest expected calibration error of the labels as the reward model sees them, without scaling."""
    min_accuracy: float | None = operational(None, ge=0, le=1)
    """Smallest share of decided gold comparisons whose label is on the right side of one half."""


class LabelConfig(Section):
    """Stage `label`: the feedback model compares the two responses of each comparison."""

    judge: JudgeConfig = JudgeConfig()
    """The feedback model, and how it is asked."""
    gold: str | None = by_content("files", None)
    """Comparisons with a known preference on development prompts. They measure the labels and train nothing."""
    gold_limit: int = Field(default=300, gt=0)
    """Use only this many gold comparisons from the start."""
    truncated: Literal["drop", "keep"] = "keep"
    """Reasoning that was cut off at `judge.reasoning_max_tokens` (`judge.answer: reasoned`): `keep` weighs the options
    after it; `drop` weighs them as if there were none."""
    gates: LabelGates = LabelGates()
    """Bounds that stop the run before it trains on bad labels."""

    @model_validator(mode="after")
    def _measured(self) -> LabelConfig:
        """What a gate looks at is measured."""
        for name in ("max_ece", "min_accuracy"):
            if (bound := getattr(self.gates, name)) is not None and self.gold is None:
                raise ValueError(f"gates.{name}={bound:g} needs gold comparisons; name them in label.gold")
        if (bound := self.gates.max_slot_bias) is not None and not self.judge.both_orders:
            raise ValueError(
                f"gates.max_slot_bias={bound:g} needs both orders; set label.judge.both_orders: true"
            )
        if bound is not None and self.judge.ask == "response":
            raise ValueError(
                f"gates.max_slot_bias={bound:g}: label.judge.ask=response has no slots; leave the gate out"
            )
        return self
