"""The metrics of one PPO step, and a few of its responses to read."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cai_ray.prompts.cut import decode_answer
from cai_ray.prompts.renderer import Renderer
from cai_ray.storage.arrow import to_table
from cai_ray.storage.records import RolloutRow, derive_id
from cai_ray.storage.run import Run
from cai_ray.train.ppo.experience import Batch, Scores, Targets
from cai_ray.train.ppo.rollout_engine import Rollout
from cai_ray.train.runtime.ranks import rank


def step_metrics(batch: Batch, scores: Scores, targets: Targets, sums: dict[str, float]) -> dict[str, float]:
    """The metrics of a step, by the names of metrics.jsonl (docs/training.md says how to read them).

    Args:
        sums: what `update.update_policy` and `update.update_value` return.
    """
    tokens, rows = float(batch.mask.sum()), len(batch.rows)
    out = {
        "reward/mean": float(targets.score.mean()),
        "reward/std": float(targets.score.std()) if rows > 1 else 0.0,
        "kl/reference": float(targets.kl.mean()),
        "kl/reference_per_token": float(targets.kl.sum()) / tokens,
        "rollout/length": tokens / rows,
        "rollout/eos_rate": 1 - float(batch.truncated.float().mean()),
        "rollout/entropy": -float((scores.old_logprobs * batch.mask).sum()) / tokens,
        "rollout/weight": float(targets.weights.sum()) / tokens,
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


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over the tokens of the mask: 1 is perfect, 0 is a constant's."""
    chosen = mask != 0
    error, target = (returns - values)[chosen], returns[chosen]
    return float(1 - error.var() / target.var().clamp(min=1e-8))


def save_rollouts(
    run: Run,
    step: int,
    rows: list[dict[str, Any]],
    rollouts: list[Rollout],
    renderer: Renderer,
    targets: Targets,
) -> None:
    """Writes the step's first few responses (`ppo.save_rollouts`) for reading. Rank 0 writes."""
    if rank() != 0:
        return
    count = min(run.config.ppo.save_rollouts, len(rows))
    table = [
        {
            "step": step + 1,
            "policy_version": rollouts[i].version,
            "id": derive_id("rollout", step, i, rows[i]["id"]),
            "messages": rows[i]["messages"],
            "response": decode_answer(renderer, rollouts[i].ids, rollouts[i].truncated),
            "reward": float(targets.score[i]),
            "kl_reference": float(targets.kl[i]),
            "length": len(rollouts[i].ids),
            "truncated": rollouts[i].truncated,
        }
        for i in range(count)
    ]
    if table:
        run.write_rows("ppo", to_table(table, RolloutRow), part=step + 1)
