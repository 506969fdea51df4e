"""Sections of the stages that generate."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from cai_ray.config.engine import EngineConfig
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
    critique_model: str | None = None
    """The model that writes the critiques, by its name at `critique_engine`. By default the model that answers writes
    them. Revisions are always its own."""
    critique_engine: EngineConfig | None = None
    """The endpoint of `critique_model`."""
    limit: int | None = Field(default=None, gt=0)
    """Use only this many training prompts from the start."""

    @model_validator(mode="after")
    def _critique_is_served(self) -> ReviseConfig:
        if (self.critique_model is None) != (self.critique_engine is None):
            raise ValueError("`critique_model` and `critique_engine` go together; set both, or neither")
        if self.critique_model and not self.critique:
            raise ValueError(
                "critique=false: nobody writes one; leave out `critique_model` and `critique_engine`"
            )
        if self.critique_engine and self.critique_engine.kind != "openai":
            raise ValueError(
                f"critique_engine.kind={self.critique_engine.kind}: the model that answers has the engine here; "
                "use kind: openai, for a local model with the address of a `vllm serve`"
            )
        return self


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

    model: str = by_content("model", "base")
    """The feedback model: `base`, `sl`, a model folder or id, or its name at an endpoint."""
    engine: EngineConfig | None = None
    """The feedback model's own engine or endpoint. Defaults to the run's engine."""
    principles: Literal["all"] | int = 1
    """How many principles vote on each comparison. The paper draws one."""
    both_orders: bool = True
    """Ask each principle twice, with the responses swapped, and average the two answers."""
    combine: Literal["mean", "log_odds"] = "mean"
    """How votes become one label: the mean of their probabilities, or of their log-odds."""
    mode: Literal["logprob", "cot", "score"] = "logprob"
    """`logprob`: the probabilities of the two options are read directly. `cot`: they are read after the model has
    reasoned. `score`: each response is rated from 1 to 10 by itself, and the label is the logistic of the
    difference."""
    reasoning_max_tokens: int = Field(default=512, gt=0)
    """Most tokens of reasoning (`mode: cot`)."""
    reasoning_temperature: float = Field(default=0.0, ge=0, le=2)
    """Sampling temperature of reasoning (`mode: cot`)."""
    clamp: tuple[float, float] | None = None
    """Bounds that the combined probability is clamped to. Defaults to [0.4, 0.6] with `mode: cot` and to no bounds
    otherwise."""
    gold: str | None = by_content("files", None)
    """Comparisons with a known preference on development prompts. They measure the labels and train nothing."""
    gold_limit: int = Field(default=300, gt=0)
    """Use only this many gold comparisons from the start."""
    gates: LabelGates = LabelGates()
    """Bounds that stop the run before it trains on bad labels."""

    @model_validator(mode="before")
    @classmethod
    def _reasoned(cls, data: Any) -> Any:
        """After reasoning, probabilities come out near 0 or 1: the paper clamps these, and these alone."""
        if isinstance(data, dict) and data.get("mode") == "cot":
            return {"clamp": (0.4, 0.6), **data}
        return data

    @field_validator("clamp")
    @classmethod
    def _bounds(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value and not 0 <= value[0] < value[1] <= 1:
            raise ValueError(f"{list(value)}: give two rising probabilities, such as [0.1, 0.9]")
        return value

    @model_validator(mode="after")
    def _measured(self) -> LabelConfig:
        """What a gate looks at is measured."""
        for name in ("max_ece", "min_accuracy"):
            if (bound := getattr(self.gates, name)) is not None and self.gold is None:
                raise ValueError(f"gates.{name}={bound:g} needs gold comparisons; name them in label.gold")
        if (bound := self.gates.max_slot_bias) is not None and not self.both_orders:
            raise ValueError(f"gates.max_slot_bias={bound:g} needs both orders; set label.both_orders: true")
        if bound is not None and self.mode == "score":
            raise ValueError(
                f"gates.max_slot_bias={bound:g}: label.mode=score has no slots; leave the gate out"
            )
        return self

    @field_validator("principles")
    @classmethod
    def _at_least_one(cls, value: Literal["all"] | int) -> Literal["all"] | int:
        if isinstance(value, int) and value < 1:
            raise ValueError("at least one principle must vote; use 1, more, or `all`")
        return value
