"""Stage `ppo`: the RL-CAI policy, from the SL-CAI snapshot against the reward model (Bai et al. 2022, section 4).

Every rank holds policy and value model, trained, and reference and reward model, frozen. vLLM actors sample; rank 0
speaks with them. A step reads as the method does: sample, score, advantages, a few epochs of clipped policy updates,
send the weights, prove that they arrived, and as many updates of the value model, in whose shadow the engines sample
the next step already: by the new policy, for which the values do not matter.

Checked as it runs: the ratio is 1 at the first minibatch (old log-probabilities are recomputed by the trainer, in
the micro-batches of the update), the engine's log-probabilities are the trainer's, the engine holds the new
weights. The first send comes before the first step, so that a broken sync shows at once.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cai_ray.config.ppo import PpoConfig
from cai_ray.constitution import load as load_constitution
from cai_ray.errors import Stopped
from cai_ray.prompts.load import load_templates
from cai_ray.prompts.renderer import Renderer
from cai_ray.storage import files
from cai_ray.storage.models import folder_sha, model_sha
from cai_ray.storage.records import derive_id
from cai_ray.storage.run import Run
from cai_ray.storage.tables import delete_rows
from cai_ray.train.advantages import before_tokens, next_kl_coef
from cai_ray.train.batches import pad
from cai_ray.train.losses import policy_loss, value_loss
from cai_ray.train.models import sequence_logprobs, sequence_values
from cai_ray.train.ppo import feedback
from cai_ray.train.ppo.diagnostics import save_rollouts, summary
from cai_ray.train.ppo.experience import Batch, Minibatch, Targets, make_batch, make_targets, minibatches
from cai_ray.train.ppo.rewards import read_by
from cai_ray.train.ppo.rollout import Pool, close_pool, open_pool
from cai_ray.train.ppo.sampling import Prompt, Sampler, read
from cai_ray.train.ppo.scoring import (
    Forward,
    Models,
    check_gap,
    check_ratio,
    difference,
    load_models,
    logprob_gap,
    probe,
    score,
)
from cai_ray.train.ppo.watch import Watch, read_watched
from cai_ray.train.runtime.fit import (
    Log,
    Trained,
    check_resources,
    checkpoint_due,
    device,
    fit,
    gathered_state,
    global_sums,
    rank,
    restore,
    save_checkpoint,
    save_model,
    to_device,
    wait_until_saved,
    world_size,
)
from cai_ray.train.runtime.ranks import from_first
from cai_ray.train.weights import sync as weight_sync
from cai_ray.train.weights.transfer import Send, make_sender

FRESH: dict[str, Any] = {"step": 0, "log": [], "tokens": 0, "ahead": None, "snapshots": []}
"""What a run without a checkpoint starts from."""
FIXED_PROBES, MOVING_PROBES = 4, 12
"""Sequences that a sync is proved on: prompts that stay, and the step's rows with the largest advantages."""


# ---------------------------------------------------------------------------------------------- the driver's side


def run(run: Run) -> dict[str, Any]:
    import ray

    config, cfg = run.config, run.config.ppo
    from cai_ray.cluster.connect import uses_gpu

    check_resources(run, cfg)
    renderer = Renderer(run.model("sl"), load_templates(config.templates).chat_template)
    readers = read_by(run, cfg, renderer)
    prompts, errors = read(run, renderer, readers)
    inputs = derive_id(
        [(p["id"], p["ids"]) for p in prompts],
        [model_sha(run.model(source.model)) for source in cfg.rewards],
    )
    extra: dict[str, Any] = {"prompts": ray.put(prompts), "inputs": inputs}
    gpu = uses_gpu(config)
    beside = feedback.needed(run, gpu)
    if cfg.watch.every:
        extra["watched"] = read_watched(run, renderer, readers)
    extra["keeper"] = keeper = open_pool(config, run.locate("sl"), renderer.end_id, gpu, beside)
    extra["feedback"] = feedback.open_feedback(run, gpu) if beside else None
    try:
        out = fit(run, "ppo", loop, cfg, extra)
    finally:
        close_pool(keeper)
        if beside:
            ray.kill(extra["feedback"])
    return {
        "rows_in": len(prompts) + errors,
        "rows_out": out["rollouts"],
        "errors": errors,
        "tokens": {"generated": out["tokens"]},
        "model": "sl",
        "reward_models": {source.model: source.weight for source in cfg.rewards},
        "model_sha": folder_sha(run.path("ppo", "model")),
        **{key: out[key] for key in ("metrics", "snapshot", "alarms")},
    }


# --------------------------------------------------------------------------------------------------- on every rank


def loop(args: dict[str, Any]) -> dict[str, Any]:
    """The method, step by step."""
    import ray

    run: Run = args["run"]
    cfg, seed = run.config.ppo, run.config.seed
    total = cfg.value_warmup_steps + cfg.steps
    renderer = Renderer(run.model("sl"), load_templates(run.config.templates).chat_template)
    models = load_models(run, cfg, renderer)
    engines = {"policy": models.policy} | ({"value": models.value} if models.value else {})
    state = restore(engines) or FRESH | {"kl_coef": cfg.kl_coef}
    log, tokens, kl_coef = Log(run, "ppo", total, state["log"]), state["tokens"], state["kl_coef"]
    if rank() == 0 and not state["step"]:  # what an attempt with other settings sampled
        for name in ("part", "snapshot"):
            delete_rows(run.path("ppo"), name)
        files.delete(run.path("ppo", "snapshots"))
    pad_id = renderer.pad_id

    first = rank() == 0
    pool = Pool(args["keeper"], cfg.deadline_s) if first else None
    prompts: list[Prompt] = ray.get(args["prompts"]) if first else []
    sampler = Sampler(pool, prompts, cfg, seed, total, state["step"], state["ahead"]) if pool else None
    fixed = from_first([p["ids"] for p in prompts[:FIXED_PROBES]])
    weights = partial(gathered_state, models.policy)
    send = make_sender(cfg.weight_sync, pool, weights, cfg.dtype, run.config.rollout_engine.span)
    sync(send, weights, pool, cfg, state["step"], fixed, probe(models.policy, fixed, cfg, pad_id), None)
    watch = None
    if cfg.watch.every:
        watched = args["watched"], renderer, models.rewards
        watch = Watch(run, *watched, pool, args["feedback"], state["snapshots"])
        if not watch.history:
            watch.look(models.policy, 0)
    if sampler:
        sampler.start(state["step"])

    for step in range(state["step"], total):
        if watch and watch.ends():
            break
        clock = Clock()
        # Sample: token ids in, token ids out.
        rows, rollouts = from_first(sampler.take(step) if sampler else None)
        batch = make_batch([row["ids"] for row in rows], rollouts)
        times = {"time/sample_s": clock.lap()}

        # Score: old and reference log-probabilities, values, rewards, in the micro-batches of the first epoch.
        epochs = [
            minibatches(batch.lengths, cfg, seed, step, epoch, rank(), world_size())
            for epoch in range(cfg.epochs)
        ]
        conversations = [row["messages"] for row in rows]
        train_policy = step >= cfg.value_warmup_steps
        scores, apart, kept = score(models, batch, conversations, epochs[0], cfg, pad_id, train_policy)
        gap, fresh = logprob_gap(scores, batch), rollouts[0].version == step
        if fresh:
            check_gap(gap, cfg)

        # Advantages, over the global batch.
        targets = make_targets(batch, scores, cfg, kl_coef)
        probes = fixed + most_moved(batch, targets)
        before = probe(models.policy, probes, cfg, pad_id)
        times["time/score_s"] = clock.lap()

        # Update the policy, send it, and prove that it arrived.
        rate, plan = models.policy.lr, [minibatch for epoch in epochs for minibatch in epoch]
        sums: dict[str, float] = {"minibatches": len(plan)}
        if train_policy:
            sums |= update_policy(models.policy, batch, targets, plan, cfg, pad_id, kept)
        times["time/update_s"] = clock.lap()
        if sampler:
            sampler.wait()
        times["time/wait_s"] = clock.lap()
        now = probe(models.policy, probes, cfg, pad_id)
        synced = sync(send, weights, pool, cfg, step + 1, probes, now, before)
        times["time/sync_s"] = clock.lap()
        looked = watch.look(models.policy, step + 1) if watch and watch.due(step + 1, total) else {}
        if sampler:
            sampler.start(step + 1)

        # Update the value model. Values that no policy update rests on yet may move as far as they must: from a new
        # head that is far.
        clock.lap()
        if models.value:
            value_clip, done = cfg.value_clip if train_policy else None, plan[: int(sums["minibatches"])]
            sums |= update_value(models.value, batch, targets, done, cfg, pad_id, value_clip, kept)
        times["time/update_s"] += clock.lap()

        tokens += int(batch.mask.sum())
        metrics = {**summary(batch, scores, targets, sums), **apart, **synced, **times}
        metrics |= {
            "rollout/logprob_gap" if fresh else "rollout/stale_gap": gap,
            "ppo/learning_rate": rate,
            "kl/coef": kl_coef,
            "rollout/replaced": pool.replaced if pool else 0,
        }
        metrics["time/rollout_s"] = sampler.seconds if sampler else 0.0
        metrics["tokens/per_s"] = float(batch.mask.sum()) / sum(times.values())
        log.add(step + 1, metrics | looked)
        kl_coef = next_kl_coef(
            kl_coef, metrics["kl/reference"], target=cfg.kl_target, horizon=cfg.kl_horizon, rows=len(rows)
        )
        if first:
            save_rollouts(run, step, rows, rollouts, renderer, targets)
        # An alarm may end the stage, and the same command goes on from here.
        alarmed = bool(watch and looked and watch.alarms())
        due = checkpoint_due(step + 1, cfg.checkpoint_every or 10)
        if alarmed or (due and step + 1 < total):
            progress = checkpoint_state(run, models, sampler, watch, step + 1, log, tokens, kl_coef)
            save_checkpoint(engines, progress, step + 1)
            if watch:
                watch.saved()
            if alarmed:
                wait_until_saved()
                log.write()
    if sampler:
        sampler.wait()
    log.close()
    if watch:
        watch.ends()
        best = watch.publish()
    else:
        save_model(models.policy, run.model("sl"), run.path("ppo", "model"))
    last = {k: v for k, v in log.rows[-1].items() if k != "step"} if log.rows else {}
    return {
        "metrics": last,
        "tokens": tokens,
        "rollouts": len(log.rows) * cfg.rollout_batch,
        "snapshot": best if watch else len(log.rows),
        "alarms": watch.alarms() if watch else [],
    }


def update_policy(
    policy: Trained,
    batch: Batch,
    targets: Targets,
    plan: Sequence[Minibatch],
    cfg: PpoConfig,
    pad_id: int,
    kept: Sequence[Forward] = (),
) -> dict[str, float]:
    """A step on every minibatch, or until one goes too far; returns sums over tokens, ranks and minibatches.

    Args:
        kept: passes over the first micro-batches by the models as they are (`scoring.score`).
    """
    sums: dict[str, Any] = defaultdict(float)
    norms = []
    worst = torch.zeros((), device=device())
    known = iter(kept)
    for number, minibatch in enumerate(plan):
        global_tokens = float(batch.mask[minibatch.rows].sum())
        moved: dict[str, Any] = defaultdict(float)
        for group in minibatch.groups:
            inputs = to_device(pad([batch.rows[i] for i in group], pad_id))
            mask = inputs["loss_mask"]
            want = cut(targets, group, mask)
            scored = next(known, None)
            new = scored.logprobs if scored else sequence_logprobs(policy.engine, inputs, cfg.temperature)
            if number == 0:
                worst = torch.maximum(worst, difference(new, want.logprobs, mask))
            loss, metrics = policy_loss(
                new, want.logprobs, want.advantages, mask,
                clip=cfg.clip, global_tokens=global_tokens, weights=want.weights,
            )  # fmt: skip
            policy.backward(loss * world_size())
            add(sums, metrics | {"policy_loss": loss.detach()})
            add(moved, {name: metrics[name] for name in ("approx_kl", "tokens")})
            if number == 0:
                add(sums, {"first_ratio": metrics["ratio"], "first_tokens": metrics["tokens"]})
        if number == 0:
            check_ratio(float(worst), cfg)
        norms.append(policy.step())
        if too_far(moved, cfg):
            break
    return global_sums(sums) | {"policy_norm": sum(norms) / len(norms), "minibatches": number + 1}


def update_value(
    value: Trained,
    batch: Batch,
    targets: Targets,
    plan: Sequence[Minibatch],
    cfg: PpoConfig,
    pad_id: int,
    clip: float | None,
    kept: Sequence[Forward] = (),
) -> dict[str, float]:
    """A step of the value model on every minibatch; returns as `update_policy` does."""
    sums: dict[str, Any] = defaultdict(float)
    norms = []
    known = iter(kept)
    for minibatch in plan:
        global_tokens = float(batch.mask[minibatch.rows].sum())
        for group in minibatch.groups:
            inputs = to_device(pad([batch.rows[i] for i in group], pad_id))
            mask = inputs["loss_mask"]
            want = cut(targets, group, mask)
            scored = next(known, None)
            after = scored.after if scored else sequence_values(value.engine, inputs)
            loss, metrics = value_loss(
                before_tokens(after), want.values, want.returns, mask, clip=clip, global_tokens=global_tokens
            )
            value.backward(cfg.value_coef * loss * world_size())
            add(sums, metrics | {"value_loss": loss.detach(), "value_tokens": mask.sum()})
        norms.append(value.step())
    return global_sums(sums) | {"value_norm": sum(norms) / len(norms)}


def too_far(moved: dict[str, Any], cfg: PpoConfig) -> bool:
    """Whether the last minibatch, over all ranks, was farther from the old policy than an update may go."""
    if cfg.max_update_kl is None:
        return False
    sums = global_sums(moved)
    return sums["approx_kl"] > cfg.max_update_kl * sums["tokens"]


def sync(
    send: Send,
    weights: Callable[[], Iterator[tuple[str, Tensor]]],
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
    sent = send(version)
    # A pass of its own over the weights: what `send` believes to have sent is no evidence.
    digests = weight_sync.digests_of(weights(), cfg.dtype)
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
    return Targets(
        *[
            (t[rows, : mask.shape[1]] if t.ndim == 2 else t[rows]).to(mask.device, non_blocking=True)
            for t in targets
        ]
    )


def checkpoint_state(
    run: Run,
    models: Models,
    sampler: Sampler | None,
    watch: Watch | None,
    step: int,
    log: Log,
    tokens: int,
    kl_coef: float,
) -> dict[str, Any]:
    """What the loop goes on from. Prompts consumed and seeds follow from the step alone (`experience.draw`)."""
    return {
        "step": step,
        "log": log.rows,
        "tokens": tokens,
        "prompts_consumed": step * run.config.ppo.rollout_batch,
        "kl_coef": kl_coef,
        "ahead": sampler.ahead(step) if sampler else None,
        "snapshots": watch.history if watch else [],
        "reward_scales": [tuple(reward.scale) for reward in models.rewards],
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
