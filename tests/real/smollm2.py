"""SmolLM2-135M-Instruct as a Hugging Face folder, from a package that carries it as GGUF.

    python -m tests.real.smollm2 [FOLDER]

The weights are those of the quantised file (Q4_1), and so not quite those of HuggingFaceTB/SmolLM2-135M-Instruct.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from tests.real import gguf
from tests.real.packages import SMOLLM2, cache, file_in

_OF_LAYER = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
_OTHERS = {"token_embd": "embed_tokens", "output_norm": "norm"}
_CONTROL = 3


def folder() -> Path:
    """The model's folder, which is made if it is not in the cache."""
    made = cache() / "SmolLM2-135M-Instruct"
    if not made.is_dir():
        unfinished = made.with_name(f"{made.name}.unfinished")
        write(gguf.read(file_in(SMOLLM2, "*.gguf")), unfinished)
        unfinished.rename(made)
    return made


def write(source: gguf.Gguf, target: Path) -> None:
    """Writes a Llama as a folder of transformers: weights in bfloat16, tokenizer, chat template."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    values = source.values
    words = tokenizer(values)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=values["llama.embedding_length"],
        intermediate_size=values["llama.feed_forward_length"],
        num_hidden_layers=values["llama.block_count"],
        num_attention_heads=values["llama.attention.head_count"],
        num_key_value_heads=values["llama.attention.head_count_kv"],
        max_position_embeddings=values["llama.context_length"],
        rms_norm_eps=values["llama.attention.layer_norm_rms_epsilon"],
        rope_theta=values["llama.rope.freq_base"],
        tie_word_embeddings="output.weight" not in source.tensors,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        dtype=torch.bfloat16,
    )
    weights = {_name(name): torch.from_numpy(_weight(source, name, config)) for name in source.tensors}
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    model.save_pretrained(target)
    words.save_pretrained(target)


def tokenizer(values: dict[str, Any]) -> Any:
    """The byte-level tokenizer of a file's head, as transformers has that of SmolLM2."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = values["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in values["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    kinds = zip(tokens, values["tokenizer.ggml.token_type"], strict=True)
    backend.add_special_tokens([AddedToken(t, normalized=False) for t, kind in kinds if kind == _CONTROL])
    named = {
        f"{name}_token": tokens[values[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=values["llama.context_length"], **named
    )
    made.chat_template = values["tokenizer.chat_template"]
    return made


def _name(name: str) -> str:
    """The name of a tensor in a checkpoint of transformers."""
    stem, _, suffix = name.rpartition(".")
    if stem == "output":
        return f"lm_head.{suffix}"
    if stem in _OTHERS:
        return f"model.{_OTHERS[stem]}.{suffix}"
    _, layer, part = stem.split(".")
    return f"model.layers.{layer}.{_OF_LAYER[part]}.{suffix}"


def _weight(source: gguf.Gguf, name: str, config: Any) -> Any:
    """A tensor as transformers has it: llama.cpp pairs the rotated halves of queries and keys otherwise."""
    weight = source.tensor(name)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    if (count := heads.get(name.split(".")[-2])) is None:
        return weight
    pairs = weight.reshape(count, -1, 2, weight.shape[-1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(weight.shape))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        write(gguf.read(file_in(SMOLLM2, "*.gguf")), Path(sys.argv[1]))
    print(sys.argv[1] if len(sys.argv) > 1 else folder())
