"""Stage `label`: the feedback model's soft preference between two responses, principle by principle.

Bai et al. 2022 (arXiv 2212.08073), section 4.1: the model reads the conversation, one principle and the options; its
label is the probability of the two option tokens, normalised over the two. Each principle is asked in both orders and
the two are averaged, so that a preference for a slot cancels out (docs/method.md, items 1 to 6). With `answer:
reasoned` the model reasons before the options are weighed. With `ask: response` it rates each response by itself (Lee
et al. 2023, arXiv 2309.00267), and the two expected scores are compared.

If the model gives no readable answer for a principle, that principle abstains: its vote has no `p_a`, and says why. The
label is then made of the other votes; if all principles abstain, the row is an error.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, NotRequired

from cai_ray.config.judge import JudgeConfig
from cai_ray.constitution import Constitution, Principle
from cai_ray.data.gold_comparisons import read_gold_comparisons
from cai_ray.data.left_out import LeftOut
from cai_ray.data.preflight import Preflight
from cai_ray.engine.metered import Metered
from cai_ray.engine.protocol import Engine, Sampling
from cai_ray.errors import Abstained, RowError
from cai_ray.generate import reuse
from cai_ray.generate.chain import Rows, keeping
from cai_ray.generate.compare import left_out_as_cut
from cai_ray.generate.draw import draw
from cai_ray.generate.rows import check_resources, map_sets
from cai_ray.generate.text_lengths import TextKind, reasoning_kinds
from cai_ray.judging import certificate
from cai_ray.judging.votes import combine, expected_score, preference, slot_bias
from cai_ray.prompts.load import load_templates
from cai_ray.prompts.messages import Message
from cai_ray.prompts.templates import TemplateSet
from cai_ray.storage import files
from cai_ray.storage.arrow import select
from cai_ray.storage.records import Label, Pair, Vote, derive_id, derive_seed
from cai_ray.storage.run import Run
from cai_ray.storage.tables import iter_tables


class LabelTask(Pair):
    """Two responses that are to be compared."""

    earlier: NotRequired[list[reuse.EarlierLabel] | None]


@dataclass(frozen=True)
class LabelChain:
    """Asks each principle for its vote on a comparison, and makes the label of the votes."""

    constitution: Constitution
    templates: TemplateSet
    config: JudgeConfig
    seed: int
    context: str = ""
    """What all votes depend on (`reuse.context`)."""
    truncated: Literal["drop", "keep"] = "keep"
    """What becomes of reasoning that was cut off (`label.truncated`)."""

    @property
    def text_kinds(self) -> list[TextKind]:
        return reasoning_kinds("label.judge", self.config)

    async def __call__(self, engine: Engine, row: LabelTask) -> Label:
        votes, p = list[Vote](), 0.5
        made: Label = {
            **select(row, Pair),
            "votes": votes,
            "feedback_model": self.config.model,
            "constitution_sha": self.constitution.sha,
        }
        with keeping(made, engine := Metered(engine)):
            if row["response_a"] != row["response_b"]:  # else there is nothing to prefer, and nothing to ask
                principles = self.voters(row)
                await self._ask_all(engine, row, principles, votes)
                p = self._combine(votes, principles)
        low, high = self.config.clamp or (0.0, 1.0)
        return {
            **made,
            "p_a": min(max(p, low), high) if votes else p,
            "p_a_raw": p,
            "slot_bias": slot_bias(votes),
            "usage": engine.usage.as_record(),
        }

    async def _ask_all(
        self, engine: Engine, row: LabelTask, principles: Sequence[Principle], votes: list[Vote]
    ) -> None:
        """Adds every principle's vote to `votes`, also if another principle cannot be asked."""
        earlier = reuse.by_key(v for e in row.get("earlier") or () for v in e["votes"] or ())
        asked = (self._vote(engine, row, principle, earlier) for principle in principles)
        answers = await asyncio.gather(*asked, return_exceptions=True)
        votes += [vote for vote in answers if not isinstance(vote, BaseException)]
        for failure in answers:
            if isinstance(failure, BaseException):
                raise failure

    def _combine(self, votes: Sequence[Vote], principles: Sequence[Principle]) -> float:
        """The probability of response a from all votes, before clamping."""
        cast = [
            (p, principle.weight)
            for vote, principle in zip(votes, principles, strict=True)
            if (p := vote["p_a"]) is not None
        ]
        if not cast:
            raise RowError(votes[0]["abstained"])
        return combine([p for p, _ in cast], [w for _, w in cast], self.config.combine)

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
        """Hash of everything that a vote depends on: one with the same key need not be asked for again."""
        question = principle.text if self.config.ask == "response" else principle.comparison
        responses = (row["response_a"], row["response_b"])
        return derive_id(self.context, row["messages"], *responses, principle.id, principle.form, question)

    async def _vote(
        self, engine: Engine, row: LabelTask, principle: Principle, earlier: Mapping[str, Vote]
    ) -> Vote:
        key = self.key(row, principle)
        if key in earlier:
            return earlier[key]
        ask = self._rate if self.config.ask == "response" else self._compare
        try:
            vote = await ask(engine, row, principle)
        except Abstained as e:
            return {"principle_id": principle.id, "p_a": None, "abstained": str(e), "key": key}
        p = vote["p_a"]
        if principle.form == "negative" and p is not None:
            # It was asked for the worse response. The log-probabilities stay as the model gave them.
            vote["p_a"] = 1 - p
        return {**vote, "key": key}

    async def _compare(self, engine: Engine, row: LabelTask, principle: Principle) -> Vote:
        a, b = row["response_a"], row["response_b"]
        answer = await self._ask(engine, row, principle, a, b)
        first, second = answer.logprobs
        vote: Vote = {
            "principle_id": principle.id,
            "logprob_a": first,
            "logprob_b": second,
            "reasoning": answer.reasoning,
            "reasoning_truncated": answer.truncated,
            "reasoning_tokens": answer.tokens,
            "p_a": preference(first, second),
        }
        if not self.config.both_orders:
            return vote
        swapped = await self._ask(engine, row, principle, b, a)
        # Response a stood in the second slot: its log-probability is the second option's.
        second, first = swapped.logprobs
        both = [preference(*answer.logprobs), preference(first, second)]
        vote["logprob_a_swapped"], vote["logprob_b_swapped"] = first, second
        vote["reasoning_swapped"] = swapped.reasoning
        vote["reasoning_swapped_truncated"] = swapped.truncated
        vote["reasoning_swapped_tokens"] = swapped.tokens
        vote["p_a"] = sum(both) / len(both)
        return vote

    async def _ask(
        self, engine: Engine, row: LabelTask, principle: Principle, first: str, second: str
    ) -> _SlotAnswer:
        """Asks which of two responses is better, the `first` in the first slot."""
        turns, templates, config = row["messages"], self.templates, self.config
        at_once = templates.feedback_messages(turns, first, second, principle)
        if config.answer == "logprob":
            return _SlotAnswer(await self._weigh(engine, at_once, templates.options, principle))
        # The seed has the texts in it, and not their slots: swapped responses meet the same reasoning, swapped.
        seed = derive_seed(self.seed, row["id"], "reasoning", principle.id, first, second)
        thought = await engine.chat(
            templates.reasoning_messages(turns, first, second, principle),
            Sampling(config.reasoning_temperature, config.reasoning_max_tokens, seed),
        )
        cut, empty = not thought.finished, not thought.text.strip()
        if empty and not cut:
            raise Abstained(f"the feedback model's reasoning is empty for principle {principle.id}")
        messages = templates.verdict_messages(turns, first, second, principle, thought.text)
        if cut and (empty or self.truncated == "drop"):
            messages = at_once
        logprobs = await self._weigh(engine, messages, templates.options, principle)
        return _SlotAnswer(logprobs, thought.text, cut, thought.usage.generated or None)

    async def _rate(self, engine: Engine, row: LabelTask, principle: Principle) -> Vote:
        scores = []
        for response in (row["response_a"], row["response_b"]):
            messages = self.templates.rating_messages(row["messages"], response, principle)
            logprobs = await self._weigh(engine, messages, self.templates.scores or (), principle)
            scores.append(expected_score(logprobs))
        a, b = scores
        return {"principle_id": principle.id, "score_a": a, "score_b": b, "p_a": preference(a, b)}

    async def _weigh(
        self, engine: Engine, messages: Sequence[Message], options: Sequence[str], principle: Principle
    ) -> list[float]:
        logprobs, _ = await engine.choose(messages, options)
        if len(logprobs) != len(options) or not all(math.isfinite(x) for x in logprobs):
            raise Abstained(f"the feedback model gave no finite log-probability for principle {principle.id}")
        return logprobs


class _SlotAnswer(NamedTuple):
    """What the feedback model says of two responses in one order."""

    logprobs: list[float]
    """Log-probability of the option in the first slot, then of the one in the second."""
    reasoning: str | None = None
    truncated: bool | None = None
    """Whether the reasoning was cut off."""
    tokens: int | None = None
    """Those of the reasoning."""


def make_judge(run: Run, judge: JudgeConfig) -> LabelChain:
    """The chain that asks a judge for its votes."""
    templates = load_templates(judge.templates or run.config.templates)
    return LabelChain(run.config.document_of(judge), templates, judge, run.config.seed)


def make_chain(run: Run) -> LabelChain:
    """The chain of stage `label`, whose votes have keys."""
    judge = run.config.label.judge
    chain = make_judge(run, judge)
    settings: tuple[object, ...] = (
        judge.ask,
        judge.answer,
        judge.both_orders,
        judge.reasoning_temperature,
        judge.reasoning_max_tokens,
    )
    # Only what can change a vote is in its key.
    truncated = run.config.label.truncated if judge.answer == "reasoned" else "keep"
    settings += () if truncated == "keep" else (truncated,)
    context = reuse.context(run, run.resolve_model(judge), chain.templates.sha, settings)
    return replace(chain, context=context, truncated=truncated)


def _comparisons(run: Run, left_out: Counter[str]) -> Iterator[LabelTask]:
    """The comparisons that are labelled; `left_out` counts those that are not, as an answer was cut off."""
    for comparison in run.each_row("compare"):
        if comparison["error"] is not None:
            continue
        if left_out_as_cut(comparison, run.config.compare.truncated):
            left_out["truncated"] += 1
        else:
            yield select(comparison, LabelTask)


def run(run: Run) -> dict[str, Any]:
    chain = make_chain(run)
    cut = Counter({"truncated": 0})
    tasks: dict[str, Iterable[LabelTask]] = {"part": _comparisons(run, cut)}
    left_out = LeftOut(run.config.max_error_rate)
    gold = read_gold_comparisons(run.config, left_out)
    if gold:  # two people may have judged one comparison: it is labelled once
        once = {c["id"]: select(c, LabelTask) for c in gold}
        tasks = {"gold": once.values(), **tasks}
    judge = run.config.label.judge
    sets = {n: Rows(reuse.with_earlier(run, "label", rows, n), judge) for n, rows in tasks.items()}
    summaries = map_sets(run, "label", sets, chain, takes=LabelTask, gives=Label)
    labels = (label for _, label in _read_labels(run, "part"))
    proof = certificate.certificate(labels, gold, dict(_read_labels(run, "gold")) if gold else {})
    proof |= {"ask": judge.ask, "answer": judge.answer, "feedback_model": judge.model}
    proof |= {"constitution_sha": chain.constitution.sha}
    files.write_json(run.path("label", "certificate.json"), proof)
    counts: dict[str, Any] = {"comparisons_left_out": dict(cut)}
    if gold:
        counts["gold_left_out"] = dict(left_out)
    return {**summaries["part"], **counts, "constitution_sha": chain.constitution.sha}


def check(run: Run, preflight: Preflight) -> None:
    """Raises InputError if the feedback model, its options, the templates or the gold comparisons cannot be used."""
    preflight.check_judge("label.judge", run.config.label.judge, "label")
    left_out = LeftOut(run.config.max_error_rate)
    read_gold_comparisons(run.config, left_out)
    preflight.tell(left_out)


def check_room(run: Run) -> None:
    """Raises InputError if the cluster will never have room for the feedback model's engines."""
    check_resources(run.config, run.resolve_model(run.config.label.judge).engine)


def _read_labels(run: Run, name: str) -> Iterator[tuple[str, certificate.LabelFacts | None]]:
    return certificate.read(iter_tables(run.path("label"), certificate.COLUMNS, name))
