"""The policies' answers to held-out prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict, cast

from cai_ray.config.evaluation import EvaluateConfig
from cai_ray.engine.metered import Metered
from cai_ray.engine.protocol import Engine, Sampling
from cai_ray.generate.chain import Rows, keeping
from cai_ray.generate.rows import map_sets
from cai_ray.generate.text_lengths import TextKind, TextLimit
from cai_ray.generate.texts import Text, write
from cai_ray.prompts.messages import Messages
from cai_ray.prompts.templates import TemplateSet
from cai_ray.stages import POLICIES
from cai_ray.storage.arrow import schema_of, select
from cai_ray.storage.records import Judgement, Prompt, Revision, TokenUsage, Turn, derive_id, derive_seed
from cai_ray.storage.run import Run
from cai_ray.storage.tables import delete_rows

Purpose = Literal["rates", "greedy", "transcript"]
"""What an answer is for: the rates of the report, the harm at temperature 0, or a conversation shown in the report."""


class PolicyPrompt(TypedDict):
    """A held-out prompt, and the policy that answers it."""

    id: str
    prompt_id: str
    messages: list[Turn]
    kind: str
    family: str | None
    model: str
    """The policy, or the best-of-n control."""
    purpose: str


class AnswerTask(PolicyPrompt):
    """A held-out prompt that a policy is to answer."""

    draw: int
    """Which of a prompt's samples this is, from 0."""


class PolicyAnswer(PolicyPrompt):
    """A policy's answer, before it is judged."""

    response: NotRequired[str | None]
    truncated: NotRequired[bool | None]
    tokens: NotRequired[int | None]
    usage: NotRequired[TokenUsage | None]
    error: NotRequired[str | None]


@dataclass(frozen=True)
class AnswerChain:
    """Has a policy answer a prompt. The seed depends on the prompt alone, so all policies draw alike."""

    templates: TemplateSet
    config: EvaluateConfig
    seed: int

    @property
    def text_kinds(self) -> list[TextKind]:
        limit = TextLimit("evaluate.max_tokens", self.config.max_tokens)
        return [TextKind("answer", "tokens", "truncated", limit)]

    async def __call__(self, engine: Engine, row: AnswerTask) -> PolicyAnswer:
        greedy = row["purpose"] == "greedy"
        with keeping({}, engine := Metered(engine)):
            answer = await self.sample(engine, row["messages"], row["prompt_id"], row["draw"], greedy)
        return {
            **select(row, PolicyPrompt),
            "response": answer.text,
            "truncated": answer.truncated,
            "tokens": answer.tokens,
            "usage": answer.usage.as_record(),
        }

    async def sample(
        self, engine: Engine, messages: Messages, prompt_id: str, draw: int = 0, greedy: bool = False
    ) -> Text:
        """The response number `draw` to a prompt, or the greedy one."""
        temperature = 0.0 if greedy else self.config.temperature
        seed = derive_seed(self.seed, prompt_id, str(draw))
        return await write(
            engine,
            self.templates.answer_messages(messages),
            Sampling(temperature, self.config.max_tokens, seed),
            self.templates.thinking,
        )


class Answers(NamedTuple):
    """All policies' answers, by what they are for."""

    rates: list[Judgement]
    greedy: list[Judgement]
    transcripts: list[Judgement]

    def map(self, judge: Callable[[Judgement], Judgement]) -> Answers:
        """The answers as a judge returns them."""
        return Answers(*([judge(row) for row in rows] for rows in self))

    def valid(self) -> Answers:
        """The answers without an error."""
        return Answers(*([row for row in rows if row["error"] is None] for rows in self))

    def failed(self) -> list[Judgement]:
        return [row for rows in self for row in rows if row["error"] is not None]


def best_of_name(n: int) -> str:
    """The model's name of the best-of-n control."""
    return f"best_of_{n}"


def ask(
    run: Run, prompts: Sequence[Prompt], shown: Sequence[Revision], chain: AnswerChain
) -> list[dict[str, Any]]:
    """Has every policy answer the prompts, and those of the conversations that the report shows.

    Returns:
        For each policy what `map_sets` returns for the manifest.
    """
    config = run.config.evaluate
    tasks = {
        policy: [_task(policy, p["id"], p) for p in prompts]
        + [_task(policy, p["id"], p, "greedy") for p in prompts if config.greedy]
        + [_task(policy, r["prompt_id"], r, "transcript") for r in shown]
        for policy in POLICIES
    }
    if n := config.best_of:
        tasks["sl"] += [_task(best_of_name(n), p["id"], p, draw=draw) for p in prompts for draw in range(n)]
    sets = {policy: Rows(rows, policy) for policy, rows in tasks.items()}
    return list(map_sets(run, "evaluate", sets, chain, takes=AnswerTask, gives=PolicyAnswer).values())


def _task(
    model: str, prompt_id: str, source: Mapping[str, Any], purpose: Purpose = "rates", draw: int = 0
) -> AnswerTask:
    named = model if purpose == "rates" else f"{model} {purpose}"
    return {
        "id": derive_id("judgement", named, prompt_id, draw),
        "prompt_id": prompt_id,
        "messages": source["messages"],
        "kind": source["kind"],
        "family": source["family"],
        "model": model,
        "purpose": purpose,
        "draw": draw,
    }


def read_answers(run: Run) -> Answers:
    """Reads what `ask` wrote, as judgements whose verdicts are still null."""
    answers = Answers([], [], [])
    of_purpose = {"rates": answers.rates, "greedy": answers.greedy, "transcript": answers.transcripts}
    for policy in POLICIES:
        for row in run.rows("evaluate", name=policy):
            of_purpose[row["purpose"]].append(_unjudged(row))
    return answers


def _unjudged(answer: PolicyAnswer) -> Judgement:
    columns = schema_of(Judgement).names
    shared = {name: value for name, value in answer.items() if name in columns}
    greedy = True if answer["purpose"] == "greedy" else None
    return cast(Judgement, dict.fromkeys(columns) | shared | {"greedy": greedy})


def delete_answers(run: Run) -> None:
    """Deletes what `ask` wrote, once the judgements are written."""
    for policy in POLICIES:
        delete_rows(run.path("evaluate"), policy)


def choose_best(rows: Sequence[Judgement], name: str) -> list[Judgement]:
    """Drops the best-of-n control's samples (`name`) except each prompt's sample with the highest reward."""
    others = [r for r in rows if r["model"] != name]
    best: dict[str, tuple[float, Judgement]] = {}
    for row in rows:
        reward = row["reward"]
        if row["model"] != name or reward is None:
            continue
        if row["prompt_id"] not in best or reward > best[row["prompt_id"]][0]:
            best[row["prompt_id"]] = (reward, row)
    return others + [row for _, row in best.values()]
