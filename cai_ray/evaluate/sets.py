"""Published sets (formats.py) in stage `evaluate`: what policies choose and decline, and how the reward model orders.

Every row with what came of it is in RUN/evaluate/sets-MODEL-*.parquet.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cai_ray.cluster.usage import Usage
from cai_ray.config.evaluation import EvalSet
from cai_ray.engine.protocol import Engine
from cai_ray.errors import InputError, RowError
from cai_ray.evaluate import formats, score
from cai_ray.generate.rows import Chain, Rows, map_sets
from cai_ray.judging.quality import is_refusal, run_templates
from cai_ray.judging.statistics import rate
from cai_ray.prompts.load import load_templates
from cai_ray.prompts.renderer import Renderer
from cai_ray.prompts.templates import TemplateSet
from cai_ray.storage.records import derive_id, to_table
from cai_ray.storage.run import Run
from cai_ray.storage.tables import write_table

REWARD_MODEL = "reward_model"


@dataclass(frozen=True)
class Question:
    """The chain of one row: it is answered, or its options are weighed."""

    answer: Chain
    templates: TemplateSet
    sets: Mapping[str, EvalSet]

    async def __call__(self, engine: Engine, row: dict[str, Any]) -> dict[str, Any]:
        if row["kind"] == "choices":
            scores, usage = await self._weigh(engine, row)
            return {**row, "scores": scores, "usage": usage._asdict()}
        row = await self.answer(engine, row)
        return {**row, "refused": is_refusal(row["response"], self.templates.refusals)}

    async def _weigh(self, engine: Engine, row: dict[str, Any]) -> tuple[list[float], Usage]:
        """Probability of each option, normalised over the options.

        A liking for a letter or a place cancels: every option stands at each once, and the probabilities are averaged.
        (The right answer of TruthfulQA comes first throughout.)
        """
        given, options = self.sets[row["set"]], row["options"]
        letters = given.letters[: len(options)]
        scores, usage = [0.0] * len(options), Usage()
        orders = [[(i + shift) % len(options) for i in range(len(options))] for shift in range(len(options))]
        answers = await asyncio.gather(
            *(
                engine.choose(
                    self.templates.answer_messages(_asked(given, row, [options[i] for i in order])), letters
                )
                for order in orders
            )
        )
        for order, (logprobs, used) in zip(orders, answers, strict=True):
            if not all(math.isfinite(x) for x in logprobs):
                raise RowError("the policy gave no finite log-probability for an option")
            weights = [math.exp(x - max(logprobs)) for x in logprobs]
            for i, weight in zip(order, weights, strict=True):
                scores[i] += weight / sum(weights) / len(orders)
            usage = usage + used
        return scores, usage


def _asked(given: EvalSet, row: Mapping[str, Any], options: Sequence[str]) -> list[dict[str, str]]:
    lines = (f"{letter}. {text}" for letter, text in zip(given.letters, options, strict=False))
    fields = {"question": row["messages"][-1]["content"], "choices": "\n".join(lines)}
    text = re.sub(r"\{(question|choices)\}", lambda found: fields[found[1]], given.ask)
    return [{"role": "user", "content": text}]


def check(run: Run, model_elsewhere: bool = False) -> list[dict[str, Any]]:
    """The rows of all sets, once they are known to be fit.

    Args:
        model_elsewhere: the policy is not on this machine, and its tokens are not looked at.

    Raises:
        InputError: a file or a row is at fault, the policy's tokenizer has no token for a letter, or the template set
            does not say what a refusal is.
    """
    found = []
    templates = load_templates(run.config.templates)
    renderer = None
    for given in run.config.evaluate.sets:
        rows = formats.read(given, run.config.seed)
        if given.kind == "refusals" and not templates.refusals:
            raise InputError(
                f"evaluate.sets {given.name!r}: template set {templates.name} has no refusals; add how a response that "
                "declines begins (see cai_ray/templates/general.yaml)"
            )
        if given.kind == "choices" and not model_elsewhere:
            renderer = renderer or Renderer(run.model("base"), templates.chat_template)
            most = max(len(row["options"]) for row in rows)
            renderer.option_ids(given.letters[:most], f"`letters` of evaluate.sets {given.name!r}")
        found += rows
    return found


def evaluate(run: Run, policies: Sequence[str], answer: Chain) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Asks every policy every set.

    Args:
        answer: the chain of an answer to `messages`; its seed is made of `prompt_id` and `draw`.

    Returns:
        For metrics.json, by set (`measure`); and of each policy what `map_sets` says for the manifest.
    """
    sets = {given.name: given for given in run.config.evaluate.sets}
    rows = [row for given in sets.values() for row in formats.read(given, run.config.seed)]
    asked = [row for row in rows if row["kind"] != "comparisons"]
    made, done = [], []
    if asked:
        chain = Question(answer, run_templates(run.config), sets)
        given_rows = {f"sets-{p}": Rows([_of(p, row) for row in asked], p) for p in policies}
        made = list(map_sets(run, "evaluate", given_rows, chain, schema="sets").values())
        done = [row for name in given_rows for row in run.rows("evaluate", name=name)]
    pairs = [_of(REWARD_MODEL, row) for row in rows if row["kind"] == "comparisons"]
    if pairs and run.config.method == "ppo":  # else there is no reward model
        _reward(run, pairs)
        path = run.path("evaluate", f"sets-{REWARD_MODEL}-00000.parquet")
        write_table(path, to_table(pairs, "sets"))
        done += pairs
    return measure(sets.values(), done, policies), made


def measure(
    sets: Iterable[EvalSet], rows: Sequence[Mapping[str, Any]], policies: Sequence[str]
) -> dict[str, Any]:
    """Rates by set and model, over the rows that did not fail.

    choices, comparisons: `accuracy`, how often the best of the options' scores is a right one's; options that tie for
    the best share it. Comparisons are of `reward_model`. refusals: `refused_unsafe` and `refused_safe`, of the requests
    to decline and of the others.
    """
    found = {}
    for given in sets:
        models = (REWARD_MODEL,) if given.kind == "comparisons" else policies
        of = [row for row in rows if row["set"] == given.name]
        fine = [row for row in of if row.get("error") is None]
        found[given.name] = {
            "kind": given.kind,
            "n": len({row["prompt_id"] for row in of}),
            "models": {m: _rates(given.kind, [row for row in fine if row["model"] == m]) for m in models},
        }
    return found


def _rates(kind: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if kind == "refusals":
        return {
            f"refused_{name}": rate([row["refused"] for row in rows if row["unsafe"] == unsafe])
            for name, unsafe in (("unsafe", True), ("safe", False))
        }
    return {"accuracy": rate([_right(row["scores"], row["correct"]) for row in rows])}


def _right(scores: Sequence[float], correct: Sequence[int]) -> float:
    """Share of right options among the best. Averages of the same numbers differ in their last digits."""
    best = [i for i, score in enumerate(scores) if score >= max(scores) - 1e-9]
    return sum(i in correct for i in best) / len(best)


def _of(model: str, row: dict[str, Any]) -> dict[str, Any]:
    identity = derive_id("set", row["set"], model, row["prompt_id"])
    return {"id": identity, "model": model, "draw": "0", **row}


def _reward(run: Run, pairs: list[dict[str, Any]]) -> None:
    """Gives each pair the rewards of its two answers, or an error."""
    answers = [
        {"messages": pair["messages"], "response": response, "truncated": False}
        for pair in pairs
        for response in pair["options"]
    ]
    rewards = iter(score.rewards(run, answers))
    for pair, scores in zip(pairs, zip(rewards, rewards, strict=True), strict=True):
        if None in scores:
            pair["error"] = "the reward model cannot encode it"
        else:
            pair["scores"] = list(scores)
