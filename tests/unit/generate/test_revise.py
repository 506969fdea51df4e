"""The chain of critique and revision, on a scripted engine."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from cai_ray import constitution
from cai_ray.cluster.usage import Usage
from cai_ray.config.generation import ReviseConfig
from cai_ray.config.load import load_config
from cai_ray.config.run import RunConfig
from cai_ray.config.sources import PromptSource
from cai_ray.engine.scripted import ScriptedEngine
from cai_ray.errors import InputError, RowError
from cai_ray.generate.revise import ReviseChain, make_chain
from cai_ray.judging.quality import run_templates
from cai_ray.prompts.check import check_direct
from cai_ray.prompts.load import load_templates
from cai_ray.prompts.templates import TemplateSet
from cai_ray.storage.arrow import to_table
from cai_ray.storage.records import Revision
from cai_ray.storage.run import Run

TOWN = constitution.load("errand-town")
ROW = {
    "id": "r1",
    "prompt_id": "p1",
    "messages": [{"role": "user", "content": "how do i read the baker's diary ?"}],
    "kind": "red_team",
    "family": "privacy",
}


def revise(
    answer: Any,
    document: constitution.Constitution = TOWN,
    templates: TemplateSet | None = None,
    critique: bool = True,
    **row: Any,
) -> dict[str, Any]:
    config = ReviseConfig(rounds=4, draw="without_replacement", critique=critique)
    chain = ReviseChain(document, templates or load_templates("errand-town"), config, seed=0, model="m")
    return asyncio.run(chain(ScriptedEngine(answer=answer), {**ROW, **row}))


def by_step(messages: list[dict[str, str]], sampling: Any) -> str:
    """Names the step that was asked, and what it was asked about."""
    asked = [m["content"] for m in messages]
    if messages[0]["content"] == "<answer>":
        return "answer"
    step = "critique" if len(asked) == 4 else "revision"
    return f"{step} of [{asked[2]}]"


def test_a_revision_takes_the_answers_place() -> None:
    out = revise(by_step)
    assert out["response"] == "answer"
    assert out["steps"][0]["critique"] == "critique of [answer]"
    assert out["steps"][0]["revision"] == "revision of [answer]"
    assert out["steps"][1]["critique"] == "critique of [revision of [answer]]"
    assert out["revision"] == out["steps"][-1]["revision"]


def test_item_07_every_step_names_its_principle_and_carries_its_requests() -> None:
    out = revise(by_step)
    for step in out["steps"]:
        assert step["critique_request"] == TOWN[step["principle_id"]].critique_request
        assert step["revision_request"] == TOWN[step["principle_id"]].revision_request
    assert len({s["principle_id"] for s in out["steps"]}) == 4
    assert out["constitution_sha"] == TOWN.sha


@pytest.mark.parametrize("name", ["errand-town", "general"])
def test_without_critiques_revisions_are_asked_for_at_once(name: str) -> None:
    seen: list[list[str]] = []

    def answer(messages: list[dict[str, str]], sampling: Any) -> str:
        seen.append([m["content"] for m in messages])
        return f"text {len(seen)}"

    out = revise(answer, templates=load_templates(name), critique=False)
    assert len(seen) == 1 + 4, "an answer and four revisions"
    assert [s["revision"] for s in out["steps"]] == [f"text {n}" for n in (2, 3, 4, 5)]
    for step, asked, before in zip(out["steps"], seen[1:], range(1, 5), strict=True):
        principle = TOWN[step["principle_id"]]
        text = "\n".join(asked)
        assert f"text {before}" in text and principle.revision_request in text
        assert principle.critique_request not in text and "# Critique" not in text
        assert step["critique"] is None and step["critique_request"] is None
    assert {s["principle_id"] for s in out["steps"]} == {s["principle_id"] for s in revise(by_step)["steps"]}


def test_item_38_a_set_without_a_way_to_ask_for_revisions_at_once() -> None:
    check_direct(load_templates("errand-town"))
    with pytest.raises(InputError, match=r"revise\.critique=false: template set errand-town has no direct"):
        check_direct(load_templates("errand-town").model_copy(update={"direct": None}))


def test_a_disabled_principles_slot_is_skipped() -> None:
    ids = [s["principle_id"] for s in revise(by_step)["steps"]]
    principles = [p.model_copy(update={"enabled": p.id != ids[1]}) for p in TOWN.principles]
    out = revise(by_step, TOWN.model_copy(update={"principles": tuple(principles)}))
    assert [s["principle_id"] for s in out["steps"]] == [ids[0], *ids[2:]]
    assert [s["round"] for s in out["steps"]] == [1, 3, 4], "its round is counted"


def test_a_helpfulness_prompt_is_answered_and_left_alone() -> None:
    out = revise(by_step, kind="helpful")
    assert out["response"] == "answer" and out["steps"] == [] and out["revision"] is None


def test_item_06_an_empty_revision_is_an_error() -> None:
    with pytest.raises(RowError, match="empty"):
        revise(lambda m, s: "" if len(m) > 4 else "text")


def thinks(messages: list[dict[str, str]], sampling: Any) -> str:
    """A reasoning model that also introduces its revisions."""
    asked = messages[-1]["content"]
    what = (
        "critique"
        if "# Critique request" in asked
        else "revision"
        if "# Revision request" in asked
        else "answer"
    )
    introduction = "Here is a revised response:\n\n" if what == "revision" else ""
    return f"<think>Let me see: {what}.</think>\n\n{introduction}The {what}."


def config(**more: Any) -> RunConfig:
    return RunConfig(
        name="x", model="m", constitution="harmless", prompts=(PromptSource(path="p.jsonl"),), **more
    )


def test_thinking_and_introductions_reach_neither_the_next_prompt_nor_the_record() -> None:
    seen: list[str] = []

    def answer(messages: list[dict[str, str]], sampling: Any) -> str:
        seen.append("".join(m["content"] for m in messages))
        return thinks(messages, sampling)

    out = revise(answer, templates=run_templates(config()))
    assert out["response"] == "The answer." and out["revision"] == "The revision."
    assert {s["critique"] for s in out["steps"]} == {"The critique."}
    assert not any("Let me see" in prompt or "Here is a revised" in prompt for prompt in seen)


def test_thinking_is_kept_where_the_run_says_so() -> None:
    out = revise(thinks, templates=run_templates(config(thinking="keep")))
    assert out["response"] == "<think>Let me see: answer.</think>\n\nThe answer."
    assert all("Let me see: critique" in s["critique"] for s in out["steps"])
    assert out["revision"].startswith("<think>")


def test_item_06_a_revision_that_is_all_thinking_or_introduction_is_an_error() -> None:
    templates = run_templates(config())
    for revision, says in (
        ("<think>What to write", "a thinking block does not end"),
        ("<think>Nothing.</think>", "a revision is empty"),
        ("Here is a revised response:", "a revision is empty"),
    ):
        with pytest.raises(RowError, match=says):
            revise(
                lambda m, s, text=revision: text if "# Revision request" in m[-1]["content"] else "text",
                templates=templates,
            )


def test_seeds_differ_by_row_and_step_and_not_by_order() -> None:
    seeds: list[int] = []

    def note(messages: Any, sampling: Any) -> str:
        seeds.append(sampling.seed)
        return "text"

    revise(note)
    first = list(seeds)
    seeds.clear()
    revise(note)
    assert first == seeds and len(set(first)) == 9
    seeds.clear()
    revise(note, id="r2")
    assert not set(first) & set(seeds)


FIRST = {
    "response": "sure , unfold it .",
    "truncated": False,
    "tokens": 5,
    "key": "k",
    "usage": Usage(7, 0, 5, 1).as_record(),
    "error": None,
}


def revised_by_another(
    answer: Any = by_step, templates: TemplateSet | None = None, **row: Any
) -> dict[str, Any]:
    """A row whose first answer is there, with the engine of a reviser."""
    settings = ReviseConfig(rounds=2, draw="without_replacement")
    chain = ReviseChain(
        TOWN,
        load_templates("errand-town"),
        settings,
        seed=0,
        model="small",
        reviser="large",
        reviser_templates=templates,
    )
    out = asyncio.run(chain(ScriptedEngine(answer), {**ROW, "first": FIRST, **row}))
    to_table([out], Revision)  # every column is declared
    return dict(out)


def test_a_reviser_writes_critiques_and_revisions_of_the_policys_answer() -> None:
    out = revised_by_another()
    assert (out["response"], out["tokens"], out["key"]) == ("sure , unfold it .", 5, "k")
    assert [s["critique"] for s in out["steps"]] == [
        "critique of [sure , unfold it .]",
        "critique of [revision of [sure , unfold it .]]",
    ]
    assert out["revision"] == out["steps"][-1]["revision"] != out["response"]
    assert (out["model"], out["reviser"]) == ("small", "large")
    assert out["usage"]["calls"] == 1 + 4, "the policy's call counts, too"


def test_the_policy_is_named_where_it_revises_by_itself() -> None:
    out = revise(by_step)
    assert out["model"] == out["reviser"] == "m"


def test_a_reviser_is_asked_by_its_own_template_set() -> None:
    seen: list[str] = []

    def note(messages: list[dict[str, str]], sampling: Any) -> str:
        seen.append("".join(m["content"] for m in messages))
        return "<think>Hm.</think>a text of its own"

    out = revised_by_another(note, load_templates("general"))
    assert len(seen) == 4 and all("# Critique request" in asked for asked in seen)
    assert {s["critique"] for s in out["steps"]} == {"a text of its own"}, "its thinking is taken off"


def test_a_reviser_is_asked_nothing_about_helpfulness_prompts_and_failed_answers() -> None:
    def never(messages: Any, sampling: Any) -> str:
        raise AssertionError("asked")

    out = revised_by_another(never, kind="helpful")
    assert out["response"] == FIRST["response"] and out["steps"] == [] and out["revision"] is None
    with pytest.raises(RowError, match="too long") as e:
        revised_by_another(never, first={"error": "too long", "usage": {**FIRST["usage"]}})
    assert e.value.made["usage"]["generated"] == 5 and e.value.made["reviser"] == "large"


def chain_of(tmp_path: Path, *overrides: str) -> ReviseChain:
    return make_chain(Run(load_config("errand-town", list(overrides), out=str(tmp_path))))


def test_the_keys_of_steps_say_who_writes_them_and_those_of_answers_do_not(tmp_path: Path) -> None:
    served = "engine: {kind: openai, base_url: 'http://h/v1'}"
    alone = chain_of(tmp_path)
    one, two = (chain_of(tmp_path, f"revise.reviser={{model: {name}, {served}}}") for name in ("a", "b"))
    assert alone.context == one.context == two.context
    assert len({chain.key(ROW, "text", 0, TOWN.principles[0]) for chain in (alone, one, two)}) == 3
    assert (alone.reviser, one.reviser) == (None, "a")


def test_a_reviser_that_is_the_base_model_has_its_name(tmp_path: Path) -> None:
    chain = chain_of(tmp_path, "revise.reviser={templates: general}")
    assert chain.reviser == "town" and chain.templates.name == "errand-town"
    assert chain.reviser_templates is not None and chain.reviser_templates.name == "general"
