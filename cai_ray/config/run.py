"""The configuration of a run as a whole, and what must hold between its sections."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from cai_ray import constitution as constitutions
from cai_ray.config.cost import BudgetConfig, CheckConfig, PricesConfig
from cai_ray.config.engine import EngineConfig, RayConfig
from cai_ray.config.evaluation import EvaluateConfig
from cai_ray.config.generation import CompareConfig, LabelConfig, RedTeamConfig, ReviseConfig
from cai_ray.config.judge import JudgeConfig, check_template_args
from cai_ray.config.ppo import PpoConfig
from cai_ray.config.section import Section, by_content, operational
from cai_ray.config.sources import PromptSource
from cai_ray.config.training import DpoConfig, PreferenceConfig, RmConfig, SftConfig
from cai_ray.constitution import Constitution
from cai_ray.stages import ROLES, roles_before


class RunConfig(Section):
    """A run as a whole."""

    name: str = operational(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Name of the run."""
    out: str = operational("runs/{name}")
    """The run directory, any URI. {name} stands for the run's name."""
    seed: int = 0
    """Seed of everything that is drawn at random."""
    model: str = by_content("model")
    """The helpful model to train: a folder, a URI, or an id of the Hugging Face hub, also `org/name@revision`."""
    constitution: str = by_content("files")
    """The constitution: the name of one that ships here, or a YAML or Markdown file."""
    without: tuple[str, ...] = ()
    """Ids of principles that are switched off in this run."""
    templates: str = by_content("files", "general")
    """The template set, which says how models are asked: the name of one that ships here, or a YAML file."""
    template_args: dict[str, Any] = Field(default={})
    """Arguments of the chat template of the run's own models, such as {enable_thinking: false}."""
    chat_template: str | None = None
    """The name of one of the chat templates of the run's own models, where their tokenizer has several. Defaults to
    the one named `default`."""
    thinking: Literal["strip", "keep"] = "strip"
    """What happens to thinking blocks at the start of answers, critiques and revisions. `strip`: they are removed
    before the text is used. `keep`: they stay. The template set says how they are marked."""
    method: Literal["ppo", "dpo"] = "ppo"
    """How the SL-CAI policy is trained further. `ppo`: against a reward model. `dpo`: on the labels directly."""
    prompts: tuple[PromptSource, ...] = Field(min_length=1)
    """Red-team and helpfulness prompts to train on."""
    ray: RayConfig = operational(RayConfig())
    """The Ray cluster."""
    engine: EngineConfig = EngineConfig()
    """The engines that generate."""
    redteam: RedTeamConfig = RedTeamConfig()
    """More red-team prompts, before a run."""
    revise: ReviseConfig = ReviseConfig()
    """Critiques and revisions."""
    sft: SftConfig = SftConfig()
    """Fine-tuning on the revisions."""
    compare: CompareConfig = CompareConfig()
    """Pairs of answers."""
    label: LabelConfig = LabelConfig()
    """Labels of the feedback model."""
    rm: RmConfig = RmConfig()
    """The reward model."""
    ppo: PpoConfig = PpoConfig()
    """Reinforcement learning."""
    dpo: DpoConfig = DpoConfig()
    """Direct preference optimisation."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Evaluation on held-out prompts."""
    check: CheckConfig = operational(CheckConfig())
    """What `--check` is told about the cluster."""
    prices: PricesConfig | None = operational(None)
    """Prices of resources."""
    budget: BudgetConfig = operational(BudgetConfig())
    """Limits on what the run may use."""
    sinks: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = operational(("tensorboard",))
    """Where training metrics go besides metrics.jsonl. `wandb` and `mlflow` are extras of the package."""
    max_error_rate: float = operational(0.05, ge=0, le=1)
    """A generation stage ends with an error if a larger share of its rows failed. A source of prompts or comparisons is
    refused if more of its rows cannot be used; one such row alone is always left out, unless this is 0."""

    @property
    def document(self) -> Constitution:
        """The constitution of the run.

        Raises:
            InputError: it cannot be read, or has no principle that `without` names.
        """
        return constitutions.load(self.constitution).without(self.without)

    def document_of(self, judge: JudgeConfig) -> Constitution:
        """The document that a judge judges by: its own, or the run's.

        Raises:
            InputError: it cannot be read.
        """
        return constitutions.load(judge.constitution) if judge.constitution else self.document

    @property
    def judges(self) -> dict[str, JudgeConfig]:
        """The judges that the configuration describes, by their keys."""
        given = {
            "label.judge": self.label.judge,
            "ppo.watch.judge": self.ppo.watch.judge,
            "evaluate.judge": self.evaluate.judge,
        }
        return {key: judge for key, judge in given.items() if judge}

    @property
    def watch_judge(self) -> JudgeConfig:
        """The judge of the snapshots during PPO."""
        return self.ppo.watch.judge or self.label.judge

    @property
    def evaluation_judge(self) -> JudgeConfig:
        """The judge that compares the policies' answers, unless `evaluate.gold` does."""
        return self.evaluate.judge or self.label.judge

    @property
    def preference(self) -> PreferenceConfig:
        """The section of the stage that is trained on comparisons."""
        return self.dpo if self.method == "dpo" else self.rm

    @property
    def watched(self) -> bool:
        """Whether the run takes snapshots of its policy (`ppo.watch`)."""
        return self.method == "ppo" and self.ppo.watch.every > 0

    @property
    def rollout_engine(self) -> EngineConfig:
        """PPO's, in the trainer's precision: log-probabilities of another one would be of another policy."""
        return self.engine.model_copy(update={"dtype": self.ppo.precision, "quantization": None})

    @field_validator("template_args")
    @classmethod
    def _of_the_template_alone(cls, value: dict[str, Any]) -> dict[str, Any]:
        return check_template_args(value)

    @model_validator(mode="after")
    def _made_before(self) -> RunConfig:
        """A stage starts from a model that is there when it runs."""
        for key, value in (
            ("sft.init", self.sft.init),
            ("redteam.model", self.redteam.model),
            ("revise.reviser.model", reviser.model if (reviser := self.revise.reviser) else None),
            *((f"{key}.model", judge.model) for key, judge in self.judges.items()),
            ("rm.init", self.rm.init),
            *(("ppo.rewards", source.model) for source in self.ppo.rewards),
        ):
            made = roles_before(key.split(".")[0])
            if value in ROLES and value not in made:
                usable = made[-1:] if key == "ppo.rewards" else made
                named = ", ".join(f"`{role}`" for role in usable)
                raise ValueError(
                    f"{key}={value} is not made yet at that stage; use {named} or a model folder"
                )
        return self

    @model_validator(mode="after")
    def _money_has_prices(self) -> RunConfig:
        if self.budget.money is not None and self.prices is None:
            raise ValueError(
                f"budget.money={self.budget.money:g} needs prices; name them, such as prices: {{gpu_hour: 2.5}}"
            )
        return self

    @model_validator(mode="after")
    def _best_is_by_reward(self) -> RunConfig:
        if self.evaluate.best_of and self.method == "dpo":
            raise ValueError(
                f"evaluate.best_of={self.evaluate.best_of} chooses by a reward model, and method=dpo trains none; "
                "leave it out, or use method: ppo"
            )
        return self

    @model_validator(mode="after")
    def _policy_is_local(self) -> RunConfig:
        if self.engine.kind == "openai":
            raise ValueError(
                "engine.kind=openai: the policy is trained here, so no endpoint has it; give the endpoint as "
                "`label.judge.engine` (the feedback model) or `revise.reviser.engine`"
            )
        return self

    @model_validator(mode="after")
    def _judges_can_be_asked(self) -> RunConfig:
        for key, judge in self.judges.items():
            if judge.model == "rm":
                raise ValueError(f"{key}.model=rm: a reward model answers no question; use a language model")
            if judge.engine and judge.engine.kind == "openai" and judge.model in ("sl", "rl"):
                raise ValueError(
                    f"{key}.model={judge.model} is made by this run, and no endpoint serves it; use the name of a "
                    "served model"
                )
        return self

    @model_validator(mode="after")
    def _divisible(self) -> RunConfig:
        for section, key, value, workers in (
            ("sft", "batch_size", self.sft.batch_size, self.sft.workers),
            ("rm", "batch_size", self.rm.batch_size, self.rm.workers),
            ("dpo", "batch_size", self.dpo.batch_size, self.dpo.workers),
            ("ppo", "rollout_batch", self.ppo.rollout_batch, self.ppo.workers),
            ("ppo", "minibatch", self.ppo.minibatch, self.ppo.workers),
        ):
            if value % workers:
                near = max(workers, value - value % workers)
                raise ValueError(
                    f"{section}.{key}={value} is not divisible by {workers} workers; use {near} or {near + workers}"
                )
        if self.ppo.rollout_batch % self.ppo.minibatch:
            raise ValueError(
                f"ppo.rollout_batch={self.ppo.rollout_batch} is not a multiple of ppo.minibatch={self.ppo.minibatch}"
            )
        return self
