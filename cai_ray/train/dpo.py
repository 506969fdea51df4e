"""Stage `dpo`: direct preference optimisation on soft labels, instead of `rm` and `ppo`.

Rafailov et al. 2023 (arXiv 2305.18290): the reward is r = beta * (log p(y|x) - log p_ref(y|x)) of the whole response,
its end included, and the loss is the reward model's on r_a - r_b. Labels are probabilities and are trained on as
such. The reference is the SL-CAI policy, with which training starts: the policy itself computes the reference
log-probabilities before the first step, so that no second model is needed, and checkpoints hold them.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from cai_ray.config.training import DpoConfig, TrainConfig
from cai_ray.storage.models import folder_sha, model_sha
from cai_ray.storage.run import Run
from cai_ray.train.comparisons import add_sums, last_evaluation, load_comparisons, means
from cai_ray.train.dialogues import shuffled
from cai_ray.train.losses import direct_preference, masked, preference_metrics
from cai_ray.train.models import load_policy
from cai_ray.train.pairs import MicroBatch, Pairs, load_pairs
from cai_ray.train.runtime.checkpoints import checkpoint_due, restore, save_checkpoint
from cai_ray.train.runtime.engine import Trained, distribute
from cai_ray.train.runtime.group import fit
from cai_ray.train.runtime.metrics import Log
from cai_ray.train.runtime.ranks import global_sum, global_sums, world_size
from cai_ray.train.sequences import sequence_logprobs
from cai_ray.train.weights.state import save_model


def run(run: Run) -> dict[str, Any]:
    """Trains the policy; returns the stage's part of the manifest.

    Raises:
        InputError: no comparison can be trained on, or one does not fit a micro-batch.
    """

    data = load_comparisons(run, "dpo", "sl")
    result = fit(run, "dpo", loop, run.config.dpo, data.shared())
    return {
        **data.counts,
        "init_sha": model_sha(run.locate("sl")),
        "model_sha": folder_sha(run.path("dpo", "model")),
        **result,
    }


def loop(args: dict[str, Any]) -> dict[str, Any]:
    """Trains on one rank, from the last checkpoint if there is one; `args` is what `run` gives to `fit`."""

    run: Run = args["run"]
    cfg, seed = run.config.dpo, run.config.seed
    data, train = load_pairs(args), args["train"]
    per_epoch = -(-len(train) // cfg.batch_size)
    total = cfg.epochs * per_epoch
    every = cfg.checkpoint_every or per_epoch

    source = run.model("sl")
    policy = distribute(load_policy(source, cfg), cfg, total)
    state = restore({"policy": policy}) or {"step": 0, "rows": [], "ref_logprobs": None}
    ref_logprobs = state["ref_logprobs"]
    if ref_logprobs is None:
        ref_logprobs = response_logprobs(policy, data, cfg)
    log = Log(run, "dpo", total, state["rows"])
    for step in range(state["step"], total):
        started = time.perf_counter()
        epoch, place = divmod(step, per_epoch)
        order = shuffled(len(train), seed, "dpo", epoch)
        batch = [train[i] for i in order[place * cfg.batch_size : (place + 1) * cfg.batch_size]]
        learning_rate = policy.lr
        sums, grad_norm = update(policy, data, ref_logprobs, batch, cfg)
        metrics = {
            "dpo/loss": sums.pop("loss") / len(batch),
            **means("dpo", sums),
            "dpo/epoch": epoch + 1,
            "dpo/grad_norm": grad_norm,
            "dpo/learning_rate": learning_rate,
            "tokens/per_s": data.tokens(batch) / (time.perf_counter() - started),
        }
        if (step + 1) % per_epoch == 0:
            metrics |= evaluate(policy, data, ref_logprobs, args["held_out"], cfg)
        log.add(step + 1, metrics)
        if checkpoint_due(step + 1, every) or step + 1 == total:
            state = {"step": step + 1, "rows": log.rows, "ref_logprobs": ref_logprobs}
            save_checkpoint({"policy": policy}, state, step + 1)
    log.close()
    save_model(policy, source, run.path("dpo", "model"))
    return {"steps": total, "metrics": last_evaluation(log.rows)}


def update(
    policy: Trained, data: Pairs, ref_logprobs: Tensor, batch: list[int], cfg: DpoConfig
) -> tuple[dict[str, float], float]:
    """Takes one optimizer step on a global batch of comparisons; returns sums over them and the gradient's norm.

    Args:
        ref_logprobs: (comparisons, 2), from `response_logprobs` of the reference.
    """

    sums: dict[str, Tensor] = {}
    for micro_batch in data.micro_batches(batch, cfg):
        r_a, r_b, p_a, human = rewards(policy, data, ref_logprobs, micro_batch, cfg)
        loss = direct_preference(
            r_a, r_b, p_a, beta=cfg.beta, smoothing=cfg.label_smoothing, kind=cfg.loss
        ).sum()
        policy.backward(loss / len(batch) * world_size())
        add_sums(sums, {"loss": loss, **measure(r_a, r_b, p_a, human, cfg)})
    return global_sums(sums), policy.step()


def rewards(
    policy: Trained, data: Pairs, ref_logprobs: Tensor, micro_batch: MicroBatch, cfg: DpoConfig
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Implicit rewards of responses a and b, labels, and whether a person labelled, each (pairs,)."""
    a, b, p_a, human = response_sums(policy, data, micro_batch)
    ref_a, ref_b = ref_logprobs[micro_batch.pairs].to(a).unbind(1)
    return cfg.beta * (a - ref_a), cfg.beta * (b - ref_b), p_a, human


def measure(r_a: Tensor, r_b: Tensor, p_a: Tensor, human: Tensor, cfg: DpoConfig) -> dict[str, Tensor]:
    """Sums over rows, separate for AI and human labels: a reward model's, and chosen, rejected and drift.

    `loss` is the cross-entropy with the label itself, whatever loss is trained on. `drift` is log p_ref - log p of a
    response. The reference sampled the AI comparisons, so there it estimates KL(ref‖p).
    """
    r_a, r_b = r_a.detach(), r_b.detach()
    chosen, rejected = torch.where(p_a >= 0.5, r_a, r_b), torch.where(p_a >= 0.5, r_b, r_a)
    drift = -(r_a + r_b) / (2 * cfg.beta)
    out = preference_metrics(r_a, r_b, p_a, human)
    for source, rows in (("ai", ~human), ("human", human)):
        for what, values in (("chosen", chosen), ("rejected", rejected), ("drift", drift)):
            out[f"{source}/{what}"] = masked(values, rows).sum()
    return out


@torch.no_grad()
def response_logprobs(policy: Trained, data: Pairs, cfg: TrainConfig) -> Tensor:
    """(comparisons, 2) float32 on the CPU: log p of every whole response, of which each rank computes its share."""

    logprobs = torch.zeros(len(data), 2)
    for micro_batch in data.micro_batches(list(range(len(data))), cfg):
        a, b, _, _ = response_sums(policy, data, micro_batch)
        logprobs[micro_batch.pairs] = torch.stack([a, b], 1).float().cpu()
    return global_sum(logprobs)


def response_sums(
    policy: Trained, data: Pairs, micro_batch: MicroBatch
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log p of the whole responses a and b, labels, and whether a person labelled, each (pairs,)."""

    return data.sides(micro_batch, lambda inputs: sequence_logprobs(policy, inputs).sum(1))


@torch.no_grad()
def evaluate(
    policy: Trained, data: Pairs, ref_logprobs: Tensor, held_out: list[int], cfg: DpoConfig
) -> dict[str, float]:
    """The measures of `update` on held-out comparisons."""

    sums: dict[str, Tensor] = {}
    for micro_batch in data.micro_batches(held_out, cfg):
        add_sums(sums, measure(*rewards(policy, data, ref_logprobs, micro_batch, cfg), cfg))
    return means("eval", global_sums(sums))
