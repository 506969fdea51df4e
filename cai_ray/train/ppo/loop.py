"""PPO's loop, on every rank: the RL-CAI policy from the SL-CAI snapshot (Bai et al. 2022, section 4).

Every rank holds policy and value model, trained, and reference and reward models, frozen. vLLM actors sample. The
engines sample the next step while the value model is updated: with the new policy, for which the values do not matter.

Checked at every step: the ratio is 1 at the first minibatch (the trainer recomputes old log-probabilities in the
micro-batches of the update), the engine's log-probabilities are the trainer's, and the engines hold the new weights.
The first send comes before the first step, so that a broken sync shows at once.
"""

from __future__ import annotations

from typing import Any

from cai_ray.storage.run import Run
from cai_ray.train.ppo.diagnostics import save_rollouts, step_metrics
from cai_ray.train.ppo.experience import make_batch, make_targets, plan_epochs
from cai_ray.train.ppo.prompts import policy_renderer
from cai_ray.train.ppo.rollouts import Rollouts
from cai_ray.train.ppo.scoring import check_gap, load_models, score
from cai_ray.train.ppo.state import State, clear_leftovers
from cai_ray.train.ppo.update import update_policy, update_value
from cai_ray.train.ppo.watch import Watch
from cai_ray.train.runtime.metrics import Log
from cai_ray.train.runtime.timers import Timers


def loop(args: dict[str, Any]) -> dict[str, Any]:
    """Trains on one rank, from the last checkpoint if there is one; `args` is what `stage.run` gives to `fit`."""
    run: Run = args["run"]
    cfg, renderer = run.config.ppo, policy_renderer(run)
    pad_id, total = renderer.pad_id, cfg.value_warmup_steps + cfg.steps
    models = load_models(run, cfg, renderer)
    state = State.restore(models, cfg)
    log = Log(run, "ppo", total, state.log)
    if state.step == 0:
        clear_leftovers(run)
    rollouts = Rollouts(run, args, models.policy, state, total, pad_id)
    rollouts.send_and_prove(state.step)
    watch = Watch(run, args, renderer, models, rollouts, state.snapshots)
    watch.start()
    rollouts.start(state.step)

    while state.step < total and not watch.ends():
        step, train_policy = state.step, state.step >= cfg.value_warmup_steps
        timers = Timers()
        with timers("sample_s"):
            prompts, responses = rollouts.take(step)
            batch = make_batch([prompt["ids"] for prompt in prompts], responses)
        with timers("score_s"):  # in the micro-batches of the first epoch
            epochs = plan_epochs(batch.lengths, cfg, run.config.seed, step)
            conversations = [prompt["messages"] for prompt in prompts]
            scores, reward_metrics, cached_forwards = score(
                models, batch, conversations, epochs[0], cfg, pad_id, train_policy
            )
            gap = check_gap(scores, batch, responses[0].version == step, cfg)
            targets = make_targets(batch, scores, cfg, state.kl_coef)  # advantages, over the global batch
            probes = rollouts.probes(batch, targets)

        learning_rate, plan = models.policy.lr, [minibatch for epoch in epochs for minibatch in epoch]
        sums: dict[str, float] = {"minibatches": len(plan)}
        with timers("update_s"):
            if train_policy:
                sums |= update_policy(models.policy, batch, targets, plan, cfg, pad_id, cached_forwards)
        with timers("wait_s"):
            rollouts.wait_until_idle()
        with timers("sync_s"):
            synced = rollouts.send_and_prove(step + 1, probes)
        watched = watch.snapshot_if_due(step + 1, total)
        rollouts.start(step + 1)
        with timers("update_s"):
            if models.value:
                done = plan[: int(sums["minibatches"])]
                clip = cfg.value_clip if train_policy else None  # from a new head, values must move far
                sums |= update_value(models.value, batch, targets, done, cfg, pad_id, clip, cached_forwards)

        metrics = step_metrics(batch, scores, targets, sums) | reward_metrics | synced | timers.metrics()
        metrics |= gap | {"ppo/learning_rate": learning_rate, "kl/coef": state.kl_coef} | rollouts.metrics()
        metrics["tokens/per_s"] = float(batch.mask.sum()) / timers.total
        log.add(step + 1, metrics | watched)
        save_rollouts(run, step, prompts, responses, renderer, targets)
        state.finish_step(int(batch.mask.sum()), metrics["kl/reference"], cfg)
        state.save_if_due(run, models, log, rollouts, watch, last=state.step == total)

    rollouts.wait_until_idle()
    log.close()
    return {"snapshot": watch.publish(state.step), "alarms": watch.alarms(), **state.summary(cfg, log)}
