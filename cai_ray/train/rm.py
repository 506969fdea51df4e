"""Stage `rm`: the reward (preference) model, on AI labels (soft) and human comparisons (hard).

The loss is the soft Bradley-Terry cross-entropy, averaged over the comparisons of the global batch. Scores are read at
the last token that the policy emits. After training, the scores of a fixed reference set give the mean and standard
deviation that `reward_head.json` keeps beside the weights.
"""

from __future__ import annotations

import time
from heapq import nsmallest
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cai_ray.config.training import RmConfig, TrainConfig
from cai_ray.storage import files
from cai_ray.storage.models import folder_sha, model_sha
from cai_ray.storage.records import derive_id
from cai_ray.storage.run import Run
from cai_ray.train.comparisons import add_sums, last_evaluation, load_comparisons, means
from cai_ray.train.dialogues import shuffled
from cai_ray.train.losses import preference_metrics, soft_bradley_terry
from cai_ray.train.models import load_reward_model
from cai_ray.train.pairs import MicroBatch, Pairs, load_pairs
from cai_ray.train.runtime.checkpoints import checkpoint_due, restore, save_checkpoint
from cai_ray.train.runtime.engine import Trained, distribute
from cai_ray.train.runtime.group import fit, location
from cai_ray.train.runtime.metrics import Log
from cai_ray.train.runtime.ranks import global_sum, global_sums, rank, world_size
from cai_ray.train.sequences import score_last, sequence_values
from cai_ray.train.weights.state import save_model

REFERENCE = 256
"""Comparisons whose two responses are the reference set that rewards are centred and scaled on."""


def run(run: Run) -> dict[str, Any]:
    """Trains the reward model; returns the stage's part of the manifest.

    Raises:
        InputError: no comparison can be trained on, or one does not fit a micro-batch.
    """

    cfg, seed = run.config.rm, run.config.seed
    data = load_comparisons(run, "rm", cfg.init)
    extra = {
        **data.shared(),
        "reference": reference_set(data.ids, data.human, seed),
        "model": location(run, cfg.init),
    }
    result = fit(run, "rm", loop, cfg, extra)
    return {
        **data.counts,
        "init_sha": model_sha(run.locate(cfg.init)),
        "model_sha": folder_sha(run.path("rm", "model")),
        **result,
    }


def reference_set(ids: np.ndarray, human: np.ndarray, seed: int) -> list[int]:
    """A fixed set of comparisons (docs/method.md, item 15), chosen by id: the policy's own samples if there are any.

    Args:
        ids: (comparisons,) of bytes.
        human: (comparisons,) bool.
    """
    own = np.flatnonzero(~human).tolist() or range(len(ids))
    return nsmallest(REFERENCE, own, key=lambda i: derive_id(seed, "reference", bytes(ids[i]).decode()))


def loop(args: dict[str, Any]) -> dict[str, Any]:
    """Trains on one rank, from the last checkpoint if there is one; `args` is what `run` gives to `fit`."""

    run: Run = args["run"]
    cfg, seed = run.config.rm, run.config.seed
    data, train = load_pairs(args), args["train"]
    per_epoch = -(-len(train) // cfg.batch_size)
    total = cfg.epochs * per_epoch
    every = cfg.checkpoint_every or per_epoch

    source = run.model(args["model"])
    model = distribute(load_reward_model(source, cfg), cfg, total)
    state = restore({"reward": model}) or {"step": 0, "rows": []}
    log = Log(run, "rm", total, state["rows"])
    for step in range(state["step"], total):
        started = time.perf_counter()
        epoch, place = divmod(step, per_epoch)
        order = shuffled(len(train), seed, "rm", epoch)
        batch = [train[i] for i in order[place * cfg.batch_size : (place + 1) * cfg.batch_size]]
        learning_rate = model.lr
        sums, grad_norm = update(model, data, batch, cfg)
        metrics = {
            **means("rm", sums),
            "rm/epoch": epoch + 1,
            "rm/grad_norm": grad_norm,
            "rm/learning_rate": learning_rate,
            "tokens/per_s": data.tokens(batch) / (time.perf_counter() - started),
        }
        if (step + 1) % per_epoch == 0:
            metrics |= evaluate(model, data, args["held_out"], cfg)
        log.add(step + 1, metrics)
        if checkpoint_due(step + 1, every) or step + 1 == total:
            save_checkpoint({"reward": model}, {"step": step + 1, "rows": log.rows}, step + 1)
    log.close()
    mean, std = reward_scale(model, data, args["reference"], cfg)
    out = run.path("rm", "model")
    save_model(model, source, out)
    if rank() == 0:
        scale = {"mean": mean, "std": std, "n": 2 * len(args["reference"])}
        files.write_json(files.join(out, "reward_head.json"), scale)
    return {
        "steps": total,
        "reward_mean": mean,
        "reward_std": std,
        "metrics": last_evaluation(log.rows),
    }


def update(model: Trained, data: Pairs, batch: list[int], cfg: TrainConfig) -> tuple[dict[str, float], float]:
    """Takes one optimizer step on a global batch of comparisons; returns sums over them and the gradient's norm."""

    sums: dict[str, Tensor] = {}
    for micro_batch in data.micro_batches(batch, cfg):
        r_a, r_b, p_a, human = scores(model, data, micro_batch)
        loss = soft_bradley_terry(r_a, r_b, p_a).sum() / len(batch)
        model.backward(loss * world_size())
        add_sums(sums, preference_metrics(r_a, r_b, p_a, human))
    return global_sums(sums), model.step()


def scores(model: Trained, data: Pairs, micro_batch: MicroBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores of responses a and b, labels, and whether a person labelled, each (pairs,)."""

    return data.sides(
        micro_batch, lambda inputs: score_last(sequence_values(model, inputs), inputs["attention_mask"])
    )


@torch.no_grad()
def evaluate(model: Trained, data: Pairs, held_out: list[int], cfg: RmConfig) -> dict[str, float]:
    """Loss, accuracy and margin on held-out comparisons, separate for AI and human labels (docs/method.md, item 18)."""

    sums: dict[str, Tensor] = {}
    for micro_batch in data.micro_batches(held_out, cfg):
        add_sums(sums, preference_metrics(*scores(model, data, micro_batch)))
    return means("eval", global_sums(sums))


@torch.no_grad()
def reward_scale(model: Trained, data: Pairs, chosen: list[int], cfg: RmConfig) -> tuple[float, float]:
    """Mean and standard deviation of the scores of both responses of the chosen comparisons, over all ranks."""

    sums = torch.zeros(3, dtype=torch.float64)
    for micro_batch in data.micro_batches(chosen, cfg):
        r_a, r_b, _, _ = scores(model, data, micro_batch)
        both = torch.cat([r_a, r_b]).double().cpu()
        sums += torch.stack([torch.tensor(float(len(both))).double(), both.sum(), both.square().sum()])
    count, first, second = global_sum(sums).tolist()
    mean = first / count
    return mean, max(second / count - mean * mean, 1e-12) ** 0.5
