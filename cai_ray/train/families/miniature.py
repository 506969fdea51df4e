"""A small random model with the architecture and the tokenizer of another: what a family is tried with."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from cai_ray.errors import InputError

LAYERS = 2
CONTEXT = 4096
"""Most positions of a small model; with LongRoPE, twice the original context instead."""
EXPERTS = 4

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads")
_GROUPS = ("num_key_value_heads", "num_kv_heads")
_WIDTHS = ("hidden_size", "n_embd", "d_model")
_INNER = ("intermediate_size", "ffn_hidden_size", "n_inner", "ffn_dim", "moe_intermediate_size")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_AT_MOST = {
    "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "num_kv_shared_layers": 0, "num_nextn_predict_layers": 0, "q_lora_rank": 64,
}  # fmt: skip


def save_miniature(source: str, out: str, seed: int = 0) -> None:
    """Writes a folder with a two-layer random model of the architecture in `source`, and the tokenizer of `source`.

    Raises:
        InputError: transformers cannot make such a model.
    """
    import torch
    import transformers

    from cai_ray.train.weights.state import copy_tokenizer

    try:
        config = shrink(transformers.AutoConfig.from_pretrained(source, trust_remote_code=False))
        torch.manual_seed(seed)
        named = getattr(transformers, (config.architectures or [""])[0], None)
        model = named(config) if named else transformers.AutoModelForCausalLM.from_config(config)
    except Exception as e:  # the architecture's code may raise anything on numbers that it does not expect
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise InputError(f"model {source}: no small copy of it can be made ({reason})") from e
    model.float().save_pretrained(out)
    if Path(source).is_dir():
        copy_tokenizer(source, out)
    else:
        from cai_ray.prompts.tokenizers import load_tokenizer

        load_tokenizer(source).save_pretrained(out)


def shrink(config: Any) -> Any:
    """A copy of a configuration with two layers and few heads and experts. Vocabulary and head size stay.

    The size of a head stays because positions and kernels depend on it.
    """
    small = copy.deepcopy(config)
    if hasattr(small, "quantization_config"):
        del small.quantization_config
    _shrink_text(small.get_text_config())
    for name in ("vision_config", "audio_config"):
        for layers in _LAYERS:
            if hasattr(getattr(small, name, None), layers):
                setattr(getattr(small, name), layers, 1)
    return small


def _shrink_text(text: Any) -> None:
    heads = _first(text, _HEADS)
    groups = _first(text, _GROUPS) or heads
    width = _first(text, _WIDTHS)
    size = getattr(text, "head_dim", None) or width // heads
    # As many queries to a key as two heads allow.
    few = 2 if groups == heads else 1
    kinds = getattr(text, "layer_types", None)
    _set(text, _HEADS, 2)
    _set(text, _GROUPS, few)
    _set(text, _WIDTHS, 2 * size)
    _set(text, _INNER, 4 * size)
    _set(text, _LAYERS, LAYERS)
    _set(text, _EXPERTS, EXPERTS)
    for name, most in _AT_MOST.items():
        value = getattr(text, name, None)
        if isinstance(value, int) and not isinstance(value, bool):
            setattr(text, name, min(value, most))
    if kinds:  # one layer of each kind, if there are two
        other = [kind for kind in kinds if kind != kinds[0]]
        text.layer_types = [kinds[0], (other or kinds)[0]]
    for name in ("mlp_only_layers", "no_rope_layers", "sparse_layer_idx"):
        if isinstance(getattr(text, name, None), list):
            setattr(text, name, getattr(text, name)[: LAYERS if name == "no_rope_layers" else 0])
    context = getattr(text, "max_position_embeddings", None)
    if context:
        text.max_position_embeddings = min(context, 2 * original_context(text) or CONTEXT)


def original_context(text: Any) -> int:
    """The context that a model with LongRoPE was first trained with; 0 for other models."""
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    if "longrope" not in (rope.get("rope_type"), rope.get("type")):
        return 0
    length = rope.get("original_max_position_embeddings")
    return int(length or getattr(text, "original_max_position_embeddings", None) or 0)


def _first(text: Any, names: tuple[str, ...]) -> int:
    return next((value for name in names if (value := getattr(text, name, None))), 0)


def _set(text: Any, names: tuple[str, ...], value: int) -> None:
    for name in names:
        if isinstance(getattr(text, name, None), int):
            setattr(text, name, value)
