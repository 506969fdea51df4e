"""The section of PPO."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from cai_ray.config.judge import JudgeConfig
from cai_ray.config.section import Section, by_content, operational
from cai_ray.config.sources import PromptSource
from cai_ray.config.training import TrainConfig


class RewardSource(Section):
    """A reward model that PPO trains on."""

    model: str = by_content("model", "rm")
    """`rm`, or a folder or id of a sequence classifier with one output. If its tokenizer is not the policy's, it reads
    the response as text."""
    weight: float = 1.0
    """Its weight in the sum of rewards."""


JUDGE = "judge"
"""The second opinion is a judge's (`ppo.watch.opinion`)."""


class WatchConfig(Section):
    """Snapshots of the policy on development prompts while PPO runs, and alarms on them.

    Bounds are on the change since before the first update. null: without this alarm."""

    every: int = Field(default=0, ge=0)
    """Steps between snapshots, the first of which comes before any update. 0: no snapshots. With snapshots, the one
    with the best second opinion is the stage's result."""
    prompts: tuple[PromptSource, ...] = ()
    """Development prompts, which are neither trained on nor evaluated on."""
    limit: int = Field(default=128, gt=0)
    """Use only this many of these prompts from the start."""
    opinion: str = by_content("model", JUDGE)
    """The second opinion. `judge`: the probability that the judge prefers the response to the SL-CAI policy's. Or a
    reward model that PPO does not train on (folder or id), in units of its reference set."""
    judge: JudgeConfig | None = None
    """The judge that gives the second opinion. Defaults to `label.judge`."""
    on_alarm: Literal["log", "stop", "finish"] = operational("log")
    """What an alarm does. `log`: one line, and PPO goes on. `stop`: the run ends with exit code 3. `finish`: the stage
    ends with the best snapshot."""
    max_boilerplate: float | None = operational(0.3, ge=0, le=1)
    """Largest rise of the share of responses that have a phrase of five words in common."""
    max_length_drift: float | None = operational(2.0, gt=1)
    """Largest factor by which responses become longer or shorter."""
    max_refusals: float | None = operational(0.1, ge=0, le=1)
    """Largest rise of the share of benign prompts (kind `helpful`) that are declined, by the template set's
    `refusals`."""
    max_malformed: float | None = operational(0.1, ge=0, le=1)
    """Largest rise of the share of responses that are cut off, empty or in a loop."""
    max_opinion_drop: float | None = operational(0.05, ge=0)
    """Largest drop of the second opinion since the best snapshot while the reward is higher than it was there."""
    patience: int = operational(2, gt=0)
    """Snapshots in a row that must exceed `max_opinion_drop`."""

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
    """Stage `ppo`: the SL-CAI policy is trained against the reward model, which makes the RL-CAI policy."""

    rewards: tuple[RewardSource, ...] = Field(default=(RewardSource(),), min_length=1)
    """Reward models. Each reward is centred and scaled by its model's reward_head.json, clipped, weighted and added."""
    prompts: tuple[PromptSource, ...] = ()
    """Prompts of this stage. Defaults to the run's prompts."""
    steps: int = Field(default=1000, gt=0)
    """Steps of sampling, scoring and updating."""
    value_warmup_steps: int = Field(default=0, ge=0)
    """Additional steps at the start in which only the value model is trained."""
    rollout_batch: int = Field(default=256, gt=0)
    """Responses per step, over all workers."""
    minibatch: int = Field(default=128, gt=0)
    """Responses per optimizer step, over all workers."""
    epochs: int = Field(default=2, gt=0)
    """Passes over the responses of a step."""
    value_learning_rate: float | None = Field(default=None, gt=0)
    """Learning rate of the value model. Defaults to `learning_rate`."""
    value_init: Literal["rm", "policy"] = "rm"
    """The weights that the value model starts from. `rm`: those of the first of `rewards`."""
    temperature: float = Field(default=1.0, gt=0, le=2)
    """Sampling temperature of responses."""
    max_tokens: int = Field(default=512, gt=0)
    """Most tokens of a response."""
    async_steps: Literal[0, 1] = 0
    """1: responses for the next step are sampled while this one is trained on. Their weights are one step old, which
    the ratio of probabilities corrects (`importance_cap`)."""
    advantage: Literal["gae", "rloo", "grpo"] = "gae"
    """`gae`: advantages from a value model. `rloo` and `grpo`: advantages from the other responses to the same prompt
    (`group`), without a value model."""
    group: int = Field(default=1, gt=0)
    """Responses to each prompt in a step. `rollout_batch` counts all of them."""
    kl_coef: float = Field(default=0.05, ge=0)
    """Coefficient of the KL penalty on each token."""
    kl_target: float | None = Field(default=None, gt=0)
    """Mean KL of a response from the reference that `kl_coef` is steered to. null: `kl_coef` stays as it is."""
    kl_horizon: int = Field(default=10_000, gt=0)
    """Number of responses over which `kl_coef` may change by a fifth of itself."""
    max_update_kl: float | None = Field(default=None, gt=0)
    """Ends a step's updates once the mean KL per token, from the policy before them, exceeds this. null: no bound."""
    clip: float = Field(default=0.2, gt=0)
    """How far the ratio of probabilities may move from 1 in the clipped objective."""
    value_clip: float | None = Field(default=0.2, gt=0)
    """How far a value may move from the old one in a step, in units of the normalised reward. null: no limit."""
    value_coef: float = Field(default=1.0, gt=0)
    """Coefficient of the value loss."""
    gamma: float = Field(default=1.0, gt=0, le=1)
    """Discount of later rewards."""
    lam: float = Field(default=0.95, ge=0, le=1)
    """Lambda of generalised advantage estimation."""
    reward_clip: float = Field(default=10.0, gt=0)
    """Bound on each normalised reward."""
    missing_eos_reward: float | None = None
    """Replaces the score of a response that hit the length limit. By default the value model's estimate replaces it;
    without a value model the score stays."""
    importance_cap: float = Field(default=2.0, gt=0)
    """Largest weight of a token, which is the ratio of the trainer's probability to the engine's."""
    whiten: Literal["none", "center", "whiten"] = "whiten"
    """Advantages of a step are given mean 0 (`center`), or mean 0 and standard deviation 1 (`whiten`)."""
    max_logprob_gap: float = operational(0.1, gt=0)
    """The run stops if log-probabilities of engine and trainer differ by more than this on average."""
    rollout_engines: int = operational(1, gt=0)
    """Engines that sample responses."""
    weight_sync: Literal["ray", "gloo", "nccl"] = operational("ray")
    """How weights reach the engines. `ray`: through the object store; a lost engine is replaced while training waits.
    `nccl` (GPUs) and `gloo` (CPUs): one broadcast by vLLM's weight transfer; a lost engine restarts the group."""
    deadline_s: float = operational(600, gt=0)
    """An engine that does not answer within this many seconds is replaced."""
    save_rollouts: int = operational(8, ge=0)
    """Rollouts of each step that are kept for reading."""
    watch: WatchConfig = WatchConfig()
    """Snapshots and alarms while PPO runs."""

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
