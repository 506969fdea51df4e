"""Policy, reference, reward model and value model, as any Hugging Face causal LM folder gives them.

Reward and value model are the causal LM's backbone with a linear head. Calling one gives a number for every
token, (B, T); the reward is read at the last real token by `score_last`, whatever side the padding is on. The
classes of transformers find that token by comparing ids with the pad token, which loses an end token that is
the pad token too. Their folders are the usual ones, which transformers and vLLM load.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cai_ray.config.training import TrainConfig
from cai_ray.errors import InputError
from cai_ray.storage import files
from cai_ray.train.advantages import last_index
from cai_ray.train.losses import head_logprobs
from cai_ray.train.runtime.ranks import device

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


INPUTS = ("input_ids", "position_ids")


class RewardScale(NamedTuple):
    """Centre and scale of the raw scores on a fixed reference set; `reward_head.json` holds it."""

    mean: float
    std: float


class ScoreHead(nn.Linear):
    """A head that multiplies in fp32: differences of scores are small beside the scores."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return nn.functional.linear(input.float(), self.weight.float(), bias)


class LogprobHead(nn.Linear):
    """An output head that gives the log-probabilities of asked tokens (B, T) in place of the logits (B, T, V).

    Inside the model's own forward pass, where its weight is whole under ZeRO-3 too.
    """

    asked: tuple[Tensor, Tensor, float, Tensor] | None = None
    """Ids, mask, temperature and places (`losses.head_logprobs`), for one pass."""

    def forward(self, input: Tensor) -> Tensor:
        if self.asked is None:
            return super().forward(input)
        return head_logprobs(input, self.weight, self.bias, *self.asked)


class PerToken:
    """Makes a sequence classifier give one number per token: `forward` is (B, T) float32."""

    def forward(self, input_ids: Tensor, **inputs: Tensor) -> Tensor:
        backbone = getattr(self, self.base_model_prefix)  # type: ignore[attr-defined]
        out = backbone(input_ids=input_ids, use_cache=False, **inputs)
        return self.score(out.last_hidden_state).squeeze(-1).float()  # type: ignore[attr-defined]


def load_policy(path: str, cfg: TrainConfig, trainable: bool = True) -> nn.Module:
    """The causal LM of a folder or id, without dropout; with an adapter where `cfg.lora` and trainable.

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
    """The frozen snapshot that the KL is measured against, in the policy's compute dtype."""
    return load_policy(path, cfg, trainable=False)


def load_reward_model(path: str, cfg: TrainConfig, trainable: bool = True) -> nn.Module:
    """A model of one score per token, from a reward model's folder, or from a causal LM's with a new head."""
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
        from_reward: `path` is a reward model, whose head, in the units of the normalised reward, is the first
            value head; else `path` is a causal LM, and the values start at 0.

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
    """Mean and standard deviation that a reward model's scores are normalised with; 0 and 1 by default."""
    data = files.read_object(
        Path(path) / "reward_head.json", "train the reward model again, or copy it again"
    )
    if data is None:
        return RewardScale(0.0, 1.0)
    return RewardScale(float(data["mean"]), max(float(data["std"]), 1e-6))


def score_last(values: Tensor, attention_mask: Tensor) -> Tensor:
    """(B,): the number (B, T) at each row's last real token."""
    return values.gather(1, last_index(attention_mask)[:, None]).squeeze(1)


def sequence_values(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """(B, T) float32: the number after each token. `advantages.before_tokens` aligns values with actions."""
    return model(**_inputs(batch))


def sequence_logprobs(model: Any, batch: Mapping[str, Tensor], temperature: float = 1.0) -> Tensor:
    """(B, T) float32: of each token in `loss_mask` given those before it (`losses.token_logprobs`); 0 elsewhere.

    Args:
        model: a causal LM (`load_policy`), as it is or under DeepSpeed.
    """
    inputs = _inputs(batch)
    asked = (batch["input_ids"], batch["loss_mask"], temperature, batch["before"])
    head = base_model(getattr(model, "module", model)).get_output_embeddings()
    if not isinstance(head, LogprobHead):
        return head_logprobs(model(**inputs, use_cache=False).logits, None, None, *asked)
    head.asked = asked
    try:
        return model(**inputs, use_cache=False).logits  # type: ignore[no-any-return]
    finally:
        head.asked = None


def _inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without a padding mask: what stands at the right is never attended to, and attention is faster so.

    Padding at the left has positions that do not rise, by which transformers keeps it apart like a packed sequence. To
    look for such it waits for the GPU, and is given none for padding at the right.
    """
    return {k: batch[k] for k in INPUTS if k in batch}


def base_model(model: nn.Module) -> Any:
    """The transformers model under an adapter, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


Gather = Callable[[list[nn.Parameter]], AbstractContextManager[Any]]


def state_items(model: nn.Module, gather: Gather | None = None) -> Iterator[tuple[str, Tensor]]:
    """A model's tensors one by one, named as in a plain folder, adapters merged, a tied head included.

    Args:
        gather: makes the given parameters whole while its context lasts (ZeRO-3); all ranks iterate alike. A
            tensor is good until the next one is asked for; copy what is kept.
    """
    gather = gather or (lambda _: nullcontext())
    model = base_model(model)
    adapters = {f"{name}.": module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    for name, parameter in model.named_parameters():
        if "lora_" in name or ".original_module." in name:
            continue
        owner = next((p for p in adapters if name.startswith(p)), None)
        if owner is not None and name == f"{owner}base_layer.weight":
            layer: Any = adapters[owner]
            with gather([parameter, *(p for n, p in layer.named_parameters() if "lora_" in n)]):
                merged = parameter.detach().clone()
                if not layer.merged:
                    for adapter in layer.active_adapters:
                        merged += layer.get_delta_weight(adapter).detach().to(merged.dtype)
                yield f"{owner}weight", merged
            continue
        with gather([parameter]):
            plain = name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
            yield plain, parameter.detach()
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer
    head = model.get_output_embeddings()
    if head is not None and head.weight is model.get_input_embeddings().weight:
        name = next(n for n, module in model.named_modules() if module is head)
        with gather([head.weight]):
            yield f"{name}.weight", head.weight.detach()


def save_folder(model: nn.Module, source: str, out: str, state: Mapping[str, Tensor] | None = None) -> None:
    """Writes a Hugging Face folder: configuration, safetensors, tokenizer and chat template of `source`.

    Args:
        state: the tensors (`state_items`), where the model's own are partitioned over ranks.
        out: any URI; the folder is written beside and copied, so that half a model is never at a local `out`.
    """
    base = base_model(model)
    items = state.items() if state is not None else state_items(model)
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in items}
    if base.config.get_text_config().tie_word_embeddings:
        tensors.pop("lm_head.weight", None)  # the loader ties it to the embedding again
    with tempfile.TemporaryDirectory() as folder:
        base.save_pretrained(folder, state_dict=tensors)
        copy_tokenizer(source, folder)
        files.upload_folder(folder, out)


def copy_tokenizer(source: str, folder: str) -> None:
    """The tokenizer files of a folder as they are; of an id, as transformers loads them."""
    if Path(source).is_dir():
        for name in TOKENIZER_FILES:
            if (Path(source) / name).exists():
                shutil.copy(Path(source) / name, folder)
    else:
        from cai_ray.prompts.tokenizers import load_tokenizer

        load_tokenizer(source).save_pretrained(folder)


def scales_logits(config: Any) -> bool:
    """Whether the model does something to the logits after its head (Gemma caps them, Cohere and Granite scale)."""
    return any("logit" in name and value for name, value in config.to_dict().items())


def _load_scorer(path: str, cfg: TrainConfig) -> tuple[Any, bool]:
    """A classifier of one output that gives a number per token, and whether its head is new."""
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
            dtype=getattr(torch, cfg.dtype),
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as e:
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise InputError(
            f"model {path}: cannot be loaded ({reason}); give a folder with config.json and safetensors "
            "of a causal LM"
        ) from e
    missing = sorted(k for k in info["missing_keys"] if not k.startswith("score."))
    if missing:
        raise InputError(
            f"model {path}: {len(missing)} tensors are missing ({missing[0]}, …); the folder is not whole, "
            "save it again"
        )
    _no_dropout(model)
    return model, info


def _no_dropout(model: Any) -> None:
    """Old and new log-probabilities must differ by the update alone, so training drops nothing either."""
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
        _with_liger(model)  # frozen ones too: the reference is to be what the policy was, to the last bit
    if not trainable:
        return model.eval().requires_grad_(False)
    if cfg.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if cfg.lora is not None:
        model = _with_adapter(model, cfg)
    return model.train()


def _with_liger(model: Any) -> None:
    """Norms, gates and rotations by Liger's kernels, for the architectures it knows; the losses stay ours.

    On one H200 a third more tokens a second than torch's, and a fifth less memory (benchmarks/gpu/train.py).
    """
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(model=model, cross_entropy=False, fused_linear_cross_entropy=False)


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
                # A head is new, or learns a scale of its own: it is trained whole.
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
