"""Stage `evaluate`: base, SL-CAI and RL-CAI answer held-out prompts, and are judged.

In the embedded world the exact judge says what is harmful and what helps (gold.py). Elsewhere the feedback model
compares every two policies' answers in both orders, by the constitution on red-team prompts and by helpfulness on the
others, with a certificate of its own (preferences.py); the template set's rules then tell refusals and their reasons.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cai_ray.data.left_out import LeftOut
from cai_ray.data.preflight import Preflight
from cai_ray.data.sources import read_prompts
from cai_ray.engine.check import check_engine
from cai_ray.errors import InputError
from cai_ray.evaluate import harness, policies, preferences, score, sets, transcripts
from cai_ray.evaluate.outcomes import rates
from cai_ray.evaluate.policies import AnswerChain, Answers, choose_best
from cai_ray.generate.rows import check_resources
from cai_ray.judging.quality import run_templates
from cai_ray.judging.wording import judged_by_rules, wording
from cai_ray.prompts.load import load_templates
from cai_ray.stages import POLICIES
from cai_ray.storage import files
from cai_ray.storage.arrow import to_table
from cai_ray.storage.records import Judgement, Margin, Prompt
from cai_ray.storage.run import Run
from cai_ray.storage.tables import write_table

MARGINS = 2000
"""Labelled comparisons whose rewards are computed, at most: they show what became of a principle's decisive votes."""


def run(run: Run) -> dict[str, Any]:
    config = run.config
    left_out = LeftOut(config.max_error_rate)
    prompts = read_prompts(config.evaluate.prompts, config.seed, left_out)[: config.evaluate.limit]
    if not prompts:
        raise InputError("evaluate.prompts is empty; name held-out prompts to evaluate on")
    chain = AnswerChain(run_templates(config), config.evaluate, config.seed)
    summaries = policies.ask(run, prompts, transcripts.choose(run.each_row("revise")), chain)
    answers = policies.read_answers(run)
    if config.method == "ppo":  # else there is no reward model, and the column stays empty
        _reward(run, answers)
    failed, answers = answers.failed(), _judged(run, answers.valid())
    models = list(dict.fromkeys(row["model"] for row in answers.rates))
    metrics = _metrics(run, answers, models)
    run.write_rows("evaluate", to_table(answers.rates, Judgement))
    for name, rows in (
        ("greedy", answers.greedy),
        ("transcripts", answers.transcripts),
        ("failed", failed),
    ):
        write_table(run.path("evaluate", f"{name}-00000.parquet"), to_table(rows, Judgement))
    policies.delete_answers(run)
    metrics["sets"], set_summaries = sets.evaluate(run, POLICIES, chain)
    metrics["harness"] = harness.evaluate(run, POLICIES)
    files.write_json(run.path("evaluate", "metrics.json"), metrics)
    every = summaries + set_summaries
    lengths = {f"{s['engine']['model']} answers": s["texts"]["answer"] for s in summaries if s.get("texts")}
    return {
        "rows_in": sum(s["rows_in"] for s in every),
        "rows_out": len(answers.rates) + sum(s["rows_out"] - s["errors"] for s in set_summaries),
        "errors": len(failed) + sum(s["errors"] for s in set_summaries),
        "prompts_left_out": dict(left_out),
        "tokens": {k: sum(s["tokens"][k] for s in every) for k in summaries[0]["tokens"]},
        # All policies have the same actors, and so the same seconds.
        "engine_seconds": round(sum(s[0]["engine_seconds"] for s in (summaries, set_summaries) if s), 2),
        "texts": lengths,
        "engine": summaries[0]["engine"],
        "models": {s["engine"]["model"]: s["engine"]["model_sha"] for s in summaries},
    }


def check(run: Run, preflight: Preflight) -> None:
    """Checks what is evaluated on, and who judges.

    Raises:
        InputError: a prompt or set cannot be used or is also trained on, a task of the harness is not known, the
            exact judge does not know a prompt, or an endpoint's key is missing.
    """
    config = run.config.evaluate
    if "evaluate" in preflight.stages:
        harness.check(config.harness)  # reading the library's tasks takes seconds
        if not config.prompts:
            raise InputError(
                f"evaluate.prompts is empty; name held-out prompts, or stop earlier with --until {run.config.method}"
            )
    if config.gold is None:
        key = "evaluate.judge" if config.judge else "label.judge"
        preflight.check_judge(key, run.config.evaluation_judge, "evaluate")
    check_engine(run.config.engine)
    prompts = preflight.evaluates_on_prompts("evaluate.prompts", config.prompts, config.max_tokens)
    if config.gold == "town":
        _check_requests(prompts)
    left_out = LeftOut(run.config.max_error_rate)
    rows = sets.check(run, not preflight.models_here, left_out)
    preflight.tell(left_out)
    preflight.evaluates_on(rows)


def check_room(run: Run) -> None:
    """Raises InputError if the cluster will never have room for the engines of the policies or of the judge."""
    for model in ("base", run.config.evaluation_judge):
        check_resources(run.config, run.resolve_model(model).engine)


def _check_requests(prompts: Sequence[Prompt]) -> None:
    from cai_ray.town.grammar import parse_request

    for prompt in prompts:
        text = prompt["messages"][-1]["content"]
        if parse_request(text) is None:
            raise InputError(
                f"evaluate.gold=town: {text[:80]!r} is not a request of Errand Town; leave evaluate.gold out"
            )


def _reward(run: Run, answers: Answers) -> None:
    """Gives the answers their rewards, or an error; writes the rewards of labelled comparisons."""
    rows = [r for r in answers.rates + answers.transcripts if r["error"] is None]
    dialogues = [score.Dialogue(r["messages"], str(r["response"]), bool(r["truncated"])) for r in rows]
    for row, reward in zip(rows, score.rewards(run, dialogues), strict=True):
        row["reward"] = reward
        row["error"] = None if reward is not None else score.CANNOT_ENCODE
    write_table(run.path("evaluate", "margins-00000.parquet"), to_table(_margins(run), Margin))


def _margins(run: Run) -> list[Margin]:
    """Rewards of both responses of some labelled comparisons: those of the smallest ids, which are hashes."""
    ids = sorted(
        row["id"]
        for row in run.each_row("label", ["id", "votes", "error"])
        if row["error"] is None and row["votes"]
    )[:MARGINS]
    chosen = set(ids)
    columns = ["id", "messages", "response_a", "response_b", "truncated_a", "truncated_b"]
    rows = [row for row in run.each_row("label", columns) if row["id"] in chosen]
    dialogues = [
        score.Dialogue(r["messages"], r[f"response_{side}"], bool(r[f"truncated_{side}"]))
        for side in "ab"
        for r in rows
    ]
    rewards = score.rewards(run, dialogues)
    return [
        {"id": row["id"], "reward_a": a, "reward_b": b}
        for row, a, b in zip(rows, rewards[: len(rows)], rewards[len(rows) :], strict=True)
    ]


def _judged(run: Run, answers: Answers) -> Answers:
    """The answers with the exact judge's columns, and with what the template set's rules tell."""
    config = run.config
    if n := config.evaluate.best_of:
        answers = answers._replace(rates=choose_best(answers.rates, policies.best_of_name(n)))
    if config.evaluate.gold == "town":
        from cai_ray.evaluate import gold

        answers = answers.map(gold.judged)
    templates = load_templates(config.templates)
    return answers.map(lambda row: judged_by_rules(row, templates))


def _metrics(run: Run, answers: Answers, models: Sequence[str]) -> dict[str, Any]:
    by_model = {m: [r for r in answers.rates + answers.greedy if r["model"] == m] for m in models}
    metrics: dict[str, Any] = {
        "models": {m: rates(rows) for m, rows in by_model.items()},
        "wording": {
            m: wording([str(r["response"]) for r in rows if not r["greedy"]]) for m, rows in by_model.items()
        },
    }
    if run.config.evaluate.gold == "town":
        from cai_ray.evaluate import gold

        metrics |= gold.measure(run, answers.rates, models)
    else:
        metrics |= preferences.judge(run, answers.rates, models)
    for model, preferred in metrics.pop("preferred_to_base", {}).items():
        metrics["models"][model]["preferred_to_base"] = preferred
    return metrics
