"""The short templates of tests/tokenizers.py give the texts that the published templates give.

The published ones were rendered once, for conversations whose blanks and breaks show what a template strips, moves or
adds. Where each was read: `source` is the model whose tokenizer_config.json has it, and the second column the public
repository in which it was found.
"""

from __future__ import annotations

import copy

import pytest

from tests.tokenizers import FAMILIES, LLAMA_3, Family, messages, tokenizer

TALK = messages([" one\n", "\n two ", "three "])
SYSTEM = {"role": "system", "content": "Be kind.\n"}
WITHOUT_SYSTEM = ("mistral-v1", "gemma")

PUBLISHED: dict[str, tuple[str, str, str]] = {
    # family: (where the template was read, an asked conversation, an answered one without a system turn)
    "mistral-v1": (
        "abetlen/llama-cpp-python, llama_cpp/llama_chat_format.py",
        "<s>[INST]  one\n [/INST]\n two </s>[INST] three  [/INST]",
        "<s>[INST]  one\n [/INST]\n two </s>",
    ),
    "mistral-v3": (
        "huggingface/trl, trl/chat_templates/mistral.jinja",
        "<s>[INST]  one\n[/INST] two</s>[INST] Be kind.\n\n\nthree [/INST]",
        "<s>[INST]  one\n[/INST] two</s>",
    ),
    "qwen2.5": (
        "huggingface/trl, trl/chat_templates/qwen2_5_training.jinja",
        "<|im_start|>system\nBe kind.\n<|im_end|>\n<|im_start|>user\n one\n<|im_end|>\n<|im_start|>assistant\n\n two "
        "<|im_end|>\n<|im_start|>user\nthree <|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n one\n<|im_end|>\n<|im_start|>assistant\n\n two <|im_end|>\n",
    ),
    "qwen3": (
        "huggingface/trl, trl/chat_templates/qwen3.jinja",
        "<|im_start|>system\nBe kind.\n<|im_end|>\n<|im_start|>user\n one\n<|im_end|>\n<|im_start|>assistant\n\n two "
        "<|im_end|>\n<|im_start|>user\nthree <|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\n one\n<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n two <|im_end|>\n",
    ),
    "qwen3.5": (
        "huggingface/trl, trl/chat_templates/qwen3_5_think.jinja",
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>\n"
        "<|im_start|>user\nthree<|im_end|>\n<|im_start|>assistant\n<think>\n",
        "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\ntwo<|im_end|>\n",
    ),
    "deepseek": (
        "ggml-org/llama.cpp, models/templates/deepseek-ai-DeepSeek-R1-Distill-Qwen-32B.jinja",
        "<｜begin▁of▁sentence｜>Be kind.\n<｜User｜> one\n<｜Assistant｜>\n two <｜end▁of▁sentence｜><｜User｜>three "
        "<｜Assistant｜><think>\n",
        "<｜begin▁of▁sentence｜><｜User｜> one\n<｜Assistant｜>\n two <｜end▁of▁sentence｜>",
    ),
    "gemma": (
        "what a llama.cpp server prints of a Gemma model that it loads",
        "<bos><start_of_turn>user\none<end_of_turn>\n<start_of_turn>model\ntwo<end_of_turn>\n<start_of_turn>user\n"
        "three<end_of_turn>\n<start_of_turn>model\n",
        "<bos><start_of_turn>user\none<end_of_turn>\n<start_of_turn>model\ntwo<end_of_turn>\n",
    ),
    "phi-3": (
        "microsoft/onnxruntime-extensions, shared/api/chat_template.cc",
        "<|system|>\nBe kind.\n<|end|>\n<|user|>\n one\n<|end|>\n<|assistant|>\n\n two <|end|>\n<|user|>\nthree <|end|>\n"
        "<|assistant|>\n",
        "<|user|>\n one\n<|end|>\n<|assistant|>\n\n two <|end|>\n<|endoftext|>",
    ),
    "zephyr": (
        "huggingface/alignment-handbook, src/alignment/data.py",
        "<|system|>\nBe kind.\n</s>\n<|user|>\n one\n</s>\n<|assistant|>\n\n two </s>\n<|user|>\nthree </s>\n"
        "<|assistant|>\n",
        "<|user|>\n one\n</s>\n<|assistant|>\n\n two </s>\n",
    ),
    "llama-2": (
        "microsoft/onnxruntime-extensions, shared/api/chat_template.cc",
        "<s>[INST] <<SYS>>\nBe kind.\n\n<</SYS>>\n\n one [/INST] two </s><s>[INST] three [/INST]",
        "<s>[INST] one [/INST] two </s>",
    ),
    "llama-3": (
        "microsoft/onnxruntime-extensions, shared/api/chat_template.cc",
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|><|start_header_id|>user"
        "<|end_header_id|>\n\none<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\ntwo<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nthree<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\none<|eot_id|><|start_header_id|>assistant"
        "<|end_header_id|>\n\ntwo<|eot_id|>",
    ),
}  # fmt: skip


def text(family: Family, name: str, talk: list[dict[str, str]], asked: bool) -> str:
    words = copy.copy(
        tokenizer("zephyr" if name == "llama-3" else name)
    )  # whose vocabulary plays no part here
    words.bos_token = family.bos
    return str(
        words.apply_chat_template(
            talk, chat_template=family.template, tokenize=False, add_generation_prompt=asked
        )
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_short_template_gives_the_text_of_the_published_one(name: str) -> None:
    family = LLAMA_3 if name == "llama-3" else FAMILIES[name]
    _, asked, answered = PUBLISHED[name]
    assert text(family, name, TALK if name in WITHOUT_SYSTEM else [SYSTEM, *TALK], True) == asked
    assert text(family, name, TALK[:2], False) == answered
