"""Sections of the stages that train: SFT, the reward model, DPO."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from cai_ray.config.section import Section
from cai_ray.config.sources import Comparisons


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
