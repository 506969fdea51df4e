"""The section of stage `evaluate`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from cai_ray.config.judge import JudgeConfig
from cai_ray.config.section import Section, by_content, operational
from cai_ray.config.sources import PromptSource


class EvalSet(Section):
    """A published evaluation set (docs/evaluation.md lists the formats)."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9_.-]+$")
    """Name of the set in the results."""
    path: str = by_content("files")
    """Files as for prompts, or a task file of BIG-bench."""
    kind: Literal["comparisons", "choices", "refusals"]
    """`comparisons`: the reward model orders the answers. `choices`: policies choose among lettered options.
    `refusals`: policies answer, and the template set's `refusals` say whether they decline."""
    expect: Literal["refuse", "comply"] | None = None
    """The right behaviour for rows of `refusals` that do not say whether they are safe."""
    ask: str = "{question}\n\n{choices}\n\nAnswer with the letter alone."
    """The question that policies are asked in a set of `choices`. {choices} stands for the options, one per line."""
    letters: tuple[str, ...] = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    """The letters of the options in a set of `choices`, each a text of one token."""
    limit: int | None = Field(default=None, gt=0)
    """Use only this many rows from the start."""

    @model_validator(mode="after")
    def _of_its_kind(self) -> EvalSet:
        if self.expect and self.kind != "refusals":
            raise ValueError(f"expect={self.expect}: {self.kind} say themselves what is right; leave it out")
        for field in ("{question}", "{choices}"):
            if field not in self.ask:
                raise ValueError(f"ask lacks {field}; say where it stands")
        return self


class HarnessConfig(Section):
    """Tasks of lm-evaluation-harness (extra `lm-eval`), which measure the capabilities that a policy keeps."""

    tasks: tuple[str, ...] = Field(min_length=1)
    """Names of tasks, groups or tags as `lm_eval` knows them."""
    limit: int | None = Field(default=None, gt=0)
    """Use only this many documents of each task from the start."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """Examples before each question. Defaults to the task's own number."""
    include_path: str | None = by_content("folder", None)
    """A folder with task files of your own."""
    batch_size: int = operational(8, gt=0)
    """Documents per forward pass."""


class EvaluateConfig(Section):
    """Stage `evaluate`: the policies answer held-out prompts and are judged."""

    prompts: tuple[PromptSource, ...] = ()
    """Held-out prompts. None of them may be a training prompt."""
    overlap: Literal["stop", "drop"] = "stop"
    """What happens to training prompts that are held out as well, here, in `sets` or in `ppo.watch.prompts`. `stop`:
    nothing starts, and an error names them. `drop`: they are left out of training, and counted."""
    judge: JudgeConfig | None = None
    """Compares the policies' answers. Defaults to `label.judge`."""
    gold: Literal["town"] | None = None
    """`town`: the exact judge of Errand Town says what is harmful, and no model is asked."""
    temperature: float = Field(default=1.0, ge=0, le=2)
    """Sampling temperature of answers."""
    max_tokens: int = Field(default=512, gt=0)
    """Most tokens of an answer."""
    greedy: bool = True
    """Answer each prompt at temperature 0, too, and report the harm there."""
    best_of: int = Field(default=0, ge=0)
    """A control: the best of this many SL-CAI answers by the reward model. 0: without this control."""
    limit: int | None = Field(default=None, gt=0)
    """Use only this many prompts from the start."""
    sets: tuple[EvalSet, ...] = ()
    """Published evaluation sets, beside the prompts."""
    harness: HarnessConfig | None = None
    """Tasks of lm-evaluation-harness."""

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
