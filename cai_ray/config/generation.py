"""Sections of the stages that generate."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from cai_ray.config.engine import EngineConfig
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
    critique_model: str | None = None
    """The model that writes the critiques, by the name it is served by at `critique_engine`; by default the model
    that answers. Revisions are always that one's own."""
    critique_engine: EngineConfig | None = None
    limit: int | None = Field(default=None, gt=0)

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
    model: str = "base"
    """The feedback model: `base`, `sl`, or a model folder or id; at an endpoint, the name it is served by."""
    engine: EngineConfig | None = None
    """The feedback model's own engine; by default the run's."""
    principles: Literal["all"] | int = 1
    """How many principles vote on a comparison: the paper draws one."""
    both_orders: bool = True
    combine: Literal["mean", "log_odds"] = "mean"
    mode: Literal["logprob", "cot", "score"] = "logprob"
    """`logprob`: the two options are weighed at once. `cot`: after reasoning. `score`: each response is rated from 1 to
    10 by itself, and the preference is the logistic of the difference."""
    reasoning_max_tokens: int = Field(default=512, gt=0)
    reasoning_temperature: float = Field(default=0.0, ge=0, le=2)
    clamp: tuple[float, float] | None = None
    """Bounds of the combined probability, applied after normalising; [0.4, 0.6] with `cot`, where null means none."""
    gold: str | None = None
    """Comparisons with a gold preference on development prompts: they measure the labels, and train nothing."""
    gold_limit: int = Field(default=300, gt=0)
    gates: LabelGates = LabelGates()

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
