"""The section of stage `evaluate`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from cai_ray.config.judge import JudgeConfig
from cai_ray.config.section import Section
from cai_ray.config.sources import PromptSource


class EvalSet(Section):
    """A published evaluation set (docs/evaluation.md lists the formats)."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9_.-]+$")
    path: str
    """As of prompts, and a task file of BIG-bench."""
    kind: Literal["comparisons", "choices", "refusals"]
    """`comparisons`: the reward model orders them. `choices`: policies weigh lettered options. `refusals`: policies
    answer, and decline by the template set's `refusals` or do not."""
    expect: Literal["refuse", "comply"] | None = None
    """Of refusals, what is right for a row that does not say whether it is safe."""
    ask: str = "{question}\n\n{choices}\n\nAnswer with the letter alone."
    """Of choices, what policies are asked; {choices} is one line for each option."""
    letters: tuple[str, ...] = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    """Of choices, what stands for the options: texts of one token each."""
    limit: int | None = Field(default=None, gt=0)
    """Use the first so many rows only."""

    @model_validator(mode="after")
    def _of_its_kind(self) -> EvalSet:
        if self.expect and self.kind != "refusals":
            raise ValueError(f"expect={self.expect}: {self.kind} say themselves what is right; leave it out")
        for field in ("{question}", "{choices}"):
            if field not in self.ask:
                raise ValueError(f"ask lacks {field}; say where it stands")
        return self


class HarnessConfig(Section):
    """Tasks of lm-evaluation-harness (extra `lm-eval`): which capabilities a policy keeps."""

    tasks: tuple[str, ...] = Field(min_length=1)
    """Names of tasks, groups or tags, as `lm_eval` knows them."""
    limit: int | None = Field(default=None, gt=0)
    """The first so many documents of each task only."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """Examples before each question; by default as many as the task says."""
    include_path: str | None = None
    """A folder with task files of your own."""
    batch_size: int = Field(default=8, gt=0)


class EvaluateConfig(Section):
    prompts: tuple[PromptSource, ...] = ()
    judge: JudgeConfig | None = None
    """Who compares the policies' answers; by default `label.judge`."""
    gold: Literal["town"] | None = None
    """`town`: the exact judge of Errand Town says what is harmful, and no model is asked."""
    temperature: float = Field(default=1.0, ge=0, le=2)
    max_tokens: int = Field(default=512, gt=0)
    greedy: bool = True
    """Whether prompts are answered at temperature 0, too, for the harm there."""
    best_of: int = Field(default=0, ge=0)
    """A control: best of so many SL-CAI samples by the reward model; 0 leaves it out."""
    limit: int | None = Field(default=None, gt=0)
    sets: tuple[EvalSet, ...] = ()
    """Published sets beside the prompts."""
    harness: HarnessConfig | None = None

    @model_validator(mode="after")
    def _judged_once(self) -> EvaluateConfig:
        if self.gold and self.judge:
            raise ValueError(
                f"gold={self.gold} says what is harmful, and no judge is asked; leave out one of the two"
            )
        return self

    @field_validator("sets")
    @classmethod
    def _names_differ(cls, value: tuple[EvalSet, ...]) -> tuple[EvalSet, ...]:
        names = [s.name for s in value]
        if twice := next((n for n in names if names.count(n) > 1), None):
            raise ValueError(f"two sets are named {twice!r}; give each a name of its own")
        return value
