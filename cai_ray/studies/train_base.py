"""Trains the base model from scratch on the corpus: `cai-ray town build`.

This is one epoch of plain PyTorch and takes some ten minutes on one core. The result ships with the package, so nobody
has to do this before a demo. Weights are stored in fp32 and multiplied in bf16.

A batch has rows of similar length. That saves padding, and it matters for learning: a judge row teaches one token and a
critique row seventy, so a mean over the tokens of a mixed batch would drown out the judge.
"""

from __future__ import annotations

import json
import math
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cai_ray.town import corpus, tokenizer

ROWS_PER_STEP = 48
LEARNING_RATE = 2e-3
WARMUP = 60
FINAL_SHARE = 0.05
POOL = 40
"""The number of batches that are sorted by length together. More means less padding and less mixing."""


def new_model(tok: Any) -> Any:
    """A Llama of 1.3 M parameters with tied embeddings, in fp32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tok),
        hidden_size=160,
        intermediate_size=432,
        num_hidden_layers=4,
        num_attention_heads=5,
        num_key_value_heads=5,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = tok.eos_token_id
    model.generation_config.pad_token_id = tok.pad_token_id
    return model


def batches(examples: list[corpus.EncodedRow], rng: random.Random) -> Iterator[list[corpus.EncodedRow]]:
    """Batches of similar length, in random order. Every example comes once."""
    order = list(range(len(examples)))
    rng.shuffle(order)
    size = POOL * ROWS_PER_STEP
    for start in range(0, len(order), size):
        pool = sorted(order[start : start + size], key=lambda i: len(examples[i].ids))
        groups = [pool[i : i + ROWS_PER_STEP] for i in range(0, len(pool), ROWS_PER_STEP)]
        rng.shuffle(groups)
        yield from ([examples[i] for i in group] for group in groups)


def loss_of(model: Any, batch: list[corpus.EncodedRow]) -> Any:
    """Mean cross-entropy with soft targets, over the places where something is learnt.

    Padding is on the right, where causal attention never looks, so no mask is needed.
    """
    import torch
    import torch.nn.functional as F

    length = max(len(example.ids) for example in batch)

    def padded(field: str, dtype: Any) -> Any:
        rows = [getattr(e, field) + [0] * (length - len(e.ids)) for e in batch]
        return torch.tensor(rows, dtype=dtype)

    ids_B_T = padded("ids", torch.long)
    weight_B_T, other_B_T = padded("weight", torch.float32)[:, 1:], padded("other", torch.long)[:, 1:]
    learnt = weight_B_T > 0
    hidden = model.model(input_ids=ids_B_T[:, :-1], use_cache=False).last_hidden_state[learnt]
    log_probs = F.log_softmax(model.lm_head(hidden).float(), dim=-1)
    p = weight_B_T[learnt]
    first = log_probs.gather(1, ids_B_T[:, 1:][learnt][:, None])[:, 0]
    second = log_probs.gather(1, other_B_T[learnt][:, None])[:, 0]
    return -(p * first + (1 - p) * second).mean()


def learning_rate(step: int, steps: int) -> float:
    """The learning rate of a step: a linear warm-up, then a cosine down to a twentieth."""
    if step < WARMUP:
        return LEARNING_RATE * (step + 1) / WARMUP
    cosine = 0.5 + 0.5 * math.cos(math.pi * (step - WARMUP) / max(1, steps - WARMUP))
    return LEARNING_RATE * (FINAL_SHARE + (1 - FINAL_SHARE) * cosine)


def build(out: str | Path, seed: int = 0, rows: int = corpus.ROWS, threads: int = 1) -> dict[str, Any]:
    """Trains the base model and writes its folder. Returns the provenance, which is also written there."""
    import torch

    began = time.monotonic()
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    tok = tokenizer.build()
    corpus_rows = corpus.rows(seed, rows)
    encode = corpus.Encoder(tok)
    examples = [encode(row) for row in corpus_rows]
    tokens = sum(len(e.ids) for e in examples)
    model = new_model(tok).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    steps = len(list(batches(examples, random.Random(seed))))
    recent: list[float] = []
    for step, batch in enumerate(batches(examples, random.Random(seed))):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent = [*recent[-199:], loss.item()]
        if (step + 1) % 50 == 0 or step + 1 == steps:
            mean = sum(recent) / len(recent)
            took = time.monotonic() - began
            print(f"step {step + 1}/{steps} loss {mean:.4f} {took:.0f} s", file=sys.stderr, flush=True)
    out = Path(out)
    model.eval().save_pretrained(out)
    tok.save_pretrained(out)
    provenance = {
        "command": f"cai-ray town build --out FOLDER --seed {seed}",
        "seed": seed,
        "corpus": {"rows": len(corpus_rows), "tokens": tokens, "sha": corpus.digest(corpus_rows)},
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": steps,
        "loss": round(sum(recent) / len(recent), 5),
        "seconds": round(time.monotonic() - began),
        "torch": torch.__version__,
    }
    (out / "model.safetensors").chmod(0o644)
    (out / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")
    return provenance
