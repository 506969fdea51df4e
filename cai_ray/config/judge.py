"""A model that is prompted, and a judge: such a model, the document it judges by, how it is asked and how it answers.

Critiques, labels, evaluation, the watch during PPO and the server all take these two sections, with the same keys.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from cai_ray.config.engine import EngineConfig
from cai_ray.config.section import Section, by_content

# Arguments of transformers' `apply_chat_template` that are no arguments of a template.
_RENDERERS_OWN = {
    "conversation", "messages", "chat_template", "tokenize", "add_generation_prompt", "continue_final_message",
    "padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
    "tokenizer_kwargs",
}  # fmt: skip


def check_template_args(value: dict[str, Any]) -> dict[str, Any]:
    """Raises ValueError if one of the arguments of a chat template is set by the renderer itself."""
    if taken := _RENDERERS_OWN & value.keys():
        raise ValueError(f"{min(taken)}: the renderer itself sets it; leave it out")
    return value


class PromptedModel(Section):
    """A model that is prompted, and what belongs to it. Whatever is left out is the run's."""

    model: str = by_content("model", "base")
    """A role (`base`, `sl`, …), a model folder or a hub id; at an endpoint, the name it is served by."""
    engine: EngineConfig | None = by_content("engine", None)
    """The model's own engine or endpoint. Defaults to the run's engine."""
    templates: str | None = by_content("templates", None)
    """The model's own template set, by name or path. Defaults to the run's."""
    template_args: dict[str, Any] = Field(default={})
    """Arguments of the model's chat template, such as {enable_thinking: false}. An endpoint receives them as
    `chat_template_kwargs`. The run's own models also have those of the run."""
    chat_template: str | None = None
    """The name of one of the model's chat templates, where its tokenizer has several. Defaults to the one named
    `default`; for the run's own models, to the run's setting."""

    @field_validator("template_args")
    @classmethod
    def _of_the_template_alone(cls, value: dict[str, Any]) -> dict[str, Any]:
        return check_template_args(value)


class JudgeConfig(PromptedModel):
    """A judge compares two responses to a prompt by the principles of a document."""

    constitution: str | None = by_content("constitution", None)
    """The document that it judges by, by name or path. Defaults to the run's, without the principles in `without`."""
    ask: Literal["pair", "response"] = "pair"
    """`pair`: ask which of the two responses is better. `response`: have each response rated from 1 to 10 by itself;
    the preference is the logistic of the difference."""
    answer: Literal["logprob", "reasoned"] = "logprob"
    """`logprob`: the probabilities of the options are read directly. `reasoned`: they are read after the model has
    reasoned (only with `ask: pair`)."""
    principles: Literal["all"] | int = 1
    """How many principles vote on each comparison. The paper draws one."""
    both_orders: bool = True
    """Ask each principle twice, with the responses swapped, and average the two answers."""
    combine: Literal["mean", "log_odds"] = "mean"
    """How votes become one preference: the mean of their probabilities, or of their log-odds."""
    clamp: tuple[float, float] | None = None
    """Bounds that the combined probability is clamped to. Defaults to [0.4, 0.6] with `answer: reasoned` and to no
    bounds otherwise."""
    reasoning_max_tokens: int = Field(default=512, gt=0)
    """Most tokens of reasoning (`answer: reasoned`)."""
    reasoning_temperature: float = Field(default=0.0, ge=0, le=2)
    """Sampling temperature of reasoning (`answer: reasoned`)."""

    @model_validator(mode="before")
    @classmethod
    def _clamp_of_reasoned(cls, data: Any) -> Any:
        """After reasoning, probabilities come out near 0 or 1: the paper clamps these, and these alone."""
        if isinstance(data, dict) and data.get("answer") == "reasoned":
            return {"clamp": (0.4, 0.6), **data}
        return data

    @field_validator("clamp")
    @classmethod
    def _rising(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value and not 0 <= value[0] < value[1] <= 1:
            raise ValueError(f"{list(value)}: give two rising probabilities, such as [0.1, 0.9]")
        return value

    @field_validator("principles")
    @classmethod
    def _at_least_one(cls, value: Literal["all"] | int) -> Literal["all"] | int:
        if isinstance(value, int) and value < 1:
            raise ValueError("at least one principle must vote; use 1, more, or `all`")
        return value

    @model_validator(mode="after")
    def _reasons_about_pairs(self) -> JudgeConfig:
        if self.ask == "response" and self.answer == "reasoned":
            raise ValueError(
                "answer=reasoned needs ask=pair: a response is rated at once; use answer: logprob"
            )
        return self
