"""Sections of the stages that generate."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from cai_ray.config.judge import JudgeConfig, PromptedModel
from cai_ray.config.section import Section
from cai_ray.config.sources import PromptSource


class ReviseConfig(Section):
    rounds: int = Field(default=4, ge=1)
    draw: Literal["with_replacement", "without_replacement"] = "with_replacement"
    temperature: float = Field(default=1.0, ge=0, le=2)
    """Of the first response. Critiques and revisions use `revision_temperature`."""
    critique: bool = True
    """false: revisions are asked for at once (`direct` of the template set), as in section 3.5 of the paper."""
    revision_temperature: float = Field(default=0.0, ge=0, le=2)
    max_tokens: int = Field(default=512, gt=0)
    critique_max_tokens: int = Field(default=512, gt=0)
    helpful_samples: int = Field(default=1, ge=0)
    """Samples per helpfulness prompt; no critique, they keep the policy helpful."""
    critique_model: PromptedModel | None = None
    """The model at an endpoint that writes the critiques; by default the model that answers. Revisions are always
    that model's own."""
    limit: int | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _critique_is_served(self) -> ReviseConfig:
        if self.critique_model is None:
            return self
        if not self.critique:
            raise ValueError("critique=false: nobody writes one; leave out `critique_model`")
        kind = self.critique_model.engine.kind if self.critique_model.engine else None
        if kind != "openai":
            raise ValueError(
                f"critique_model.{f'engine.kind={kind}' if kind else 'engine is not set'}: the model that answers has "
                "the engine here; use kind: openai, for a local model with the address of a `vllm serve`"
            )
        return self


class RedTeamConfig(Section):
    """Of `cai-ray redteam`, which writes more prompts like the run's own red-team prompts."""

    count: int = Field(default=1000, gt=0)
    """Prompts wanted, the same number of each family."""
    oversample: float = Field(default=1.5, ge=1)
    """So many times as many are asked for, since some will repeat others."""
    examples: int = Field(default=5, gt=0)
    """Prompts of one family that the model is shown."""
    near_duplicates: float = Field(default=0.7, gt=0, lt=1)
    """Leave out what shares more than this of its character 5-grams with another prompt."""
    model: str = "base"
    """Who writes: `base`, or a Hugging Face folder or id."""
    temperature: float = Field(default=1.0, gt=0, le=2)
    max_tokens: int = Field(default=256, gt=0)


class CompareConfig(Section):
    samples: int = Field(default=2, ge=2)
    temperature: float = Field(default=1.0, gt=0, le=2)
    max_tokens: int = Field(default=512, gt=0)
    prompts: tuple[PromptSource, ...] = ()
    """By default the run's prompts."""
    limit: int | None = Field(default=None, gt=0)


class LabelGates(Section):
    """Bounds on label/certificate.json that stop the run before `rm` (exit code 3); the labels are kept."""

    max_slot_bias: float | None = Field(default=None, ge=0, le=1)
    """Of the share of votes whose preferred slot survives the swap, over all votes."""
    max_ece: float | None = Field(default=None, ge=0, le=1)
    """Of the calibration error of the labels as they are, without the scale: so the reward model sees them."""
    min_accuracy: float | None = Field(default=None, ge=0, le=1)
    """Of the share of decided gold comparisons whose label is on the right side of one half."""


class LabelConfig(Section):
    judge: JudgeConfig = JudgeConfig()
    """The feedback model: which model labels the comparisons, and how it is asked."""
    gold: str | None = None
    """Comparisons with a gold preference on development prompts: they measure the labels, and train nothing."""
    gold_limit: int = Field(default=300, gt=0)
    gates: LabelGates = LabelGates()

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
