"""Loads policy, reference, reward model and value model from Hugging Face folders of causal LMs."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cai_ray.compat.liger import use_liger_kernels
from cai_ray.config.training import TrainConfig
from cai_ray.errors import InputError
from cai_ray.storage import files
from cai_ray.train.heads import LogprobHead, PerToken, ScoreHead
from cai_ray.train.runtime.ranks import device


class RewardScale(NamedTuple):
    """Mean and standard deviation of the raw scores on a fixed reference set; `reward_head.json` holds them."""

    mean: float
    std: float


def load_policy(path: str, cfg: TrainConfig, trainable: bool = True) -> nn.Module:
    """The causal LM of a folder or id, without dropout; with an adapter if `cfg.lora` is set and it is trained.

    Raises:
        InputError: the folder holds no such model.
    """
    from transformers import AutoModelForCausalLM

    model, _ = _load(AutoModelForCausalLM, path, cfg)
    head = model.get_output_embeddings()
    if type(head) is nn.Linear and not scales_logits(model.config.get_text_config()):
        head.__class__ = LogprobHead
    return _prepare(model, cfg, trainable)


def load_reference(path: str, cfg: TrainConfig) -> nn.Module:
    """The frozen snapshot that the KL is measured against, in the policy's dtype."""
    return load_policy(path, cfg, trainable=False)


def load_reward_model(path: str, cfg: TrainConfig, trainable: bool = True) -> nn.Module:
    """A model of one score per token, from a reward model's folder, or from a causal LM's with a new head.

    Raises:
        InputError: the folder holds no such model.
    """
    model, new_head = _load_scorer(path, cfg)
    if new_head:
        # Huang et al. 2024 (arXiv 2403.17031): normal with standard deviation 1/sqrt(d + 1). The generator is
        # its own, so that every rank and every attempt starts from the same head.
        width = model.score.weight.shape[1]
        noise = torch.randn(model.score.weight.shape, generator=torch.Generator().manual_seed(0))
        _fill(model.score, noise / (width + 1) ** 0.5)
    return _prepare(model, cfg, trainable)


def load_value_model(path: str, cfg: TrainConfig, from_reward: bool) -> nn.Module:
    """A model of one value per token.

    Args:
        from_reward: `path` is a reward model, whose head becomes the first value head, in units of the normalised
            reward. Otherwise `path` is a causal LM, and the values start at 0.

    Raises:
        InputError: the folder holds no such model, or no head where one is needed.
    """
    model, new_head = _load_scorer(path, cfg)
    weight, offset = torch.zeros_like(model.score.weight), 0.0
    if from_reward:
        if new_head:
            raise InputError(
                f"model {path}: holds no reward head; train one first, or use value_init: policy"
            )
        scale = reward_scale(path)
        weight, offset = model.score.weight.detach() / scale.std, -scale.mean / scale.std
    head = ScoreHead(weight.shape[1], 1, dtype=weight.dtype)
    model.score = head
    _fill(head, weight, offset)
    return _prepare(model, cfg, trainable=True)


def reward_scale(path: str) -> RewardScale:
    """Mean and standard deviation that a reward model's scores are normalised with; 0 and 1 if its folder has none."""
    data = files.read_object(
        Path(path) / "reward_head.json", "train the reward model again, or copy it again"
    )
    if data is None:
        return RewardScale(0.0, 1.0)
    return RewardScale(float(data["mean"]), max(float(data["std"]), 1e-6))


def base_model(model: nn.Module) -> Any:
    """The transformers model under an adapter, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def scales_logits(config: Any) -> bool:
    """Says whether the model changes the logits after its head (Gemma caps them, Cohere and Granite scale them)."""
    return any("logit" in name and value for name, value in config.to_dict().items())


def _load_scorer(path: str, cfg: TrainConfig) -> tuple[Any, bool]:
    """A classifier that gives one number per token, and whether its head is new."""
    from transformers import AutoModelForSequenceClassification

    model, info = _load(AutoModelForSequenceClassification, path, cfg, num_labels=1)
    # The class keeps its name, which becomes `architectures` in the saved configuration.
    model.__class__ = type(type(model).__name__, (PerToken, type(model)), {"__module__": __name__})
    model.score.__class__ = ScoreHead
    return model, bool(info["missing_keys"])


def _load(auto: Any, path: str, cfg: TrainConfig, **options: Any) -> tuple[Any, dict[str, Any]]:
    from safetensors import SafetensorError

    if path.startswith((".", "/", "~")) and not Path(path).is_dir():
        raise InputError(f"model {path}: no such folder; give a Hugging Face folder or id")
    try:
        model, info = auto.from_pretrained(
            path,
            dtype=getattr(torch, cfg.precision),
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as e:
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        if reason.startswith("Unrecognized configuration class"):
            reason = f"transformers has no class of this family for {auto.__name__}"
        raise InputError(
            f"model {path}: cannot be loaded ({reason}); give a folder with config.json and safetensors "
            "of a causal LM"
        ) from e
    missing = sorted(k for k in info["missing_keys"] if not k.startswith("score."))
    if missing:
        raise InputError(
            f"model {path}: {len(missing)} tensors are missing ({missing[0]}, …); the folder is incomplete, "
            "save it again"
        )
    _no_dropout(model)
    return model, info


def _no_dropout(model: Any) -> None:
    """Turns dropout off, in training too: old and new log-probabilities must differ by the update alone."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    for name, value in list(vars(model.config).items()):
        if ("dropout" in name or name.endswith("_pdrop")) and isinstance(value, float):
            setattr(model.config, name, 0.0)


def _prepare(model: Any, cfg: TrainConfig, trainable: bool) -> nn.Module:
    model.config.use_cache = False
    if cfg.kernels == "auto" and device().type == "cuda" and find_spec("liger_kernel"):
        use_liger_kernels(
            model
        )  # frozen models too: the reference must equal the first policy to the last bit
    if not trainable:
        return model.eval().requires_grad_(False)
    if cfg.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if cfg.lora is not None:
        model = _with_adapter(model, cfg)
    return model.train()


def _with_adapter(model: Any, cfg: TrainConfig) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    assert cfg.lora is not None
    scores = hasattr(model, "score")
    try:
        return get_peft_model(
            model,
            LoraConfig(
                r=cfg.lora.rank,
                lora_alpha=cfg.lora.alpha,
                lora_dropout=0.0,
                target_modules=cfg.lora.targets,
                # A scoring head is new, or learns a scale of its own: it is trained as a whole.
                modules_to_save=["score"] if scores else None,
                exclude_modules=["score"] if scores else None,
            ),
        )
    except ValueError as e:
        raise InputError(
            f"lora.targets={cfg.lora.targets}: {str(e).splitlines()[0]}; name linear layers of the model, "
            "or all-linear"
        ) from e


@torch.no_grad()
def _fill(head: nn.Linear, weight: Tensor, bias: float = 0.0) -> None:
    head.weight.copy_(weight)
    if head.bias is not None:
        head.bias.fill_(bias)
