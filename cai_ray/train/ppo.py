"""Stage `ppo`: the RL-CAI policy, from the SL-CAI snapshot against the reward model (Bai et al. 2022, section 4).

Every rank holds policy and value model, trained, and reference and reward model, frozen. vLLM actors sample; rank 0
speaks with them. A step reads as the method does: sample, score, advantages, a few epochs of clipped updates, send
the weights, prove that they arrived.

Checked as it runs: the ratio is 1 at the first minibatch (old log-probabilities are recomputed by the trainer, in
the micro-batches of the update), the engine's log-probabilities are the trainer's, the engine holds the new
weights. The first send comes before the first step, so that a broken sync shows at once.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cai_ray import storage
from cai_ray.config import PpoConfig
from cai_ray.constitution import load as load_constitution
from cai_ray.errors import InputError, RowError, Stopped
from cai_ray.prompts import Renderer, load_templates
from cai_ray.records import derive_id, derive_seed, to_table
from cai_ray.storage import Run
from cai_ray.train import weight_sync
from cai_ray.train.advantages import before_tokens, next_kl_coef
from cai_ray.train.batches import pad
from cai_ray.train.experience import (
    Batch,
    Minibatch,
    Scores,
    Targets,
    draw,
    explained_variance,
    make_batch,
    make_targets,
    minibatches,
)
from cai_ray.train.fit import (
    Log,
    Trained,
    check_resources,
    fit,
    gathered_state,
    global_sums,
    rank,
    restore,
    save_checkpoint,
    save_model,
    to_device,
    world_size,
)
from cai_ray.train.losses import policy_loss, value_loss
from cai_ray.train.models import sequence_logprobs, sequence_values
from cai_ray.train.rollout import Pool, Request, Rollout, close_pool, open_pool
from cai_ray.train.scoring import Models, check_ratio, load_models, logprob_gap, probe, score

FIXED_PROBES, MOVING_PROBES = 4, 12
"""Sequences that a sync is proved on: prompts that stay, and the step's rows with the largest advantages."""


# ---------------------------------------------------------------------------------------------- the driver's side


def run(run: Run) -> dict[str, Any]:
    import ray

    config, cfg = run.config, run.config.ppo
    from cai_ray.cluster import uses_gpu

    check_resources(run, cfg)
    renderer = Renderer(run.model("sl"), load_templates(config.templates).chat_template)
    prompts, errors = read(run, renderer)
    inputs = derive_id([(p["id"], p["ids"]) for p in prompts])
    keeper = open_pool(config, run.model("sl"), renderer.end_id, uses_gpu(config))
    try:
        out = fit(run, "ppo", loop, cfg, {"keeper": keeper, "prompts": ray.put(prompts), "inputs": inputs})
    finally:
        close_pool(keeper)
    return {
        "rows_in": len(prompts) + errors,
        "rows_out": out["rollouts"],
        "errors": errors,
        "tokens": {"generated": out["tokens"]},
        "model": "sl",
        "reward_model": "rm",
        "model_sha": storage.folder_sha(run.path("ppo", "model")),
        "metrics": out["metrics"],
    }


def read(run: Run, renderer: Renderer) -> tuple[list[dict[str, Any]], int]:
    """The training prompts with their token ids, and how many do not fit the context or cannot be encoded.

    Raises:
        InputError: none is left, or a row would not fit a micro-batch.
    """
    from cai_ray.engine.vllm import model_context
    from cai_ray.generate.sources import read_prompts

    config, cfg = run.config, run.config.ppo
    templates = load_templates(config.templates)
    context = config.engine.max_model_len or model_context(run.model("sl"))
    rows = [r for r in read_prompts(cfg.prompts or config.prompts, config.seed) if r["split"] == "train"]
    ready = []
    for row in rows:
        try:
            ids = renderer.prompt_ids(templates.answer_messages(row["messages"]))
        except RowError:  # such as roles that the chat template refuses
            continue
        if len(ids) < context:
            ready.append({"id": row["id"], "messages": row["messages"], "ids": ids})
    if not ready:
        raise InputError(
            f"ppo: none of {len(rows)} training prompts can be encoded and fits the context of {context} tokens"
        )
    longest = min(context, max(len(r["ids"]) for r in ready) + cfg.max_tokens)
    if longest > cfg.micro_batch_tokens:
        raise InputError(
            f"ppo.micro_batch_tokens={cfg.micro_batch_tokens} is less than the longest row can be; "
            f"use {longest} or more"
        )
    return ready, len(rows) - len(ready)


# --------------------------------------------------------------------------------------------------- on every rank


def loop(args: dict[str, Any]) -> dict[str, Any]:
    """The method, step by step."""
    import ray

    run: Run = args["run"]
    cfg, seed = run.config.ppo, run.config.seed
    total = cfg.value_warmup_steps + cfg.steps
    models = load_models(run, cfg)
    engines = {"policy": models.policy} | ({"value": models.value} if models.value else {})
    state = restore(engines) or {"step": 0, "log": [], "tokens": 0, "kl_coef": cfg.kl_coef}
    log, tokens, kl_coef = Log(run, "ppo", total, state["log"]), state["tokens"], state["kl_coef"]
    if rank() == 0 and not state["step"]:
        storage.delete_rows(run.path("ppo"))  # what an attempt with other settings sampled
    renderer = Renderer(run.model("sl"), load_templates(run.config.templates).chat_template)
    pad_id = renderer.pad_id

    first = rank() == 0
    pool = Pool(args["keeper"], cfg.deadline_s) if first else None
    prompts: list[dict[str, Any]] = ray.get(args["prompts"]) if first else []
    fixed = from_first([p["ids"] for p in prompts[:FIXED_PROBES]])
    sync(models.policy, pool, cfg, state["step"], fixed, probe(models.policy, fixed, cfg, pad_id), None)

    for step in range(state["step"], total):
        clock = Clock()
        # Sample: token ids in, token ids out.
        rows, rollouts = from_first(sample(pool, prompts, cfg, step, seed) if pool else None)
        batch = make_batch([row["ids"] for row in rows], rollouts)
        times = {"time/sample_s": clock.lap()}

        # Score: old and reference log-probabilities, values, rewards, in the micro-batches of the first epoch.
        epochs = [
            minibatches(batch.lengths, cfg, seed, step, epoch, rank(), world_size())
            for epoch in range(cfg.epochs)
        ]
        scores = score(models, batch, epochs[0], cfg, pad_id)
        gap = logprob_gap(scores, batch, cfg)

        # Advantages, over the global batch.
        targets = make_targets(batch, scores, models.scale, cfg, kl_coef)
        probes = fixed + most_moved(batch, targets)
        before = probe(models.policy, probes, cfg, pad_id)
        times["time/score_s"] = clock.lap()

        # Update.
        rate = models.policy.lr
        sums = update(
            models, batch, targets, epochs, cfg, pad_id, train_policy=step >= cfg.value_warmup_steps
        )
        times["time/update_s"] = clock.lap()

        # Send, and prove.
        now = probe(models.policy, probes, cfg, pad_id)
        synced = sync(models.policy, pool, cfg, step + 1, probes, now, before)
        times["time/sync_s"] = clock.lap()

        tokens += int(batch.mask.sum())
        metrics = {**summary(batch, scores, targets, sums), "rollout/logprob_gap": gap, **synced, **times}
        metrics |= {
            "ppo/learning_rate": rate,
            "kl/coef": kl_coef,
            "rollout/replaced": pool.replaced if pool else 0,
        }
        metrics["tokens/per_s"] = float(batch.mask.sum()) / times["time/sample_s"]
        log.add(step + 1, metrics)
        kl_coef = next_kl_coef(
            kl_coef, metrics["kl/reference"], target=cfg.kl_target, horizon=cfg.kl_horizon, rows=len(rows)
        )
        if first:
            save_rollouts(run, step, rows, rollouts, targets, renderer)
        if (step + 1) % (cfg.checkpoint_every or 10) == 0 and step + 1 < total:
            save_checkpoint(engines, checkpoint_state(run, models, step + 1, log, tokens, kl_coef), step + 1)
    log.close()
    save_model(models.policy, run.model("sl"), run.path("ppo", "model"))
    last = {k: v for k, v in log.rows[-1].items() if k != "step"} if log.rows else {}
    return {"metrics": last, "tokens": tokens, "rollouts": total * cfg.rollout_batch}


def sample(
    pool: Pool, prompts: list[dict[str, Any]], cfg: PpoConfig, step: int, seed: int
) -> tuple[list[dict[str, Any]], list[Rollout]]:
    """The step's prompts and one rollout for each."""
    start = step * cfg.rollout_batch
    drawn = draw(len(prompts), start // cfg.group, cfg.rollout_batch // cfg.group, seed)
    rows = [prompts[i] for i in drawn for _ in range(cfg.group)]
    requests = [
        Request(row["ids"], derive_seed(seed, "rollout", row["id"], start + i)) for i, row in enumerate(rows)
    ]
    return rows, pool.sample(requests, step, cfg.temperature, cfg.max_tokens)


def update(
    models: Models,
    batch: Batch,
    targets: Targets,
    epochs: list[list[Minibatch]],
    cfg: PpoConfig,
    pad_id: int,
    train_policy: bool,
) -> dict[str, float]:
    """Policy and value steps on every minibatch; returns sums over tokens, ranks and minibatches."""
    # Values that no policy update rests on yet may move as far as they must: from a new head that is far.
    value_clip = cfg.value_clip if train_policy else None
    sums: dict[str, Any] = defaultdict(float)
    norms: dict[str, list[float]] = defaultdict(list)
    for number, minibatch in enumerate(m for epoch in epochs for m in epoch):
        global_tokens = float(batch.mask[minibatch.rows].sum())
        moved: dict[str, Any] = defaultdict(float)
        for group in minibatch.groups:
            inputs = to_device(pad([batch.rows[i] for i in group], pad_id))
            mask = inputs["loss_mask"]
            want = cut(targets, group, mask)
            if train_policy:
                new = sequence_logprobs(models.policy.engine, inputs, cfg.temperature)
                if number == 0:
                    check_ratio(new, want.logprobs, mask, cfg)
                loss, metrics = policy_loss(
                    new, want.logprobs, want.advantages, mask,
                    clip=cfg.clip, global_tokens=global_tokens, weights=want.weights,
                )  # fmt: skip
                models.policy.backward(loss * world_size())
                add(sums, metrics | {"policy_loss": loss.detach()})
                add(moved, {name: metrics[name] for name in ("approx_kl", "tokens")})
                if number == 0:
                    add(sums, {"first_ratio": metrics["ratio"], "first_tokens": metrics["tokens"]})
            if models.value:
                values = before_tokens(sequence_values(models.value.engine, inputs))
                loss, metrics = value_loss(
                    values, want.values, want.returns, mask, clip=value_clip, global_tokens=global_tokens
                )
                models.value.backward(cfg.value_coef * loss * world_size())
                add(sums, metrics | {"value_loss": loss.detach(), "value_tokens": mask.sum()})
        if train_policy:
            norms["policy"].append(models.policy.step())
        if models.value:
            norms["value"].append(models.value.step())
        if train_policy and too_far(moved, cfg):
            break
    out = global_sums(sums)
    out |= {f"{name}_norm": sum(found) / len(found) for name, found in norms.items()}
    out["minibatches"] = number + 1
    return out


def too_far(moved: dict[str, Any], cfg: PpoConfig) -> bool:
    """Whether the last minibatch, over all ranks, was farther from the old policy than an update may go."""
    if cfg.max_update_kl is None:
        return False
    sums = global_sums(moved)
    return sums["approx_kl"] > cfg.max_update_kl * sums["tokens"]


def sync(
    policy: Trained,
    pool: Pool | None,
    cfg: PpoConfig,
    version: int,
    probes: list[list[int]],
    now: list[Tensor],
    before: list[Tensor] | None,
) -> dict[str, float]:
    """Sends the weights and proves that they arrived; all ranks gather, rank 0 sends.

    Raises:
        Stopped: an engine holds something else.
    """
    sent = weight_sync.send(pool, gathered_state(policy), version, cfg.dtype)
    # A pass of its own over the weights: what `send` believes to have sent is no evidence.
    digests = weight_sync.digests_of(gathered_state(policy), cfg.dtype)
    if pool is None:
        return {}
    try:
        proof = weight_sync.prove(
            pool, digests, version, probes, now, before, weight_sync.TOLERANCE[cfg.dtype]
        )
    except weight_sync.SyncError as e:
        raise Stopped(f"weight sync failed: {e}") from e
    return {
        "sync/send_s": sent.seconds,
        "sync/prove_s": proof.seconds,
        "sync/gap": proof.gap,
        "sync/moved": proof.moved,
        "sync/shown": proof.shown,
    }


# ------------------------------------------------------------------------------------------------------- smaller ones


def most_moved(batch: Batch, targets: Targets) -> list[list[int]]:
    """The rows whose tokens have the largest advantages, up or down: the update is about to move these.

    Without their last token: a row may fill the context, and an engine takes no prompt that does.
    """
    size = targets.advantages.abs().amax(1)
    return [
        batch.rows[i].ids[:-1] for i in size.argsort(descending=True, stable=True)[:MOVING_PROBES].tolist()
    ]


def cut(targets: Targets, group: Sequence[int], mask: Tensor) -> Targets:
    """The targets of a micro-batch, as wide as it is; zeros where it is empty."""
    if not group:
        return Targets(*[torch.zeros_like(mask)] * len(Targets._fields))
    rows = list(group)
    return Targets(*[(t[rows, : mask.shape[1]] if t.ndim == 2 else t[rows]).to(mask.device) for t in targets])


def summary(batch: Batch, scores: Scores, targets: Targets, sums: dict[str, float]) -> dict[str, float]:
    """The diagnostics that a practitioner looks at."""
    tokens, rows = float(batch.mask.sum()), len(batch.rows)
    out = {
        "reward/mean": float(targets.score.mean()),
        "reward/std": float(targets.score.std()) if rows > 1 else 0.0,
        "kl/reference": float(targets.kl.mean()),
        "kl/reference_per_token": float(targets.kl.sum()) / tokens,
        "rollout/length": tokens / rows,
        "rollout/eos_rate": 1 - float(batch.truncated.float().mean()),
        "rollout/entropy": -float((scores.logprobs * batch.mask).sum()) / tokens,
        "ppo/minibatches": sums["minibatches"],
    }
    if "value_loss" in sums:
        out |= {
            "ppo/explained_variance": explained_variance(targets.values, targets.returns, batch.mask),
            "ppo/value_loss": sums["value_loss"] / sums["minibatches"],
            "ppo/value_clipfrac": sums["value_clipfrac"] / sums["value_tokens"],
            "ppo/value_grad_norm": sums["value_norm"],
        }
    if "tokens" in sums:
        out |= {f"ppo/{name}": sums[name] / sums["tokens"] for name in ("ratio", "clipfrac", "approx_kl")}
        out["ppo/ratio_first"] = sums["first_ratio"] / sums["first_tokens"]
        out["ppo/policy_loss"] = sums["policy_loss"] / sums["minibatches"]
        out["ppo/policy_grad_norm"] = sums["policy_norm"]
    return out


def save_rollouts(
    run: Run,
    step: int,
    rows: list[dict[str, Any]],
    rollouts: list[Rollout],
    targets: Targets,
    renderer: Renderer,
) -> None:
    """The step's first few rollouts, for reading."""
    kept = min(run.config.ppo.save_rollouts, len(rows))
    table = [
        {
            "step": step + 1,
            "policy_version": rollouts[i].version,
            "id": derive_id("rollout", step, i, rows[i]["id"]),
            "messages": rows[i]["messages"],
            "response": renderer.decode(rollouts[i].ids),
            "reward": float(targets.score[i]),
            "kl_reference": float(targets.kl[i]),
            "length": len(rollouts[i].ids),
            "truncated": rollouts[i].truncated,
        }
        for i in range(kept)
    ]
    if table:
        run.write_rows("ppo", to_table(table, "rollouts"), part=step + 1)


def checkpoint_state(
    run: Run, models: Models, step: int, log: Log, tokens: int, kl_coef: float
) -> dict[str, Any]:
    """What the loop goes on from. Prompts consumed and seeds follow from the step alone (`experience.draw`)."""
    return {
        "step": step,
        "log": log.rows,
        "tokens": tokens,
        "prompts_consumed": step * run.config.ppo.rollout_batch,
        "kl_coef": kl_coef,
        "reward_scale": tuple(models.scale),
        "constitution_sha": load_constitution(run.config.constitution).sha,
    }


class Clock:
    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last call."""
        last, self._last = self._last, time.perf_counter()
        return self._last - last


def add(sums: dict[str, Any], values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        sums[name] += value.detach()


def from_first(value: Any) -> Any:
    """Rank 0's value on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
