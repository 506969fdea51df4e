"""Sections of the stages that train: SFT, the reward model, DPO."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from cai_ray.config.section import Section, Threads, by_content, checkpoint_layout, operational
from cai_ray.config.sources import Comparisons


class LoraConfig(Section):
    """A low-rank adapter that is trained in the place of all weights."""

    rank: int = Field(default=16, gt=0)
    """Rank of the adapter's matrices."""
    alpha: float = Field(default=32, gt=0)
    """The adapter is scaled by alpha / rank."""
    targets: list[str] | Literal["all-linear"] = "all-linear"
    """Names of the modules that get an adapter."""


class TrainConfig(Section):
    """Settings that every training stage has."""

    workers: int = operational(1, gt=0)
    """Training workers, each with one GPU if there are GPUs."""
    cpus_per_worker: float = operational(1, gt=0)
    """CPUs that each worker reserves."""
    threads: Threads = operational("auto")
    """Threads of a worker. `auto`: on a CPU, and with `offload_optimizer`, the node's cores divided by the workers and
    engines on it; otherwise 1."""
    zero_stage: Literal[0, 1, 2, 3] = checkpoint_layout(2)
    """What DeepSpeed's ZeRO splits over the workers. 1: optimizer states. 2: gradients as well. 3: weights as well."""
    dtype: Literal["float32", "bfloat16", "auto"] = "auto"
    """Precision of forward and backward passes. Master weights are float32. `auto`: bfloat16 if the GPU or the
    processor has units for it, otherwise float32. It is decided at a run's first start."""
    learning_rate: float = Field(default=1e-5, ge=0)
    """Peak learning rate of AdamW."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """How the learning rate falls after the warm-up."""
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """Learning rate at the end, as a share of the peak (not with `schedule: constant`)."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps in which the learning rate rises to its peak."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of AdamW's moments."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW's epsilon."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's weight decay."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm."""
    micro_batch_tokens: int = operational(16384, gt=0)
    """Most tokens in one forward pass of one worker, including padding. A row that is longer has a forward pass of its
    own."""
    max_length: int | None = Field(default=None, gt=1)
    """Most tokens of a row, prompt and answer together. Longer rows are left out and counted; for PPO, prompts to which
    `max_tokens` cannot be added. Defaults to the model's context."""
    kernels: Literal["auto", "torch"] = checkpoint_layout("auto")
    """`auto`: Liger's norms, gates and rotations on a GPU if it is installed (extra `gpu`). `torch`: PyTorch's own."""
    gradient_checkpointing: bool = operational(False)
    """Compute activations again in the backward pass, which takes less memory and more time."""
    offload_optimizer: bool = checkpoint_layout(False)
    """Keep optimizer states in CPU memory (ZeRO-Offload, for ZeRO stages 1 to 3)."""
    lora: LoraConfig | None = None
    """Train a low-rank adapter, which is merged into the saved model. By default all weights are trained."""
    checkpoint_every: int = operational(0, ge=0)
    """Optimizer steps between checkpoints (PPO: rollout steps). 0: at the end of each epoch (PPO: every 10 steps)."""
    keep_checkpoints: int = operational(2, gt=0)
    """Checkpoints that are kept while the stage runs."""

    @field_validator("betas")
    @classmethod
    def _betas(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError(f"{list(value)}: both must be at least 0 and less than 1, such as [0.9, 0.95]")
        return value

    @property
    def precision(self) -> Literal["float32", "bfloat16"]:
        """`dtype`; float32 for an `auto` that no run has decided (provenance/precision.py)."""
        return "float32" if self.dtype == "auto" else self.dtype


class SftConfig(TrainConfig):
    """Stage `sft`: the helpful model is fine-tuned on the revisions, which makes the SL-CAI policy."""

    init: str = by_content("model", "base")
    """The model to start from: `base` (the run's helpful model), or a model folder or id."""
    revisions: Literal["final", "all", "up_to_n"] = "final"
    """The revisions to train on: the last one of each prompt, all of them, or those of the first `up_to` rounds."""
    up_to: int = Field(default=1, ge=1)
    """Rounds whose revisions are trained on with `revisions: up_to_n`."""
    drop: tuple[Literal["critique", "loop", "copy"], ...] = ()
    """Revisions to leave out: those that are a critique, that loop, or that copy the response before them. The manifest
    counts them in any case."""
    truncated: Literal["drop", "keep"] = "drop"
    """Revisions that were cut off at `revise.max_tokens`: `drop` leaves them out, `keep` trains on them without an end
    of turn. Helpfulness samples that were cut off are always trained on in that way."""
    helpful_per_revision: float = Field(default=1.0, ge=0)
    """Most helpfulness samples per revision."""
    epochs: int = Field(default=1, gt=0)
    """Passes over the data."""
    batch_size: int = Field(default=64, gt=0)
    """Rows per optimizer step, over all workers."""


class PreferenceConfig(TrainConfig):
    """Settings of both stages that train on comparisons, `rm` and `dpo`."""

    human: tuple[Comparisons, ...] = ()
    """Human helpfulness comparisons, which are trained on together with the AI labels."""
    epochs: int = Field(default=1, gt=0)
    """Passes over the data."""
    batch_size: int = Field(default=64, gt=0)
    """Comparisons per optimizer step, over all workers."""
    eval_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Share of the prompts whose comparisons are held out to measure accuracy."""
    min_margin: float = Field(default=0.0, ge=0, lt=0.5)
    """Leave out AI labels that are closer to one half than this."""
    hard_labels: bool = False
    """A control: round AI labels to 0 or 1 and leave out ties."""
    shuffle_labels: bool = False
    """A control: flip each AI label with probability one half."""


class RmConfig(PreferenceConfig):
    """Stage `rm`: the reward model is trained on the labels (`method: ppo`)."""

    init: str = by_content("model", "sl")
    """The model to start from: `sl`, `base`, or a model folder or id."""


class DpoConfig(PreferenceConfig):
    """Stage `dpo`: the policy is trained on the labels directly (`method: dpo`). It starts from the SL-CAI policy,
    which is also its reference."""

    beta: float = Field(default=0.1, gt=0)
    """Factor of the implicit reward beta * log(p / p_ref). The smaller it is, the further the policy moves."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of all labels that is assumed to be flipped (conservative DPO)."""
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """`sigmoid`: the loss of DPO. `ipo`: the squared loss of IPO."""
