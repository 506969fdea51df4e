"""The section of PPO."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from cai_ray.config.judge import JudgeConfig
from cai_ray.config.section import Section
from cai_ray.config.sources import PromptSource
from cai_ray.config.training import TrainConfig


class RewardSource(Section):
    """A reward model of PPO."""

    model: str = "rm"
    """`rm`, or a folder or id of a sequence classifier of one output. One with another tokenizer than the policy's
    reads the response as text."""
    weight: float = 1.0


JUDGE = "judge"
"""The second opinion is a judge's (`ppo.watch.opinion`)."""


class WatchConfig(Section):
    """Snapshots of the policy on development prompts while PPO runs, and alarms on them. Bounds are on the change since
    before the first update; null: no such alarm."""

    every: int = Field(default=0, ge=0)
    """Steps between snapshots, the first before any update; 0: none. With them the one of the best second opinion is
    the stage's result."""
    prompts: tuple[PromptSource, ...] = ()
    """Development prompts, neither trained on nor evaluated on."""
    limit: int = Field(default=128, gt=0)
    opinion: str = JUDGE
    """The second opinion. `judge`: how likely the judge prefers the response to the SL-CAI policy's; or a reward model
    that PPO does not train on (folder or id), in units of its reference set."""
    judge: JudgeConfig | None = None
    """The judge; by default `label.judge`."""
    on_alarm: Literal["log", "stop", "finish"] = "log"
    """`log`: say so and go on. `stop`: end with exit code 3. `finish`: end the stage with the best snapshot."""
    max_boilerplate: float | None = Field(default=0.3, ge=0, le=1)
    """Rise of the share of responses that have one phrase of five words in common."""
    max_length_drift: float | None = Field(default=2.0, gt=1)
    """Factor by which responses become longer or shorter."""
    max_refusals: float | None = Field(default=0.1, ge=0, le=1)
    """Rise of the share of benign prompts (kind `helpful`) that are declined, by the template set's `refusals`."""
    max_malformed: float | None = Field(default=0.1, ge=0, le=1)
    """Rise of the share of responses that are cut off, empty or in a loop."""
    max_opinion_drop: float | None = Field(default=0.05, ge=0)
    """Loss of second opinion since the best snapshot, while the reward is higher than there."""
    patience: int = Field(default=2, gt=0)
    """Snapshots in a row of which that must hold."""

    @property
    def asks_judge(self) -> bool:
        """Whether a judge is asked while PPO runs."""
        return self.every > 0 and self.opinion == JUDGE

    @model_validator(mode="after")
    def _judge_is_asked(self) -> WatchConfig:
        if self.judge and self.opinion != JUDGE:
            raise ValueError(
                f"opinion={self.opinion}: no judge is asked; leave out `judge`, or use opinion: {JUDGE}"
            )
        return self

    @model_validator(mode="after")
    def _has_prompts(self) -> WatchConfig:
        if self.every and not self.prompts:
            raise ValueError(f"every={self.every} needs development prompts; name them in watch.prompts")
        return self


class PpoConfig(TrainConfig):
    rewards: tuple[RewardSource, ...] = Field(default=(RewardSource(),), min_length=1)
    """Reward models; each is centred and scaled by its reward_head.json, clipped, weighted, and added."""
    prompts: tuple[PromptSource, ...] = ()
    """By default the run's prompts."""
    steps: int = Field(default=1000, gt=0)
    value_warmup_steps: int = Field(default=0, ge=0)
    """Further steps at the start in which only the value model is trained."""
    rollout_batch: int = Field(default=256, gt=0)
    """Responses per step, over all workers."""
    minibatch: int = Field(default=128, gt=0)
    epochs: int = Field(default=2, gt=0)
    value_learning_rate: float | None = Field(default=None, gt=0)
    value_init: Literal["rm", "policy"] = "rm"
    """`rm`: the first of `rewards`."""
    temperature: float = Field(default=1.0, gt=0, le=2)
    max_tokens: int = Field(default=512, gt=0)
    async_steps: Literal[0, 1] = 0
    """1: while a step is trained on, the next one's responses are sampled, by weights that are one step old then; they
    are weighted by the ratio of probabilities (`importance_cap`)."""
    advantage: Literal["gae", "rloo", "grpo"] = "gae"
    """gae learns values; rloo and grpo compare the samples of one prompt (`group`), and have no value model."""
    group: int = Field(default=1, gt=0)
    """Samples of each prompt in a step, which `rollout_batch` counts."""
    kl_coef: float = Field(default=0.05, ge=0)
    kl_target: float | None = Field(default=None, gt=0)
    """Mean KL of a response from the reference that `kl_coef` is steered to; null: it stays as it is."""
    kl_horizon: int = Field(default=10_000, gt=0)
    """Responses in which `kl_coef` may grow or shrink by a fifth of itself."""
    max_update_kl: float | None = Field(default=None, gt=0)
    """Mean KL per token of the policy before a step's updates from the one after a minibatch that ends them."""
    clip: float = Field(default=0.2, gt=0)
    value_clip: float | None = Field(default=0.2, gt=0)
    """How far a value may move from the old one in a step, in units of the normalised reward; null: no limit."""
    value_coef: float = Field(default=1.0, gt=0)
    gamma: float = Field(default=1.0, gt=0, le=1)
    lam: float = Field(default=0.95, ge=0, le=1)
    reward_clip: float = Field(default=10.0, gt=0)
    missing_eos_reward: float | None = None
    """Replaces the score of a response that hit the length limit; by default the value after it does (without a value
    model the score stays)."""
    importance_cap: float = Field(default=2.0, gt=0)
    """Largest weight of a token by the ratio of the trainer's probability to the engine's."""
    whiten: Literal["none", "center", "whiten"] = "whiten"
    max_logprob_gap: float = Field(default=0.1, gt=0)
    """Mean absolute difference between the engine's and the trainer's log-probabilities that stops the run."""
    rollout_engines: int = Field(default=1, gt=0)
    weight_sync: Literal["ray", "gloo", "nccl"] = "ray"
    """How weights reach the engines. `ray`: through the object store; a lost engine is replaced while training waits.
    `nccl` (GPUs) and `gloo` (CPUs): vLLM's weight transfer, one broadcast; a lost engine starts the group again."""
    deadline_s: float = Field(default=600, gt=0)
    """An engine that does not answer within it is replaced."""
    save_rollouts: int = Field(default=8, ge=0)
    """Rollouts kept for reading, per step."""
    watch: WatchConfig = WatchConfig()

    @model_validator(mode="after")
    def _groups(self) -> PpoConfig:
        if self.advantage != "gae" and self.group < 2:
            raise ValueError(
                f"advantage={self.advantage} compares samples of one prompt; set group to 2 or more"
            )
        if self.rollout_batch % self.group:
            raise ValueError(f"rollout_batch={self.rollout_batch} is not a multiple of group={self.group}")
        if self.advantage != "gae" and self.value_warmup_steps:
            raise ValueError(
                f"advantage={self.advantage} has no value model to warm up; leave value_warmup_steps out"
            )
        return self
