"""Small random copies of models keep what positions, kernels and tokenizers depend on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from cai_ray.errors import InputError
from cai_ray.train.families.miniature import save_miniature, shrink
from tests import tiny

LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 48,
    "long_factor": [2.0] * 48,
    "original_max_position_embeddings": 1024,
}


@pytest.mark.parametrize(
    ("kind", "settings", "small"),
    [
        (
            "LlamaConfig",
            {"hidden_size": 4096,"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 9999},
            {"hidden_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 4096},
        ),
        (
            "Qwen3Config",
            {"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128},
            {"hidden_size": 256, "head_dim": 128, "num_key_value_heads": 1},
        ),
        ("GPTNeoXConfig", {}, {"num_attention_heads": 2, "hidden_size": 192}),
        ("MixtralConfig", {}, {"num_local_experts": 4, "num_experts_per_tok": 2}),
        ("DeepseekV3Config", {}, {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}),
        ("Gemma3TextConfig", {}, {"layer_types": ["sliding_attention", "full_attention"], "head_dim": 256}),
        (
            "Phi3Config",
            {
                "max_position_embeddings": 131072,
                "original_max_position_embeddings": 1024,
                "rope_parameters": LONGROPE,
            },
            {"max_position_embeddings": 2048, "hidden_size": 192},
        ),
    ],
)  # fmt: skip
def test_a_small_copy_has_two_layers_and_the_size_of_a_head(
    kind: str, settings: dict[str, Any], small: Any
) -> None:
    config = getattr(transformers, kind)(vocab_size=321, pad_token_id=0, **settings)
    before = config.to_dict()
    made = shrink(config)
    assert config.to_dict() == before, "a copy is changed"
    assert {key: getattr(made, key) for key in small} == small
    assert made.num_hidden_layers == 2 and made.vocab_size == 321
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(made)
    assert sum(p.numel() for p in model.parameters()) < 20e6


def test_a_copy_is_a_folder_with_the_same_architecture_and_tokenizer(tmp_path: Path) -> None:
    source = tiny.save_model(tmp_path / "source", "qwen2", layers=4)
    place = source / "config.json"
    quantised = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    place.write_text(json.dumps(json.loads(place.read_text()) | quantised))
    save_miniature(str(source), str(tmp_path / "small"))
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"] and config["num_hidden_layers"] == 2
    assert "quantization_config" not in config
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "small" / name).read_bytes() == (source / name).read_bytes()
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")


def test_a_model_of_which_no_copy_can_be_made_is_one_line(tmp_path: Path) -> None:
    source = tiny.save_model(tmp_path / "source")
    place = source / "config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"model_type": "nonesuch"}))
    with pytest.raises(InputError, match="no small copy of it can be made") as e:
        save_miniature(str(source), str(tmp_path / "small"))
    assert "\n" not in str(e.value)
