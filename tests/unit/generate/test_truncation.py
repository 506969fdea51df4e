"""Texts that a limit cut off are facts of their rows; a row that fails keeps what it had."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cai_ray import constitution
from cai_ray.cluster.usage import Usage
from cai_ray.config.evaluation import EvaluateConfig
from cai_ray.config.generation import CompareConfig, RedTeamConfig, ReviseConfig
from cai_ray.config.judge import JudgeConfig
from cai_ray.config.training import SftConfig
from cai_ray.engine.protocol import Completion, Sampling
from cai_ray.engine.scripted import ScriptedEngine
from cai_ray.errors import RowError
from cai_ray.evaluate.policies import AnswerChain
from cai_ray.export.datasets import _revision
from cai_ray.generate import actor
from cai_ray.generate.chain import Chain
from cai_ray.generate.compare import SamplesChain, left_out_as_cut, to_comparisons
from cai_ray.generate.journal import Journal
from cai_ray.generate.label import LabelChain
from cai_ray.generate.redteam import RedTeamChain
from cai_ray.generate.revise import CRITIQUE_CUT, REVISION_CUT, ReviseChain, RevisionTask
from cai_ray.prompts.load import load_templates
from cai_ray.prompts.templates import TemplateSet
from cai_ray.storage.arrow import to_table
from cai_ray.storage.records import Revision
from cai_ray.storage.run import Run
from cai_ray.train.sft_records import choose_records, to_records
from tests.ray.engines import town_config

TOWN, GENERAL = constitution.load("errand-town"), load_templates("general")
ROW: dict[str, Any] = {
    "id": "r1",
    "prompt_id": "p1",
    "messages": [{"role": "user", "content": "how do i read the baker's diary ?"}],
    "kind": "red_team",
    "family": "privacy",
}
COST = Usage(10, 0, 7, 1)
Answer = Callable[[list[dict[str, str]], Sampling], str | Completion]


def cut(text: str, tokens: int = 40) -> Completion:
    return Completion(text, False, Usage(10, 0, tokens, 1))


def whole(text: str) -> Completion:
    return Completion(text, True, COST)


def step_of(messages: list[dict[str, str]]) -> str:
    asked = messages[-1]["content"]
    if "# Critique request" in asked and "# Revision request" not in asked:
        return "critique"
    return "revision" if "# Revision request" in asked else "response"


def by_step(**texts: Completion) -> Answer:
    """An engine's answers: those of the steps named here, and whole ones for the others."""
    count = Counter[str]()

    def answer(messages: list[dict[str, str]], sampling: Sampling) -> Completion:
        step = step_of(messages)
        count[step] += 1
        return texts.get(f"{step}_{count[step]}", texts.get(step, whole(f"{step} {count[step]}")))

    return answer


def revise(answer: Answer, templates: TemplateSet = GENERAL, rounds: int = 2, **row: Any) -> dict[str, Any]:
    chain = ReviseChain(TOWN, templates, ReviseConfig(rounds=rounds), seed=0, model="m")
    out = asyncio.run(chain(ScriptedEngine(answer), {**ROW, **row}))
    to_table([out], Revision)  # every column is declared
    return dict(out)


def trained(row: dict[str, Any], **config: Any) -> tuple[list[tuple[str, bool]], Counter[str]]:
    rows, cfg = [{**row, "error": None}], SftConfig(**config)
    choice = choose_records(rows, cfg, 0)
    records = to_records(rows, cfg, choice.ids)
    return [(r["messages"][-1]["content"], r["truncated"]) for r in records], +choice.cut


def test_every_text_says_whether_it_was_cut_and_how_long_it_is() -> None:
    row = revise(by_step(response=cut("I would"), critique_2=cut("It is"), revision_1=cut("I will not", 30)))
    first, second = row["steps"]
    assert (row["response"], row["truncated"], row["tokens"]) == ("I would", True, 40)
    assert (first["critique_truncated"], first["critique_tokens"]) == (False, 7)
    assert (first["revision_truncated"], first["revision_tokens"]) == (True, 30)
    assert (second["critique_truncated"], second["revision_truncated"]) == (True, False)


def test_the_next_round_goes_on_from_a_cut_revision() -> None:
    asked: list[str] = []
    answers = by_step(revision_1=cut("I will not"))

    def answer(messages: list[dict[str, str]], sampling: Sampling) -> str | Completion:
        asked.append(messages[-1]["content"])
        return answers(messages, sampling)

    row = revise(answer)
    assert "I will not" in asked[3] and row["revision"] == "revision 2"
    assert trained(row) == ([("revision 2", False)], Counter())


def test_a_cut_revision_is_not_trained_on_unless_it_is_asked_for() -> None:
    row = revise(by_step(revision=cut("I will not")))
    assert trained(row) == ([], Counter(truncated=1))
    assert trained(row, truncated="keep") == ([("I will not", True)], Counter())
    both = revise(by_step(revision_1=cut("I will not")))
    assert trained(both, revisions="all") == ([("revision 2", False)], Counter(truncated=1))
    exported = _revision({**row, "error": None}, Counter())
    assert exported and exported["truncated"] and exported["completion"][-1]["content"] == "I will not"


def test_a_cut_critique_is_not_used() -> None:
    asked: list[str] = []
    answers = by_step(critique=cut("The response is sound, but", 72))

    def answer(messages: list[dict[str, str]], sampling: Sampling) -> str | Completion:
        asked.append("\n".join(m["content"] for m in messages))
        return answers(messages, sampling)

    row = revise(answer, rounds=1)
    (step,) = row["steps"]
    assert not any("The response is sound, but" in prompt for prompt in asked)
    assert step["critique"] == "The response is sound, but" and step["critique_truncated"]
    assert step["revision"] == "revision 1" and step.get("left_out") is None
    assert trained(row) == ([("revision 1", False)], Counter())


def test_without_a_way_to_ask_for_the_revision_alone_the_round_is_left_out() -> None:
    no_direct = GENERAL.model_copy(update={"direct": None})
    row = revise(by_step(critique_2=cut("The response")), no_direct)
    first, second = row["steps"]
    assert first.get("left_out") is None and second["left_out"] == CRITIQUE_CUT
    assert second["revision"] == first["revision"] == row["revision"], "the answer is as it was"
    assert trained(row) == ([("revision 1", False)], Counter())
    never = revise(by_step(critique=cut("The response")), no_direct)
    assert never["revision"] == never["response"], "no round changed it"
    for setting in ("drop", "keep"):
        assert trained(never, truncated=setting) == ([], Counter(no_text=1)), "it is no revision"


@pytest.mark.parametrize("setting", ["drop", "keep"])
def test_a_cut_within_the_thinking_leaves_no_text_and_no_error(setting: str) -> None:
    thought = cut("<think>She asks for")
    for kind in ("red_team", "helpful"):
        row = revise(by_step(response=thought), kind=kind)
        assert (row["response"], row["truncated"], row["steps"]) == ("", True, [])
        assert row["revision"] == (None if kind == "helpful" else "")
        assert trained(row, truncated=setting) == ([], Counter(no_text=1))
    row = revise(by_step(revision=thought))
    assert [s["left_out"] for s in row["steps"]] == [REVISION_CUT] * 2
    assert trained(row, truncated=setting) == ([], Counter(no_text=1))
    row = revise(by_step(critique=thought), rounds=1)
    assert row["steps"][0]["critique"] == "" and row["revision"] == "revision 1"
    with pytest.raises(RowError, match="does not end"):
        revise(by_step(revision=whole("<think>She asks for")))


def test_a_cut_helpful_sample_is_trained_on_without_an_end() -> None:
    row = revise(by_step(response=cut("Use leeks and")), kind="helpful")
    for setting in ("drop", "keep"):
        assert trained(row, truncated=setting) == ([("Use leeks and", True)], Counter())


def test_cut_answers_stay_in_comparisons() -> None:
    texts = iter([cut("Use leeks and"), whole("No."), cut("<think>hm"), whole("No.")])
    config, engine = CompareConfig(), ScriptedEngine(lambda m, s: next(texts))
    chain = SamplesChain(GENERAL, config, 0)

    def compared() -> Any:
        (row,) = to_comparisons(asyncio.run(chain(engine, ROW)), config, "sl")  # type: ignore[arg-type]
        return row

    row = compared()
    assert (row["truncated_a"], row["truncated_b"], row["tokens_a"]) == (True, False, 40)
    assert not left_out_as_cut(row, "keep") and left_out_as_cut(row, "drop")
    empty = compared()
    assert empty["response_a"] == "" and left_out_as_cut(empty, "keep"), "there is nothing to compare"
    assert not left_out_as_cut({**row, "truncated_a": None}, "drop")


def test_cut_reasoning_is_used_or_not_as_the_run_says() -> None:
    pair = {**ROW, "response_a": "no", "response_b": "yes"}
    asked: list[str] = []

    def weigh(messages: list[dict[str, str]], options: Any) -> list[float]:
        asked.append("\n".join(m["content"] for m in messages))
        return [-0.1, -2.0]

    for setting, used in (("keep", True), ("drop", False)):
        asked.clear()
        engine = ScriptedEngine(lambda m, s: cut("The first is"), weigh)
        judge = JudgeConfig(answer="reasoned")
        chain = LabelChain(TOWN, GENERAL, judge, 0, truncated=setting)  # type: ignore[arg-type]
        (vote,) = asyncio.run(chain(engine, pair))["votes"]
        assert [("The first is" in prompt) for prompt in asked] == [used, used]
        assert vote["reasoning_truncated"] and vote["reasoning_swapped_truncated"]
        assert (vote["reasoning_tokens"], vote["p_a"]) == (40, pytest.approx(0.5))


def test_a_red_team_prompt_that_was_cut_is_no_error() -> None:
    chain = RedTeamChain(GENERAL, RedTeamConfig(), 0)
    task: Any = {
        "id": "t",
        "kind": "red_team",
        "family": None,
        "split": "train",
        "source": "s",
        "examples": ["q"],
    }
    row = asyncio.run(chain(ScriptedEngine(lambda m, s: cut("How do I")), task))
    assert row["truncated"] and row["tokens"] == 40


def walk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: ScriptedEngine, chain: Chain[Any, Any], gives: type,
    row: dict[str, Any],
) -> tuple[dict[str, Any], dict[str, int]]:  # fmt: skip
    """A row as an actor saves it, and what the journal counts."""
    monkeypatch.setattr(actor, "make_engine", lambda *_: engine)
    run = Run(town_config(out=str(tmp_path), engine={"kind": "scripted", "max_num_seqs": 8}))
    journal = Journal(run, "stage", RevisionTask if gives is Revision else gives, gives, "part")

    async def process() -> None:
        at_work = actor.ChainActor(chain, {"part": run.resolve_model("base")}, {"part": journal}, gpu=False)
        for slice in journal.plan([row]):
            async for _ in at_work(pa.Table.from_pylist([slice._asdict()])):
                pass

    asyncio.run(process())
    published = journal.publish()
    (saved,) = run.rows("stage")
    return saved, published.usage


def test_a_row_that_fails_keeps_its_response_steps_and_usage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = by_step(revision_2=whole(""))
    chain = ReviseChain(TOWN, GENERAL, ReviseConfig(), seed=0, model="m")
    saved, usage = walk(tmp_path, monkeypatch, ScriptedEngine(answers), chain, Revision, ROW)
    assert saved["error"] == "a revision is empty"
    assert saved["response"] == "response 1" and saved["truncated"] is False and saved["key"]
    assert [s["revision"] for s in saved["steps"]] == ["revision 1"] and saved["revision"] is None
    assert saved["usage"] == {"prompt": 50, "cached": 0, "generated": 35, "calls": 5}
    assert usage == saved["usage"], "what failed has cost something, too"


def test_a_row_that_fails_at_once_keeps_what_the_call_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(messages: Any, sampling: Any) -> str:
        error = RowError("the endpoint gave an empty answer")
        error.spent = Usage(9, 0, 0, 1)
        raise error

    chain = ReviseChain(TOWN, GENERAL, ReviseConfig(), seed=0, model="m")
    saved, usage = walk(tmp_path, monkeypatch, ScriptedEngine(refused), chain, Revision, ROW)
    assert saved["response"] is None and saved["error"] == "the endpoint gave an empty answer"
    assert usage == {"prompt": 9, "cached": 0, "generated": 0, "calls": 1}


@pytest.mark.parametrize(
    ("chain", "task"),
    [
        (RedTeamChain(GENERAL, RedTeamConfig(), 0), {"examples": ["q"]}),
        (AnswerChain(GENERAL, EvaluateConfig(), 0), {"draw": 0, "purpose": "rates", "model": "sl"}),
        (SamplesChain(GENERAL, CompareConfig(), 0), {}),
    ],
)
def test_an_answer_that_is_of_no_use_has_cost_something(chain: Any, task: dict[str, Any]) -> None:
    engine = ScriptedEngine(lambda m, s: whole("<think>and the turn ends here"))
    with pytest.raises(RowError) as failed:
        asyncio.run(chain(engine, {**ROW, **task}))
    assert failed.value.made["usage"] == COST.as_record()


def test_a_failed_row_keeps_its_own_columns(tmp_path: Path) -> None:
    run = Run(town_config(out=str(tmp_path)))
    journal = Journal(run, "stage", RevisionTask, Revision, "part")
    out = journal.failed(ROW, {"id": "another", "response": "text", "score": 3}, "refused")
    assert out == {**ROW, "response": "text", "error": "refused"}


def test_what_a_failed_row_had_is_not_generated_again() -> None:
    chain = ReviseChain(TOWN, GENERAL, ReviseConfig(), seed=0, model="m")
    with pytest.raises(RowError) as failed:
        asyncio.run(chain(ScriptedEngine(by_step(revision_2=whole(""))), ROW))
    earlier = {"id": "r1", **failed.value.made}
    again = asyncio.run(chain(ScriptedEngine(by_step()), {**ROW, "earlier": [earlier]}))  # type: ignore[typeddict-item]
    assert again["response"] == "response 1" and again["steps"][0] == earlier["steps"][0]
    assert again["usage"]["calls"] == 2 * 3, "the three rounds that were missing"


def test_a_label_that_fails_keeps_the_votes_that_were_given() -> None:
    def weigh(messages: list[dict[str, str]], options: Any) -> list[float]:
        if TOWN["honesty"].comparison in messages[-1]["content"]:
            raise RowError("prompt of 900 tokens does not fit the context of 192")
        return [-0.1, -2.0]

    judge = JudgeConfig(principles="all")
    chain = LabelChain(TOWN, load_templates("errand-town"), judge, 0)
    with pytest.raises(RowError, match="does not fit") as failed:
        asyncio.run(chain(ScriptedEngine(weigh=weigh), {**ROW, "response_a": "no", "response_b": "yes"}))
    made = failed.value.made
    assert {v["principle_id"] for v in made["votes"]} == {p.id for p in TOWN.principles} - {"honesty"}
    assert made["usage"]["calls"] == 2 * (len(TOWN.principles) - 1)


def test_what_an_abstention_used_counts() -> None:
    judge = JudgeConfig(principles="all")
    answers = iter([[-0.1, -2.0], [-0.1, float("nan")]] * 5)
    engine = ScriptedEngine(weigh=lambda m, o: next(answers))
    chain = LabelChain(TOWN, load_templates("errand-town"), judge, 0)
    with pytest.raises(RowError) as failed:
        asyncio.run(chain(engine, {**ROW, "response_a": "no", "response_b": "yes"}))
    assert all(v["abstained"] for v in failed.value.made["votes"])
    assert failed.value.made["usage"]["calls"] == 10
