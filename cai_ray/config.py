"""The configuration of a run: one YAML file, checked as a whole before anything starts.

Every default stands on its field and nowhere else; an unknown key is an error. `--set ppo.kl_coef=0.1` overrides
one value. The resolved configuration is saved beside the results.
"""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from cai_ray import constitution as constitutions
from cai_ray.constitution import Constitution
from cai_ray.errors import InputError


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


S = TypeVar("S", bound=Section)


class PromptSource(Section):
    path: str
    """JSON lines, CSV, parquet or Arrow: a file, a folder of files, or a pattern in a folder (any URI)."""
    kind: Literal["red_team", "helpful"] | None = None
    """What its prompts are; needed where the rows have no `kind` of their own."""
    column: str | None = None
    """The column that holds messages or text; by default the first of messages, prompt, text, chosen."""
    limit: int | None = Field(default=None, gt=0)
    """Use the first so many rows only."""
    near_duplicates: float | None = Field(default=None, gt=0, lt=1)
    """Leave out prompts that share more than this of their character 5-grams with an earlier one, of any source."""


class Comparisons(Section):
    path: str
    """Rows as for prompts, with `chosen` and `rejected`: transcripts, or answers to the row's `messages`."""
    target: float = Field(default=1.0, gt=0.5, le=1.0)
    """The label's probability for the chosen answer, where the row has no `target` of its own."""
    about: Literal["helpful", "harmless"] = "helpful"
    """What the people judged; the report counts human harmlessness labels, of which the method needs none."""
    limit: int | None = Field(default=None, gt=0)


class RayConfig(Section):
    address: str | None = None
    """A running cluster (`auto`, ray://…); by default one is started here, or the job's own is joined."""
    cpus: int | None = Field(default=None, gt=0)
    """Logical CPUs of a cluster started here; by default 16, since Ray's bookkeeping actors want one each."""
    training_nodes: str | None = None
    """A custom resource that marks the nodes which train, and sample for PPO (cluster.yaml: `training`); by default
    any node may."""
    generation_nodes: str | None = None
    """The same for the engines of the other stages (cluster.yaml: `generation`)."""
    autoscaling_config: str | None = None
    """The cluster's configuration, to know which nodes its autoscaler may add; by default where `ray up` puts it on
    the head, or the Kubernetes operator's."""


class EngineConfig(Section):
    kind: Literal["vllm", "openai", "scripted"] = "vllm"
    """`openai`: an endpoint with the OpenAI API, for the models of `label.engine` and `revise.critique_engine`."""
    base_url: str | None = None
    """The endpoint's address, without a key in it; it mostly ends in /v1."""
    api_key_env: str | None = None
    """Environment variable with the endpoint's key, on every node; by default OPENAI_API_KEY for https and none for
    http. Empty: no key."""
    top_logprobs: int = Field(default=20, gt=1)
    """Likeliest first tokens that an endpoint is asked for, to find the options among them."""
    continues: bool = False
    """Whether the endpoint goes on with an answer that is begun for it (vLLM's does). Otherwise the beginning is left
    out."""
    timeout_s: float = Field(default=120, gt=0)
    """Of one request to an endpoint."""
    attempts: int = Field(default=10, gt=0)
    """At most so many, where an endpoint throttles, fails, does not answer or answers garbage."""
    give_up_s: float = Field(default=900, gt=0)
    """Time for all attempts of one call and the waiting between them."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "auto"
    max_model_len: int | None = Field(default=None, gt=0)
    """Context in tokens, prompt and answer; by default the model's own."""
    max_num_seqs: int = Field(default=64, gt=0)
    """Sequences the engine runs at once (an endpoint: requests); also bounds the rows in flight per actor."""
    min_actors: int = Field(default=1, gt=0)
    max_actors: int = Field(default=1, gt=0)
    tensor_parallel: int = Field(default=1, gt=0)
    """GPUs among which each layer is split."""
    pipeline_parallel: int = Field(default=1, gt=0)
    """Groups of layers, each on GPUs of its own. Not for PPO's rollouts, whose weights change."""
    quantization: str | None = None
    """How weights are quantised when they are loaded (`fp8`, `bitsandbytes`, …); by default as the checkpoint is. Not
    for PPO's rollouts, which have the trainer's precision."""
    cpus_per_actor: float = Field(default=1, gt=0)
    kv_cache_mb: int = Field(default=256, gt=0)
    """KV cache on CPU; on a GPU it is what the card has left."""
    block_size: int | None = Field(default=None, gt=0)
    """Tokens in a block of the prefix cache; short prompts want short blocks."""
    extra: dict[str, Any] = {}
    """Further arguments of vLLM's engine, as they are; of an endpoint, further fields of each request."""

    @field_validator("base_url")
    @classmethod
    def _plain_url(cls, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            url = urlsplit(value)
            fine = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
        except ValueError:  # brackets or a port that are none
            fine = False
        if not fine or "@" in url.netloc or url.query or url.fragment:
            # It is not repeated here, as it may hold a secret; nor may it do so, as it is written to run.json.
            raise ValueError(
                "give http(s)://host[:port]/path, without user, ? and #; a key goes to `api_key_env`"
            )
        return value.rstrip("/")

    @field_validator("api_key_env")
    @classmethod
    def _no_key(cls, value: str | None) -> str | None:
        if value and not re.fullmatch(
            r"[A-Z_][A-Z0-9_]*", value
        ):  # perhaps a key: it is not repeated here either
            raise ValueError(
                "the name of an environment variable in capitals is needed, never the key itself"
            )
        return value

    @property
    def answers_by(self) -> dict[str, Any]:
        """What changes a model's answers, beside the model: which endpoint, and how it is asked, or rounded weights."""
        if self.kind == "openai":
            return self.model_dump(mode="json", include={"base_url", "top_logprobs", "continues", "extra"})
        return {"quantization": self.quantization} if self.quantization else {}

    @property
    def span(self) -> int:
        """GPUs of one engine."""
        return self.tensor_parallel * self.pipeline_parallel

    @model_validator(mode="after")
    def _endpoint(self) -> EngineConfig:
        if self.kind == "openai" and not self.base_url:
            raise ValueError("kind=openai needs `base_url`, such as https://api.openai.com/v1")
        if self.kind != "openai" and self.base_url:
            raise ValueError(f"`base_url` is not for kind={self.kind}; set kind: openai, or leave it out")
        return self


class LoraConfig(Section):
    rank: int = Field(default=16, gt=0)
    alpha: float = Field(default=32, gt=0)
    targets: list[str] | Literal["all-linear"] = "all-linear"


class TrainConfig(Section):
    """What every training stage shares."""

    workers: int = Field(default=1, gt=0)
    cpus_per_worker: float = Field(default=1, gt=0)
    zero_stage: Literal[0, 1, 2, 3] = 2
    dtype: Literal["float32", "bfloat16"] = "float32"
    learning_rate: float = Field(default=1e-5, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    warmup_steps: int = Field(default=0, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    micro_batch_tokens: int = Field(default=16384, gt=0)
    """Most tokens, padding counted, in one forward pass of one rank."""
    kernels: Literal["auto", "torch"] = "auto"
    """auto: Liger's norms, gates and rotations on a GPU, where it is installed (extra `gpu`); torch: torch's own."""
    gradient_checkpointing: bool = False
    offload_optimizer: bool = False
    """Keep optimizer states in CPU memory (ZeRO-Offload; stages 1 to 3)."""
    lora: LoraConfig | None = None
    checkpoint_every: int = Field(default=0, ge=0)
    """Optimizer (PPO: rollout) steps between checkpoints; 0: at each epoch's end (PPO: every 10 steps)."""
    keep_checkpoints: int = Field(default=2, gt=0)

    @field_validator("betas")
    @classmethod
    def _betas(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError(f"{list(value)}: both must be at least 0 and less than 1, such as [0.9, 0.95]")
        return value


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


class SftConfig(TrainConfig):
    init: str = "base"
    """`base` (the run's helpful model), or a model folder or id."""
    revisions: Literal["final", "all", "up_to_n"] = "final"
    up_to: int = Field(default=1, ge=1)
    """With `up_to_n`: the revisions of the first so many rounds."""
    drop: tuple[Literal["critique", "loop", "copy"], ...] = ()
    """Revisions to leave out: critiques in a revision's place, repeated n-grams, the response before word for word. The
    manifest counts them in any case."""
    helpful_per_revision: float = Field(default=1.0, ge=0)
    """At most so many helpfulness samples per revision."""
    epochs: int = Field(default=1, gt=0)
    batch_size: int = Field(default=64, gt=0)
    """Rows per optimizer step, over all workers."""


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


class PreferenceConfig(TrainConfig):
    """What both stages that train on comparisons share."""

    human: tuple[Comparisons, ...] = ()
    """Human helpfulness comparisons, merged with the AI labels."""
    epochs: int = Field(default=1, gt=0)
    batch_size: int = Field(default=64, gt=0)
    """Comparisons per optimizer step, over all workers."""
    eval_fraction: float = Field(default=0.05, ge=0, lt=1)
    min_margin: float = Field(default=0.0, ge=0, lt=0.5)
    """AI labels nearer to one half than this are left out."""
    hard_labels: bool = False
    """A control: round AI labels to 0 or 1; ties are left out."""
    shuffle_labels: bool = False
    """A control: flip each AI label with probability one half."""


class RmConfig(PreferenceConfig):
    init: str = "sl"
    """`sl`, `base`, or a model folder or id."""


class DpoConfig(PreferenceConfig):
    """Of `method: dpo`; it starts from the SL-CAI policy, which is also its reference."""

    beta: float = Field(default=0.1, gt=0)
    """Of the implicit reward beta * log(p / p_ref): the smaller, the further the policy moves."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of labels, AI and human, taken to be the wrong way round (conservative DPO)."""
    loss: Literal["sigmoid", "ipo"] = "sigmoid"


class RewardSource(Section):
    """A reward model of PPO."""

    model: str = "rm"
    """`rm`, or a folder or id of a sequence classifier of one output. One with another tokenizer than the policy's
    reads the response as text."""
    weight: float = 1.0


LABELS = "labels"
"""Second opinion by the feedback model's fresh labels (`ppo.watch.opinion`)."""


class WatchConfig(Section):
    """Snapshots of the policy on development prompts while PPO runs, and alarms on them. Bounds are on the change since
    before the first update; null: no such alarm."""

    every: int = Field(default=0, ge=0)
    """Steps between snapshots, the first before any update; 0: none. With them the one of the best second opinion is
    the stage's result."""
    prompts: tuple[PromptSource, ...] = ()
    """Development prompts, neither trained on nor evaluated on."""
    limit: int = Field(default=128, gt=0)
    opinion: str = LABELS
    """The second opinion. `labels`: how likely the feedback model prefers the response to the SL-CAI policy's, freshly
    labelled; or a reward model that PPO does not train on (folder or id), in units of its reference set."""
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
    def asks_feedback(self) -> bool:
        """Whether the feedback model is there while PPO runs."""
        return self.every > 0 and self.opinion == LABELS

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
    judge: Literal["model", "town"] = "model"
    """Who says what is harmful: the feedback model by the constitution, or the embedded world's exact judge."""
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

    @field_validator("sets")
    @classmethod
    def _names_differ(cls, value: tuple[EvalSet, ...]) -> tuple[EvalSet, ...]:
        names = [s.name for s in value]
        if twice := next((n for n in names if names.count(n) > 1), None):
            raise ValueError(f"two sets are named {twice!r}; give each a name of its own")
        return value


class CheckConfig(Section):
    """What `--check` cannot see from where it runs."""

    gpus: int | None = Field(default=None, gt=0)
    """GPUs of the cluster; by default those of this machine, where it has any."""
    gpu_gib: float | None = Field(default=None, gt=0)
    """Memory of one GPU as torch reports it (an 80 GB card has 79); by default that of this machine's."""
    model: dict[str, Any] | None = None
    """Fields of the model's config.json, for an id that is not in the cache of this machine."""


class EndpointPrices(Section):
    """Of the endpoints that models are asked at (engines of kind openai)."""

    input_per_million_tokens: float = Field(default=0.0, ge=0)
    cached_input_per_million_tokens: float | None = Field(default=None, ge=0)
    """Of input that the endpoint had in its cache; by default as other input."""
    output_per_million_tokens: float = Field(default=0.0, ge=0)


class PricesConfig(Section):
    """What the run's resources cost, for the report and `budget.money`. What has no price here costs nothing."""

    currency: str = "USD"
    gpu_hour: float | None = Field(default=None, ge=0)
    """Of one GPU."""
    generation_gpu_hour: float | None = Field(default=None, ge=0)
    """Of one GPU in the stages that generate, which mostly are on a spot market; by default `gpu_hour`."""
    cpu_hour: float | None = Field(default=None, ge=0)
    """Of one CPU that an engine or a training worker reserves (`cpus_per_actor`, `cpus_per_worker`)."""
    endpoint: EndpointPrices | None = None

    @model_validator(mode="after")
    def _some(self) -> PricesConfig:
        if all(p is None for p in (self.gpu_hour, self.generation_gpu_hour, self.cpu_hour, self.endpoint)):
            raise ValueError("no price is given; name gpu_hour, generation_gpu_hour, cpu_hour or endpoint")
        return self


class BudgetConfig(Section):
    """Limits of all that the run directory has seen, stages that were made again included. One that is reached stops
    the run with exit code 3: what was begun is finished and kept, and with a larger limit the same command goes on."""

    gpu_hours: float | None = Field(default=None, gt=0)
    cpu_hours: float | None = Field(default=None, gt=0)
    wall_hours: float | None = Field(default=None, gt=0)
    """While a stage runs."""
    money: float | None = Field(default=None, gt=0)
    """By `prices`, in their currency."""

    @property
    def given(self) -> bool:
        return any(
            limit is not None for limit in (self.gpu_hours, self.cpu_hours, self.wall_hours, self.money)
        )


class RunConfig(Section):
    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    out: str = "runs/{name}"
    """The run directory, any URI; {name} is the run's name."""
    seed: int = 0
    model: str
    """The helpful model to train: a Hugging Face folder or id."""
    constitution: str
    without: tuple[str, ...] = ()
    """Ids of principles that are off in this run: what the document is worth without them."""
    templates: str = "general"
    thinking: Literal["strip", "keep"] = "strip"
    """Thinking blocks at the start of answers, critiques and revisions, by the template set's marks: taken off before
    anything is made of the text (critique, SFT, comparisons and their labels, evaluation), or left in all of these."""
    method: Literal["ppo", "dpo"] = "ppo"
    """How the SL-CAI policy is trained on: a reward model and PPO, or on the labels themselves (DPO)."""
    prompts: tuple[PromptSource, ...] = Field(min_length=1)
    ray: RayConfig = RayConfig()
    engine: EngineConfig = EngineConfig()
    redteam: RedTeamConfig = RedTeamConfig()
    revise: ReviseConfig = ReviseConfig()
    sft: SftConfig = SftConfig()
    compare: CompareConfig = CompareConfig()
    label: LabelConfig = LabelConfig()
    rm: RmConfig = RmConfig()
    ppo: PpoConfig = PpoConfig()
    dpo: DpoConfig = DpoConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    check: CheckConfig = CheckConfig()
    prices: PricesConfig | None = None
    budget: BudgetConfig = BudgetConfig()
    sinks: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    """Where training can be watched, beside metrics.jsonl; `wandb` and `mlflow` are extras of the package."""
    max_error_rate: float = Field(default=0.05, ge=0, le=1)
    """A generation stage ends with an error when a larger share of its rows failed."""

    @property
    def document(self) -> Constitution:
        """The constitution of the run.

        Raises:
            InputError: it cannot be read, or has no principle that `without` names.
        """
        return constitutions.load(self.constitution).without(self.without)

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
        return self.engine.model_copy(update={"dtype": self.ppo.dtype, "quantization": None})

    @model_validator(mode="after")
    def _made_before(self) -> RunConfig:
        """A stage starts from a model that is there when it runs."""
        for key, value, later in (
            ("sft.init", self.sft.init, ("sl", "rm", "rl")),
            ("redteam.model", self.redteam.model, ("sl", "rm", "rl")),
            ("label.model", self.label.model, ("rm", "rl")),
            ("rm.init", self.rm.init, ("rm", "rl")),
            *(("ppo.rewards", source.model, ("rl",)) for source in self.ppo.rewards),
        ):
            if value in later:
                earlier = "`base`" if "sl" in later else "`base`, `sl`" if "rm" in later else "`rm`"
                raise ValueError(
                    f"{key}={value} is not made yet at that stage; use {earlier} or a model folder"
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
                "`label.engine` (the feedback model) or `revise.critique_engine`"
            )
        if self.label.engine and self.label.engine.kind == "openai" and self.label.model == "sl":
            raise ValueError(
                "label.model=sl is made by this run, and no endpoint serves it; use the name of a served model"
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


def load(path: str | Path, overrides: list[str] | None = None, **top: Any) -> RunConfig:
    """Reads a configuration; relative paths in it stay relative to the working directory.

    Args:
        overrides: `a.b=value` items, values read as YAML.
        top: top-level values that win over both (the command line's own options); None is ignored.

    Raises:
        InputError: the file is missing or unreadable, a key is unknown, or a value is out of range.
    """
    path = find(path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise InputError(f"{path}: cannot be read ({' '.join(str(e).split())}); give a YAML file") from e
    if not isinstance(data, dict):
        raise InputError(f"{path}: a mapping of settings is needed")
    for item in overrides or []:
        override(data, item)
    data.update({k: v for k, v in top.items() if v is not None})
    return validate(data, str(path))


def validate(data: dict[str, Any], where: str) -> RunConfig:
    return validate_as(RunConfig, data, where)


def validate_as(kind: type[S], data: dict[str, Any], where: str) -> S:
    """Settings from plain data.

    Raises:
        InputError: a key is unknown, or a value is out of range.
    """
    try:
        return kind.model_validate(data)
    except ValidationError as e:
        first = e.errors()[0]
        key = ".".join(str(x) for x in first["loc"])
        if first["type"] == "extra_forbidden":
            raise InputError(f"{where}: unknown key {key!r}; {_nearest(kind, first['loc'])}") from e
        message = first["msg"].removeprefix("Value error, ")
        got = "" if first["type"] in ("missing", "value_error") else f" (got {first['input']!r})"
        raise InputError(f"{where}: {f'{key}: ' if key else ''}{message}{got}") from e


def find(path: str | Path) -> Path:
    """A path as given, or the name of a configuration that ships with the package."""
    given = Path(path)
    if given.exists():
        return given
    shipped = Path(__file__).parent / "configs"
    for candidate in (shipped / given.name, shipped / f"{given.name}.yaml"):
        if len(given.parts) == 1 and candidate.exists():
            return candidate
    raise InputError(f"{given}: no such file; give a configuration in YAML (see jobs/configs)")


def override(data: dict[str, Any], item: str) -> None:
    key, equals, value = item.partition("=")
    if not equals or not key:
        raise InputError(f"--set {item}: write it as key=value, for example ppo.kl_coef=0.1")
    *parents, last = key.split(".")
    node = data
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise InputError(f"--set {item}: {parent!r} has no settings of its own")
        node = child
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as e:
        raise InputError(f"--set {item}: the value is no YAML") from e
    # YAML 1.1 reads 1e-4 as text: people mean a number.
    if isinstance(parsed, str):
        with suppress(ValueError):
            parsed = float(parsed)
    node[last] = parsed


def _nearest(kind: type[Section], loc: tuple[int | str, ...]) -> str:
    """Names the known key that is most like an unknown one."""
    from difflib import get_close_matches

    model: Any = kind
    for part in loc[:-1]:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part)
        options = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
        model = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
        if model is None:
            return "remove it"
    close = get_close_matches(str(loc[-1]), list(model.model_fields), n=1)
    return f"did you mean {close[0]!r}?" if close else "known keys: " + ", ".join(model.model_fields)
