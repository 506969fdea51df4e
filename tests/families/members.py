"""Small models of many families: what `make test-families` takes through all steps of the table.

A family is its configuration class as transformers has it, with a line of what real models of it set, made small by the
same function as a user's model is for `--probe`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cai_ray.train.families.miniature import save_miniature
from tests import chat_formats, tiny

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 48,
    "long_factor": [2.0] * 48,
    "original_max_position_embeddings": 2048,
}


class Member(NamedTuple):
    """A family to try."""

    models: str
    """Well-known models of it, for the table."""
    config: str
    """The configuration class in transformers."""
    settings: Mapping[str, Any] = {}
    """What real models of the family set, where the class has another default."""
    tokenizer: str = "tiny"
    """A format of tests/chat_formats.py; or the byte-level tokenizer of tests/tiny.py."""
    otherwise: tuple[Mapping[str, Any], ...] = ()
    """Settings of `engine` to try, one after the other, where its defaults do not work."""


BF16 = {"dtype": "bfloat16"}
TEXT_ALONE = {"extra": {"language_model_only": True}}
ORIGINAL = {"max_model_len": "original_max_position_embeddings"}

MEMBERS: dict[str, Member] = {
    "LlamaForCausalLM": Member("Llama 2 and 3, SmolLM 2", "LlamaConfig", {"num_key_value_heads": 8}),
    "Qwen2ForCausalLM": Member("Qwen 2 and 2.5", "Qwen2Config", {"tie_word_embeddings": True}),
    "Qwen3ForCausalLM": Member("Qwen 3", "Qwen3Config", {"head_dim": 128, "tie_word_embeddings": True}),
    "Qwen3MoeForCausalLM": Member("Qwen 3 MoE", "Qwen3MoeConfig", {"head_dim": 128}),
    "MistralForCausalLM": Member("Mistral 7B", "MistralConfig", {"sliding_window": None}, "mistral"),
    "MixtralForCausalLM": Member("Mixtral", "MixtralConfig", {"sliding_window": None}, "mistral"),
    "Gemma2ForCausalLM": Member("Gemma 2", "Gemma2Config", {"tie_word_embeddings": True}, "gemma"),
    "Gemma3ForCausalLM": Member("Gemma 3 (1B)", "Gemma3TextConfig", {"tie_word_embeddings": True}, "gemma"),
    "Gemma3ForConditionalGeneration": Member(
        "Gemma 3 (4B and larger)", "Gemma3Config", {}, "gemma", otherwise=(TEXT_ALONE,)
    ),
    "Phi3ForCausalLM": Member("Phi-3 (4k), Phi-4", "Phi3Config", {"sliding_window": None}, "phi-3"),
    "Phi3ForCausalLM with LongRoPE": Member(
        "Phi-3 (128k), Phi-3.5, Phi-4-mini",
        "Phi3Config",
        {
            "sliding_window": None,
            "max_position_embeddings": 131072,
            "original_max_position_embeddings": 2048,
            "rope_parameters": LONGROPE,
        },
        "phi-3",
        otherwise=(ORIGINAL,),
    ),
    "GraniteForCausalLM": Member(
        "Granite 3",
        "GraniteConfig",
        {
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.0156,
            "logits_scaling": 8.0,
            "tie_word_embeddings": True,
        },
    ),
    "Olmo2ForCausalLM": Member("OLMo 2", "Olmo2Config"),
    "Olmo3ForCausalLM": Member("OLMo 3", "Olmo3Config"),
    "GPTNeoXForCausalLM": Member("Pythia, GPT-NeoX", "GPTNeoXConfig"),
    "FalconForCausalLM": Member(
        "Falcon",
        "FalconConfig",
        {"new_decoder_architecture": True, "num_kv_heads": 8, "num_attention_heads": 64, "hidden_size": 4096},
    ),
    "GptOssForCausalLM": Member("gpt-oss", "GptOssConfig", otherwise=(BF16,)),
    "DeepseekV3ForCausalLM": Member(
        "DeepSeek V3 and R1", "DeepseekV3Config", tokenizer="deepseek", otherwise=(BF16,)
    ),
}
"""By row of the table."""


def save(name: str, folder: Path) -> str:
    """Writes a family's small model; returns its folder."""
    import transformers

    member = MEMBERS[name]
    words = tiny.tokenizer() if member.tokenizer == "tiny" else chat_formats.tokenizer(member.tokenizer)
    ids = {"eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id, "bos_token_id": None}
    settings = {**member.settings, "vocab_size": len(words), **ids}
    kind = getattr(transformers, member.config)
    if member.config == "Gemma3Config":  # its numbers are those of the text alone
        vision = {"image_size": 28, "patch_size": 14, "hidden_size": 32, "intermediate_size": 64}
        tokens = {"image_token_index": 5, "boi_token_index": 3, "eoi_token_index": 4, **ids}
        vision["num_attention_heads"] = 2
        config = kind(text_config=settings, vision_config=vision, mm_tokens_per_image=4, **tokens)
    else:
        config = kind(**settings)
    config.architectures = [name.partition(" ")[0]]
    full, small = folder / "full", folder / "small"
    config.save_pretrained(full)
    words.save_pretrained(full)
    save_miniature(str(full), str(small))
    return str(small)
