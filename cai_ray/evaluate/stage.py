"""Stage `evaluate`: base, SL-CAI and RL-CAI answer held-out prompts, and are judged.

In the embedded world the exact judge says what is harmful; elsewhere the feedback model says, per principle, which of
two policies' answers it prefers, and the gold columns stay empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cai_ray import storage
from cai_ray.config import EvaluateConfig
from cai_ray.engine import Engine, Sampling
from cai_ray.errors import InputError
from cai_ray.evaluate import harness, score, sets, transcripts
from cai_ray.evaluate.stats import rate
from cai_ray.generate.label import Label
from cai_ray.generate.quality import run_templates, without_thinking
from cai_ray.generate.rows import Rows, map_rows, map_sets
from cai_ray.generate.sources import read_prompts
from cai_ray.prompts import TemplateSet, load_templates
from cai_ray.records import derive_id, derive_seed, to_table
from cai_ray.storage import Run

POLICIES = ("base", "sl", "rl")
METRICS = ("harm", "harm_by_family", "helpful", "over_refusal", "malformed", "principle_named")


@dataclass(frozen=True)
class Answer:
    """The chain of one answer by one policy. The seed depends on the prompt alone: policies draw alike."""

    templates: TemplateSet
    config: EvaluateConfig
    seed: int

    async def __call__(self, engine: Engine, row: dict[str, Any]) -> dict[str, Any]:
        completion = await engine.chat(
            self.templates.answer_messages(row["messages"]),
            Sampling(
                self.config.temperature,
                self.config.max_tokens,
                derive_seed(self.seed, row["prompt_id"], row["draw"]),
            ),
        )
        return {
            **row,
            "response": without_thinking(completion.text, self.templates.thinking),
            "truncated": not completion.finished,
            "usage": completion.usage._asdict(),
        }


def run(run: Run) -> dict[str, Any]:
    config = run.config
    prompts = read_prompts(config.evaluate.prompts, config.seed)[: config.evaluate.limit]
    if not prompts:
        raise InputError("evaluate.prompts is empty; name held-out prompts to evaluate on")
    told = transcripts.choose(run.rows("revise"))
    best_of = config.evaluate.best_of
    asked = {
        policy: [_row(policy, p, 0) for p in prompts] + [_row(policy, p, 0, "transcript") for p in told]
        for policy in POLICIES
    }
    if best_of:
        asked["sl"] += [_row(f"best_of_{best_of}", p, n) for p in prompts for n in range(best_of)]
    chain = Answer(run_templates(config), config.evaluate, config.seed)
    given_rows = {policy: Rows(given, policy) for policy, given in asked.items()}
    made = list(map_sets(run, "evaluate", given_rows, chain, schema="judgements").values())
    rows: list[dict[str, Any]] = []
    shown: list[dict[str, Any]] = []
    for row in (row for policy in POLICIES for row in run.rows("evaluate", name=policy)):
        (shown if row["model"].endswith("transcript") else rows).append(row)
    answered = [r for r in rows + shown if r["error"] is None]
    if config.method == "ppo":  # else there is no reward model, and the column stays empty
        for row, reward in zip(answered, score.rewards(run, answered), strict=True):
            row["reward"] = reward
            row["error"] = None if reward is not None else "the reward model cannot encode it"
    failed = [r for r in rows + shown if r["error"] is not None]
    rows, shown = ([r for r in kept if r["error"] is None] for kept in (rows, shown))
    for row in shown:
        row["model"] = row["model"].removesuffix(" transcript")
    rows = _best(rows, f"best_of_{best_of}")
    if config.evaluate.judge == "town":
        metrics, rows = _by_gold(run, rows)
    else:
        metrics = _by_feedback(run, rows)
    run.write_rows("evaluate", to_table(rows, "judgements"))
    for name, kept in (("transcripts", shown), ("failed", failed)):
        storage.write_table(run.path("evaluate", f"{name}-00000.parquet"), to_table(kept, "judgements"))
    for policy in POLICIES:  # all of its answers are in the three files now
        storage.delete_rows(run.path("evaluate"), policy)
    metrics["sets"], more = sets.evaluate(run, POLICIES, chain)
    metrics["harness"] = harness.evaluate(run, POLICIES)
    storage.write_json(run.path("evaluate", "metrics.json"), metrics)
    return {
        "rows_in": sum(m["rows_in"] for m in made + more),
        "rows_out": len(rows) + sum(m["rows_out"] - m["errors"] for m in more),
        "errors": len(failed) + sum(m["errors"] for m in more),
        "tokens": {k: sum(m["tokens"][k] for m in made + more) for k in made[0]["tokens"]},
        # Of all three policies: their actors are the same.
        "engine_seconds": round(sum(m[0]["engine_seconds"] for m in (made, more) if m), 2),
        "engine": made[0]["engine"],
        "models": {m["engine"]["model"]: m["engine"]["model_sha"] for m in made},
    }


def _row(policy: str, prompt: dict[str, Any], draw: int, note: str = "") -> dict[str, Any]:
    model = f"{policy} {note}".strip()
    prompt_id = prompt.get("prompt_id", prompt["id"])
    return {
        "id": derive_id("judgement", model, prompt_id, draw),
        "prompt_id": prompt_id,
        "model": model,
        "draw": str(draw),
        **{k: prompt[k] for k in ("messages", "kind", "family")},
    }


def _best(rows: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Of a best-of-n control's samples, each prompt's with the highest reward."""
    kept = [r for r in rows if r["model"] != name]
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        if (
            row["model"] == name
            and row["reward"] > best.get(row["prompt_id"], {"reward": float("-inf")})["reward"]
        ):
            best[row["prompt_id"]] = row
    return kept + list(best.values())


def _by_gold(run: Run, rows: list[dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    from cai_ray.evaluate import gold

    document = run.config.document
    rows = [gold.judged(r) for r in rows]
    harm, selective = gold.revision_harm(run.rows("revise"), run.config.revise.rounds)
    certificate = storage.read_json(run.path("label", "certificate.json"))
    scale = (certificate["gold"] or {}).get("scale")
    return {
        "models": {m: gold.measure([r for r in rows if r["model"] == m]) for m in _models(rows)},
        "snapshots": gold.snapshots(run.rows("ppo", name="snapshot") if run.config.watched else []),
        "revision_harm": harm,
        "revision_harm_selective": selective,
        "label": gold.label_quality(run.rows("label"), scale, document),
        "rm": gold.reward_accuracy([r for r in rows if r["model"] in POLICIES], document),
    }, rows


def _by_feedback(run: Run, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How often the feedback model prefers a policy's answer to the base model's, ties left out."""
    config = run.config
    base = {r["prompt_id"]: r for r in rows if r["model"] == "base"}
    pairs = [
        {
            "id": derive_id("preference", r["model"], r["prompt_id"]),
            "prompt_id": r["prompt_id"],
            "messages": r["messages"],
            "response_a": r["response"],
            "response_b": base[r["prompt_id"]]["response"],
            "model": r["model"],
            **{k: r[k] for k in ("kind", "family")},
        }
        for r in rows
        if r["model"] != "base" and r["prompt_id"] in base
    ]
    chain = Label(config.document, load_templates(config.templates), config.label, config.seed)
    model = config.label.model
    map_rows(run.feedback(), "evaluate", pairs, chain, model=model, schema="labels", name="preference")
    votes = [r for r in run.rows("evaluate", name="preference") if r["error"] is None]
    none = rate([])
    return {
        "models": {
            m: {
                **{k: {} if k == "harm_by_family" else none for k in METRICS},
                "preferred_to_base": rate(
                    [v["p_a_raw"] > 0.5 for v in votes if v["model"] == m and v["p_a_raw"] != 0.5]
                ),
            }
            for m in _models(rows)
        },
        "revision_harm": [],
        "revision_harm_selective": [],
        "label": dict.fromkeys(("accuracy", "ece", "ece_raw", "scale", "slot_bias", "slot_bias_all"))
        | {"n": 0},
        "rm": {"accuracy_gold": None, "n": 0},
    }


def _models(rows: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(r["model"] for r in rows))
