"""Code that a card shows: how to load the model or dataset. It works in the folder of the card."""

from __future__ import annotations

import json

from cai_ray.export.markdown import Markdown, code_block

Messages = list[dict[str, str]]


def policy(messages: Messages, max_tokens: int) -> Markdown:
    """Asks a policy, with transformers or vLLM."""
    given = json.dumps(messages, ensure_ascii=False)
    transformers = f"""\
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or its id on the Hub
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
messages = {given}
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**inputs, max_new_tokens={max_tokens}, do_sample=True)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""
    vllm = f"""\
from vllm import LLM

print(LLM(model=".").chat({given})[0].outputs[0].text)"""
    first, second = code_block(transformers, "python"), code_block(vllm, "python")
    return Markdown(f"{first}\n\nWith vLLM: `vllm serve .`, or\n\n{second}")


def reward_model(messages: Messages, end: str, scale: dict[str, float]) -> Markdown:
    """Scores an answer with a reward model."""
    example = f"""\
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

folder = "."  # this folder, or its id on the Hub
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
MEAN, STD = {scale.get("mean", 0.0)!r}, {scale.get("std", 1.0)!r}  # of reference answers (reward_head.json)


def score(messages, answer):
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    text = prompt + answer + {json.dumps(end)}  # the score is read at the token that ends an answer
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return (model.score(model.base_model(ids).last_hidden_state[0, -1]).item() - MEAN) / STD


print(score({json.dumps(messages, ensure_ascii=False)}, "…"))"""
    return code_block(example, "python")


def dataset(name: str) -> Markdown:
    """Reads one of the datasets."""
    example = f"""\
from datasets import load_dataset

rows = load_dataset(".", "{name}", split="train")  # this folder, or its id on the Hub"""
    return code_block(example, "python")
