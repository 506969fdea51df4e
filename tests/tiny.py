"""Random two-layer models with a tokenizer and chat template of their own, for tests of everything but quality."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
Family = Literal["llama", "qwen2"]


def tokenizer(texts: list[str] | None = None) -> Any:
    """Byte-level BPE trained on the shipped prompts and constitution, so that these take few tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    import cai_ray

    package = Path(cai_ray.__file__).parent
    texts = texts or [
        (package / name).read_text(encoding="utf-8")
        for name in ("templates/general.yaml", "constitutions/harmless.yaml")
    ]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=4096
    )
    made.chat_template = CHATML
    return made


def save_model(
    folder: Path,
    family: Family = "llama",
    reward: bool = False,
    seed: int = 0,
    hidden: int = 64,
    layers: int = 2,
) -> Path:
    """A random causal LM, or with `reward` a random sequence classifier with its `reward_head.json`."""
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        LlamaConfig,
        Qwen2Config,
    )

    words = tokenizer()
    torch.manual_seed(seed)
    config = {"llama": LlamaConfig, "qwen2": Qwen2Config}[family](
        vocab_size=len(words),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=family == "qwen2",
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        bos_token_id=None,
        **({"num_labels": 1} if reward else {}),
    )
    auto = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    auto.from_config(config).save_pretrained(folder)
    words.save_pretrained(folder)
    if reward:
        (folder / "reward_head.json").write_text('{"mean": 0.5, "std": 2.0}')
    return folder


def with_ends(folder: Path) -> Path:
    """Makes a random model end its turn with a probability of about one in twenty at each token but the first.

    A uniform one over a thousand tokens would hit every length limit. One dimension of the embedding is the same for
    all tokens and large, so that it is nearly the same in every last hidden state; the end token's row of the head
    reads it. The line break with which the template begins an answer has the opposite sign: none is empty.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    end = model.config.eos_token_id
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = 0.3
        model.get_input_embeddings().weight[AutoTokenizer.from_pretrained(folder)("\n").input_ids, 0] = -0.3
        head = model.get_output_embeddings().weight
        tied = head is model.get_input_embeddings().weight
        others = 0.3 if tied else float(head[:, 0].mean())
        hidden = model.model(torch.arange(20, 40)[None]).last_hidden_state[0, :, 0].mean()
        head[end, 0] = others + 4.0 / float(hidden)  # e^4 in a thousand
    model.save_pretrained(folder)
    return folder
