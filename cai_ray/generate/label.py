"""Stage `label`: the feedback model's soft preference between two responses, principle by principle.

Bai et al. 2022 (arXiv 2212.08073), section 4.1: the model reads the conversation, one principle and the options; its
label is the probability of the two option tokens, normalised over the two. Each principle is asked in both orders and
the two are averaged, so that a liking for a slot cancels (docs/method.md, items 1 to 6). `label.mode: cot` lets the
model reason before the options are weighed; `score` has each response rated by itself (Lee et al. 2023, arXiv
2309.00267) and compares the two expected scores.

A principle by which the model says nothing that can be read abstains: its vote has no `p_a`, and says why. The label is
then that of the others; where all abstain, the row is an error.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from cai_ray.cluster.connect import uses_gpu
from cai_ray.cluster.usage import Usage
from cai_ray.config.generation import LabelConfig
from cai_ray.constitution import Constitution, Principle
from cai_ray.data.formats import clean
from cai_ray.data.preflight import Preflight
from cai_ray.data.sources import iter_rows, to_messages
from cai_ray.engine.api_key import read_key
from cai_ray.engine.check import check_engine
from cai_ray.engine.options import check_options
from cai_ray.engine.protocol import Engine, Sampling
from cai_ray.errors import Abstained, InputError, RowError
from cai_ray.generate import reuse
from cai_ray.generate.draw import draw
from cai_ray.generate.rows import Rows, check_resources, map_sets
from cai_ray.judging import certificate
from cai_ray.judging.votes import combine, expected_score, preference, slot_bias
from cai_ray.prompts.check import check_mode
from cai_ray.prompts.load import load_templates
from cai_ray.prompts.messages import Message
from cai_ray.prompts.templates import TemplateSet
from cai_ray.storage import files
from cai_ray.storage.records import derive_id, derive_seed
from cai_ray.storage.run import Run
from cai_ray.storage.tables import read_tables


@dataclass(frozen=True)
class Label:
    """The chain of one comparison: a vote of each principle, and the label they make together."""

    constitution: Constitution
    templates: TemplateSet
    config: LabelConfig
    seed: int
    context: str = ""
    """What all votes depend on (`reuse.context`)."""

    async def __call__(self, engine: Engine, row: dict[str, Any]) -> dict[str, Any]:
        out = {**row, "feedback_model": self.config.model, "constitution_sha": self.constitution.sha}
        if row["response_a"] == row["response_b"]:  # nothing to prefer, and nothing to ask
            return {
                **out,
                "votes": [],
                "p_a": 0.5,
                "p_a_raw": 0.5,
                "slot_bias": None,
                "usage": Usage()._asdict(),
            }
        principles, known = self.voters(row), reuse.known(row, "votes")
        answers = await asyncio.gather(*(self._vote(engine, row, p, known) for p in principles))
        votes = [vote for vote, _ in answers]
        usage = sum((u for _, u in answers), Usage())
        given = [(v["p_a"], p.weight) for v, p in zip(votes, principles, strict=True) if v["p_a"] is not None]
        if not given:
            raise RowError(votes[0]["abstained"])
        raw = combine([p for p, _ in given], [w for _, w in given], self.config.combine)
        low, high = self.config.clamp or (0.0, 1.0)
        return {
            **out,
            "votes": votes,
            "p_a": min(max(raw, low), high),
            "p_a_raw": raw,
            "slot_bias": slot_bias(votes),
            "usage": usage._asdict(),
        }

    def voters(self, row: Mapping[str, Any]) -> list[Principle]:
        """The principles that vote on a comparison."""
        if self.config.principles == "all":
            return self.constitution.enabled
        drawn = draw(
            self.constitution.enabled,
            self.config.principles,
            seed=self.seed,
            row_id=row["id"],
            replacement=False,
        )
        return [p for p in drawn if p is not None]

    def key(self, row: Mapping[str, Any], principle: Principle) -> str:
        """Of everything that a vote depends on: one with the same key need not be asked for again."""
        question = principle.text if self.config.mode == "score" else principle.comparison
        responses = (row["response_a"], row["response_b"])
        return derive_id(self.context, row["messages"], *responses, principle.id, principle.form, question)

    async def _vote(
        self, engine: Engine, row: dict[str, Any], principle: Principle, known: Mapping[str, dict[str, Any]]
    ) -> tuple[dict[str, Any], Usage]:
        key = self.key(row, principle)
        if key in known:
            return known[key], Usage()
        ask = self._rate if self.config.mode == "score" else self._compare
        try:
            vote, usage = await ask(engine, row, principle)
        except Abstained as e:
            return {"principle_id": principle.id, "p_a": None, "abstained": str(e), "key": key}, Usage()
        if (
            principle.form == "negative"
        ):  # it was asked for the worse response; log-probabilities stay as given
            vote["p_a"] = 1 - vote["p_a"]
        return {**vote, "key": key}, usage

    async def _compare(
        self, engine: Engine, row: dict[str, Any], principle: Principle
    ) -> tuple[dict[str, Any], Usage]:
        a, b = row["response_a"], row["response_b"]
        straight, reasoning, usage = await self._ask(engine, row, principle, a, b)
        vote = {"principle_id": principle.id, "logprob_a": straight[0], "logprob_b": straight[1]}
        vote |= {"reasoning": reasoning}
        probabilities = [preference(*straight)]
        if self.config.both_orders:
            swapped, reasoning, more = await self._ask(engine, row, principle, b, a)
            usage = usage + more
            # Response a stood in the second slot: its log-probability is the second option's.
            vote |= {"logprob_a_swapped": swapped[1], "logprob_b_swapped": swapped[0]}
            vote |= {"reasoning_swapped": reasoning}
            probabilities.append(preference(swapped[1], swapped[0]))
        return {**vote, "p_a": sum(probabilities) / len(probabilities)}, usage

    async def _ask(
        self, engine: Engine, row: dict[str, Any], principle: Principle, first: str, second: str
    ) -> tuple[list[float], str | None, Usage]:
        """Log-probabilities of the two options, and the reasoning before them where there is one."""
        turns, templates, config = row["messages"], self.templates, self.config
        if config.mode == "logprob":
            messages = templates.feedback_messages(turns, first, second, principle)
            logprobs, usage = await self._weigh(engine, messages, templates.options, principle)
            return logprobs, None, usage
        # The texts are in the seed, and not their slots: swapped responses meet the same reasoning, swapped.
        seed = derive_seed(self.seed, row["id"], "reasoning", principle.id, first, second)
        thought = await engine.chat(
            templates.reasoning_messages(turns, first, second, principle),
            Sampling(config.reasoning_temperature, config.reasoning_max_tokens, seed),
        )
        if not thought.text.strip():
            raise Abstained(f"the feedback model's reasoning is empty for principle {principle.id}")
        messages = templates.verdict_messages(turns, first, second, principle, thought.text)
        logprobs, usage = await self._weigh(engine, messages, templates.options, principle)
        return logprobs, thought.text, thought.usage + usage

    async def _rate(
        self, engine: Engine, row: dict[str, Any], principle: Principle
    ) -> tuple[dict[str, Any], Usage]:
        scores, usage = [], Usage()
        for response in (row["response_a"], row["response_b"]):
            messages = self.templates.rating_messages(row["messages"], response, principle)
            logprobs, more = await self._weigh(engine, messages, self.templates.scores or (), principle)
            scores.append(expected_score(logprobs))
            usage = usage + more
        a, b = scores
        return {"principle_id": principle.id, "score_a": a, "score_b": b, "p_a": preference(a, b)}, usage

    async def _weigh(
        self, engine: Engine, messages: Sequence[Message], options: Sequence[str], principle: Principle
    ) -> tuple[list[float], Usage]:
        logprobs, usage = await engine.choose(messages, options)
        if len(logprobs) != len(options) or not all(math.isfinite(x) for x in logprobs):
            raise Abstained(f"the feedback model gave no finite log-probability for principle {principle.id}")
        return logprobs, usage


def gold_rows(run: Run) -> list[dict[str, Any]]:
    """Comparisons whose preferred response is known: they measure the labeller, and train nothing.

    Beside what is labelled, a row has `gold` and `gold_by_principle` (or None).

    Raises:
        InputError: a row lacks something, or none prefers one of its two responses.
    """
    path = run.config.label.gold
    if path is None:
        return []
    found = []
    for number, row in enumerate(islice(iter_rows(path, run.config.seed), run.config.label.gold_limit), 1):
        where = f"label.gold={path}: row {number}"
        if missing := [n for n in ("messages", "response_a", "response_b", "gold") if row.get(n) is None]:
            raise InputError(f"{where} lacks {', '.join(missing)}")
        if not all(isinstance(row[k], str) for k in ("response_a", "response_b")):
            raise InputError(f"{where}: response_a and response_b must be texts")
        named = row.get("gold_by_principle")
        if not isinstance(named, dict | None):
            raise InputError(
                f"{where}: gold_by_principle maps ids of principles to numbers, got {str(named)[:80]!r}"
            )
        found.append(
            {
                "id": derive_id("gold", row["messages"], row["response_a"], row["response_b"]),
                "messages": to_messages(row["messages"], where),
                "response_a": clean(row["response_a"]),
                "response_b": clean(row["response_b"]),
                "source": clean(str(row.get("source") or path)),
                "gold": _preferred(row["gold"], where),
                "gold_by_principle": named
                and {
                    clean(str(k)): _preferred(v, f"{where}, {k}") for k, v in named.items() if v is not None
                },
            }
        )
    if all(r["gold"] == 0.5 for r in found):
        raise InputError(f"label.gold={path}: no row prefers one of its responses (gold is 0.5 in all)")
    return found


def _preferred(value: Any, where: str) -> float:
    """1 where response a is the better one, 0 where b is, 0.5 where neither is."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 <= number <= 1:
        raise InputError(f"{where}: gold {str(value)[:80]!r} is no number from 0 (b is better) to 1 (a is)")
    return number


def make_chain(run: Run) -> Label:
    """Votes as the run asks for them."""
    config, label = run.config, run.config.label
    templates = load_templates(config.templates)
    asked = (label.mode, label.both_orders, label.reasoning_temperature, label.reasoning_max_tokens)
    feedback = run.feedback()
    context = reuse.context(run, feedback.model(label.model), feedback.config.engine, templates.sha, asked)
    return Label(config.document, templates, label, config.seed, context)


def run(run: Run) -> dict[str, Any]:
    config = run.config
    chain = make_chain(run)
    rows = [
        {
            k: r[k]
            for k in (
                "id",
                "prompt_id",
                "messages",
                "response_a",
                "response_b",
                "truncated_a",
                "truncated_b",
                "model",
                "temperature",
                "source",
                "kind",
                "family",
            )
        }
        for r in run.rows("compare")
        if r["error"] is None
    ]
    feedback, model = run.feedback(), config.label.model
    gold = gold_rows(run)
    # Two people may have judged one comparison: it is labelled once.
    once = {r["id"]: {k: v for k, v in r.items() if not k.startswith("gold")} for r in gold}
    asked = ({"gold": once.values()} if gold else {}) | {"part": rows}
    sets = {n: Rows(reuse.with_before(run, "label", given, n), model) for n, given in asked.items()}
    done = map_sets(feedback, "label", sets, chain, schema="labels")["part"]
    proof = certificate.certificate(_labels(run, "part"), gold, _labels(run, "gold") if gold else {})
    proof |= {"mode": config.label.mode, "feedback_model": model}
    proof |= {"constitution_sha": chain.constitution.sha}
    files.write_json(run.path("label", "certificate.json"), proof)
    return done


def check(run: Run, preflight: Preflight) -> None:
    """Raises InputError if the feedback model, its options, the templates or the gold comparisons cannot be used."""
    config, templates = run.config, preflight.templates
    feedback = run.feedback().config
    check_engine(feedback, "label.engine" if config.label.engine else "engine")
    check_mode(templates, config.label.mode)
    answers = [templates.options, *([templates.scores or ()] if config.label.mode == "score" else [])]
    if feedback.engine.kind == "openai":  # its tokenizer and chat template cannot be seen from here
        for options in answers:
            check_options(options)
        if "label" in preflight.stages and preflight.models_here:
            read_key(feedback.engine)
    elif renderer := preflight.renderer(config.label.model):
        for options in answers:
            renderer.option_ids(options)
    gold_rows(run)


def check_room(run: Run) -> None:
    """Raises InputError if the cluster will never have room for the feedback model's engines."""
    config = run.feedback().config
    check_resources(config, uses_gpu(config))


def _labels(run: Run, name: str) -> dict[str, certificate.Labelled | None]:
    return certificate.read(read_tables(run.path("label"), certificate.COLUMNS, name))
