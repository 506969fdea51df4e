"""Training steps of a 1B-class model in bf16 on one GPU: tokens a second, model FLOP utilisation and memory.

    python benchmarks/gpu/train.py [--runs N] [--peak-tflops N] [--only NAME ...]

A random model of the shape of Llama 3.2 1B (1.24 billion parameters, a vocabulary of 128,256) on random rows whose
lengths are skewed as answers' are (log-normal, median 400 tokens, at most 2048; the last half counts). Neither Ray nor
vLLM is needed. For each of `sft`, `rm` and `ppo` (the update of policy and value model):

- `ours`: the stage's own `update`, under DeepSpeed.
- `plain`: the same loss on the same rows in plain PyTorch, as one writes it first: rows in the order in which they
  come, micro-batches of as many rows as the longest would allow, a padding mask, whole logits, autocast over fp32
  weights, fused AdamW.

and to choose by, ours with one thing changed: `torch` (norms, gates and rotations by torch, not by Liger's kernels),
`mask` (the model is told of the padding), `fine` (micro-batches of at most 5% padding, as on a CPU), `logits` (whole
logits, one product with the head less).

Utilisation is what the rows need, over the peak of the card for dense bf16: 6 x parameters x real tokens, the head only
for tokens that count (PPO's policy, SFT), and 6 x layers x hidden x length^2 for causal attention. What is computed
twice or on padding does not count. Each way is measured in a process of its own, in turns; medians. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cai_ray.stages import has_stage, stages_that

TRAINING = [name for name in stages_that("trains") if has_stage("ppo", name)]
WAYS = [
    f"{stage} {way}"
    for stage in TRAINING
    for way in ("plain", "ours", "ours, torch", "ours, mask", "ours, fine", "ours, logits")
    if (stage, way) != ("rm", "ours, logits")
]
# Dense bf16, NVIDIA's data sheets: H100 and H200 SXM 989, A100 312.
PEAKS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}
LONGEST, MEDIAN, SPREAD = 2048, 400, 0.7
BATCH, TOKENS = 96, 16384
"""Rows of a step, and tokens of a micro-batch."""
SHAPE = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
}
SMALL = SHAPE | {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2} | {
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=3, help="measurements of each way (default 3)")
    parser.add_argument("--steps", type=int, default=4, help="timed steps in each (default 4)")
    parser.add_argument("--peak-tflops", type=float, help="of the card, dense bf16 (default: by its name)")
    parser.add_argument("--only", nargs="+", default=TRAINING, help="these stages or ways alone")
    parser.add_argument("--small", action="store_true", help="a small model: to see that it runs")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure(args.way, args.model, args.steps, args.small)))
        return 0

    ways = [way for way in WAYS if {way, way.split()[0]} & set(args.only)]
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory(prefix="cai-ray-gpu-") as folder:
        save_model(folder, args.small)
        for _ in range(args.runs):
            for way in ways:
                command = [
                    sys.executable,
                    __file__,
                    "--way",
                    way,
                    "--model",
                    folder,
                    "--steps",
                    str(args.steps),
                ]
                done = subprocess.run(
                    command + ["--small"] * args.small,
                    capture_output=True,
                    text=True,
                )
                if done.returncode:  # such as out of memory: that is a result
                    print(f"{way}: {done.stderr[-1000:]}", file=sys.stderr, flush=True)
                    continue
                found[way].append(json.loads(done.stdout.splitlines()[-1]))
                print(f"{way}: {found[way][-1]}", file=sys.stderr, flush=True)
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    peak = args.peak_tflops or next((p for name, p in PEAKS.items() if name in card), None)
    table: dict[str, dict[str, Any]] = {}
    for way, measured in found.items():
        if not measured:
            table[way] = {"failed": True}
            continue
        rate = statistics.median(m["tokens_per_s"] for m in measured)
        flops = measured[0]["flops_per_token"] * rate
        table[way] = {
            "tokens_per_s": round(rate),
            "mfu": round(flops / (peak * 1e12), 3) if peak else None,
            "peak_gib": max(m["peak_gib"] for m in measured) or None,
            "loss": measured[0]["loss"],
        }
    print(f"{'':16}{'tokens/s':>10}{'MFU':>8}{'GiB':>8}")
    for way, row in table.items():
        cells = [
            f"{row.get(key)!s:>{width}}" for key, width in (("tokens_per_s", 10), ("mfu", 8), ("peak_gib", 8))
        ]
        print(f"{way:16}{''.join(cells)}")
    import transformers

    print(
        json.dumps(
            {
                "benchmark": "gpu/train",
                "card": card,
                "peak_tflops": peak,
                "ways": table,
                "rows": BATCH,
                "micro_batch_tokens": TOKENS,
                "model": SMALL if args.small else SHAPE,
                "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            }
        )
    )
    return 0


def save_model(folder: str, small: bool) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        **(SMALL if small else SHAPE), max_position_embeddings=LONGEST, tie_word_embeddings=True
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


class Data(NamedTuple):
    """Rows, and what PPO wants to learn from them, (rows, longest) each."""

    rows: list[Any]
    targets: Any

    @property
    def lengths(self) -> list[int]:
        return [len(row.ids) for row in self.rows]


def make_data(words: int) -> Data:
    from cai_ray.train.batches import Example
    from cai_ray.train.ppo.experience import Targets

    g = torch.Generator().manual_seed(1)
    drawn = (MEDIAN * torch.exp(SPREAD * torch.randn(BATCH, generator=g))).long().clamp(16, LONGEST).tolist()
    rows = []
    for n in drawn:
        ids = torch.randint(2, words, (n,), generator=g).tolist()
        rows.append(Example(ids, [0] * (n // 2) + [1] * (n - n // 2)))
    shape = BATCH, max(drawn)
    old, advantages, returns = (torch.randn(shape, generator=g) for _ in range(3))
    none = torch.zeros(BATCH)
    return Data(rows, Targets(old, old, advantages, returns, torch.ones(shape), none, none))


def measure(way: str, model: str, steps: int, small: bool) -> dict[str, Any]:
    stage, _, kind = way.partition(" ")
    data = make_data((SMALL if small else SHAPE)["vocab_size"])
    step = (plain if kind == "plain" else ours)(stage, model, data, kind.removeprefix("ours, "))
    loss = step()  # the first one allocates
    for _ in range(2):
        step()
    _wait()
    started = time.perf_counter()
    for _ in range(steps):
        step()
    _wait()
    seconds = (time.perf_counter() - started) / steps
    tokens = sum(data.lengths)
    return {
        "tokens_per_s": tokens / seconds,
        "flops_per_token": flops(stage, data, SMALL if small else SHAPE) / tokens,
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if torch.cuda.is_available() else 0,
        "loss": round(float(loss), 4),
    }


def flops(stage: str, data: Data, shape: dict[str, int]) -> float:
    """What a step needs (module docstring)."""
    d, layers, inner = shape["hidden_size"], shape["num_hidden_layers"], shape["intermediate_size"]
    kv = shape["num_key_value_heads"] * shape["head_dim"]
    backbone = layers * (2 * d * d + 2 * d * kv + 3 * d * inner)
    tokens, counted = sum(data.lengths), sum(sum(row.mask) for row in data.rows)
    body = 6 * backbone * tokens + 6 * layers * d * sum(n * n for n in data.lengths)
    head = 6 * d * shape["vocab_size"] * counted
    return body if stage == "rm" else 2 * body + head if stage == "ppo" else body + head


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# -------------------------------------------------------------------------------------------------------------- ours


def ours(stage: str, model: str, data: Data, change: str) -> Any:
    from cai_ray.config.ppo import PpoConfig
    from cai_ray.config.training import TrainConfig
    from cai_ray.train import batches, rm, sequences, sft
    from cai_ray.train.batches import rank_micro_batches
    from cai_ray.train.dialogues import pack
    from cai_ray.train.models import load_policy, load_reward_model, load_value_model
    from cai_ray.train.pairs import Pairs
    from cai_ray.train.ppo import update
    from cai_ray.train.ppo.experience import Batch, Minibatch
    from cai_ray.train.runtime.engine import distribute

    _one_rank()
    settings: dict[str, Any] = {
        "dtype": "bfloat16",
        "zero_stage": 1,
        "micro_batch_tokens": TOKENS,
        "schedule": "constant",
    }
    settings["kernels"] = "torch" if change == "torch" else "auto"
    if change == "fine":
        batches.PADDING = dict.fromkeys(batches.PADDING, 0.05)
    if change == "mask":
        usual = sequences._inputs
        sequences._inputs = lambda batch: usual(batch) | {"attention_mask": batch["attention_mask"]}

    def prepared(loaded: nn.Module) -> nn.Module:
        head = loaded.get_output_embeddings()  # type: ignore[operator]
        if change == "logits" and head is not None:
            head.__class__ = nn.Linear
        return loaded

    cfg = TrainConfig(**settings)
    if stage == "sft":
        policy, packed = distribute(prepared(load_policy(model, cfg)), cfg, 1000), pack(data.rows)
        return lambda: sft.update(policy, packed, list(range(BATCH)), cfg, 0)[0]
    if stage == "rm":
        import numpy as np

        half = BATCH // 2
        reward = distribute(prepared(load_reward_model(model, cfg)), cfg, 1000)
        pairs = Pairs(pack(data.rows), np.full(half, 0.8), np.zeros(half, bool), 0)
        return lambda: rm.update(reward, pairs, list(range(half)), cfg)[0]["ai/loss"] / half
    ppo_cfg = PpoConfig(**settings, epochs=1, rollout_batch=BATCH, minibatch=BATCH)
    policy = distribute(prepared(load_policy(model, ppo_cfg)), ppo_cfg, 1000)
    value = distribute(prepared(load_value_model(model, ppo_cfg, False)), ppo_cfg, 1000)
    update.check_ratio = lambda *_: None  # type: ignore[attr-defined]  # these log-probabilities are made up
    mask = _mask(data)
    batch = Batch(data.rows, torch.zeros(BATCH, dtype=torch.bool), mask, torch.zeros_like(mask))
    groups = rank_micro_batches(data.lengths, TOKENS, 0, 1)
    plan = [Minibatch(list(range(BATCH)), groups)]

    def step() -> float:
        update.update_policy(policy, batch, data.targets, plan, ppo_cfg, 0)
        clip = ppo_cfg.value_clip
        return update.update_value(value, batch, data.targets, plan, ppo_cfg, 0, clip)["value_loss"]

    return step


def _one_rank() -> None:
    cuda = torch.cuda.is_available()
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"} | (
        {} if cuda else {"DS_ACCELERATOR": "cpu"}
    )
    folder = tempfile.mkdtemp()
    torch.distributed.init_process_group(
        "nccl" if cuda else "gloo", init_method=f"file://{folder}/ranks", rank=0, world_size=1
    )


def _mask(data: Data) -> Tensor:
    mask = torch.zeros(BATCH, max(data.lengths))
    for i, row in enumerate(data.rows):
        mask[i, : len(row.mask)] = torch.tensor(row.mask)
    return mask


# ------------------------------------------------------------------------------------------------------------- plain


def plain(stage: str, path: str, data: Data, _: str) -> Any:
    from torch.nn.utils.rnn import pad_sequence
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models: dict[str, Any] = {}
    if stage != "rm":
        models["policy"] = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device)
    if stage != "sft":
        models["scores"] = AutoModelForSequenceClassification.from_pretrained(
            path, dtype=torch.float32, num_labels=1
        ).to(device)
    weights = [p for m in models.values() for p in m.train().parameters()]
    optimizer = torch.optim.AdamW(weights, lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    size = max(1, TOKENS // LONGEST)
    counted = float(sum(sum(row.mask) for row in data.rows))

    def scores(ids: Tensor, attention: Tensor) -> Tensor:
        hidden = models["scores"].model(input_ids=ids, attention_mask=attention, use_cache=False)[0]
        return models["scores"].score(hidden).squeeze(-1).float()  # type: ignore[no-any-return]

    def step() -> float:
        total = 0.0
        for start in range(0, BATCH, size):
            chosen = data.rows[start : start + size]
            ids = pad_sequence([torch.tensor(r.ids) for r in chosen], batch_first=True).to(device)
            attention = pad_sequence([torch.ones(len(r.ids)) for r in chosen], batch_first=True).to(device)
            mask = pad_sequence([torch.tensor(r.mask) for r in chosen], batch_first=True).to(device)
            with torch.autocast(device.type, torch.bfloat16):
                loss = torch.zeros((), device=device)
                if stage == "rm":
                    values = scores(ids, attention).gather(1, attention.long().sum(1, keepdim=True) - 1)
                    d = values[0::2, 0] - values[1::2, 0]
                    loss = -(0.8 * F.logsigmoid(d) + 0.2 * F.logsigmoid(-d)).sum() / (BATCH // 2)
                else:
                    logits = models["policy"](input_ids=ids, attention_mask=attention, use_cache=False).logits
                    logprobs = -F.cross_entropy(
                        logits[:, :-1].reshape(-1, logits.shape[-1]).float(),
                        ids[:, 1:].reshape(-1),
                        reduction="none",
                    ).view(len(chosen), -1)
                    logprobs = F.pad(logprobs, (1, 0))
                    if stage == "sft":
                        loss = -(logprobs * mask).sum() / counted
            if stage == "ppo":
                want = [t[start : start + size, : ids.shape[1]].to(device) for t in data.targets[:4]]
                ratio = (logprobs - want[0]).clamp(-20, 20).exp()
                gain = torch.minimum(ratio * want[2], ratio.clamp(0.8, 1.2) * want[2])
                (-(gain * mask).sum() / counted).backward()
                with torch.autocast(device.type, torch.bfloat16):
                    values = F.pad(scores(ids, attention)[:, :-1], (1, 0))
                cut = want[1] + (values - want[1]).clamp(-0.2, 0.2)
                error = torch.maximum((values - want[3]).square(), (cut - want[3]).square())
                loss = 0.5 * (error * mask).sum() / counted
            loss.backward()
            total += float(loss.detach())
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


if __name__ == "__main__":
    sys.exit(main())
