"""What an edit does not reach is not asked again, and what is taken over is what would have come out."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cai_ray import constitution
from cai_ray.cluster.usage import Usage
from cai_ray.config.generation import ReviseConfig
from cai_ray.config.judge import JudgeConfig
from cai_ray.config.load import load_config
from cai_ray.constitution import Constitution
from cai_ray.engine.scripted import ScriptedEngine
from cai_ray.errors import InputError
from cai_ray.generate import label, reuse, revise
from cai_ray.generate.journal import Journal, begin
from cai_ray.generate.label import LabelChain
from cai_ray.generate.revise import ReviseChain
from cai_ray.prompts.load import load_templates
from cai_ray.storage import files, tables
from cai_ray.storage.arrow import to_table
from cai_ray.storage.records import Label, Revision, derive_id
from cai_ray.storage.run import Run
from cai_ray.storage.tables import has_rows, write_table
from cai_ray.studies import edit_cost

TOWN, TEMPLATES = constitution.load("errand-town"), load_templates("errand-town")
MESSAGES = [{"role": "user", "content": "how do i read the baker's diary ?"}]
PAIR = {"id": "c1", "messages": MESSAGES, "response_a": "sorry , no .", "response_b": "sure , yes ."}
PROMPT = {"id": "r1", "prompt_id": "p1", "messages": MESSAGES, "kind": "red_team", "family": "privacy"}
ENGINE = ScriptedEngine(
    answer=lambda messages, sampling: derive_id(messages),  # each says something of its own
    weigh=lambda messages, options: [-1.0, -float(len(messages[-1]["content"]))],
)


def edited(document: Constitution, principle: str, **fields: Any) -> Constitution:
    changed = tuple(p.model_copy(update=fields) if p.id == principle else p for p in document.principles)
    return document.model_copy(update={"principles": changed})


def votes(document: Constitution, before: Any = None, **fields: Any) -> dict[str, Any]:
    chain = LabelChain(document, TEMPLATES, JudgeConfig(principles="all"), seed=0, context="x")
    row = {**PAIR, **fields} | ({} if before is None else {"earlier": [before]})
    return asyncio.run(chain(ENGINE, row))


def steps(document: Constitution, before: Any = None, **fields: Any) -> dict[str, Any]:
    chain = ReviseChain(document, TEMPLATES, ReviseConfig(draw="without_replacement"), 0, "m", context="x")
    row = {**PROMPT, **fields} | ({} if before is None else {"earlier": [before]})
    return asyncio.run(chain(ENGINE, row))


def earlier_votes(row: dict[str, Any]) -> dict[str, Any]:
    return reuse.by_key(vote for earlier in row.get("earlier", ()) for vote in earlier["votes"])


def plain(row: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if k not in ("usage", "earlier")}


def test_an_edit_asks_for_the_votes_of_its_principle_alone() -> None:
    first = votes(TOWN)
    assert first["usage"]["calls"] == 2 * len(TOWN.principles)
    after = edited(TOWN, "privacy", comparison="which answer is kinder ?")
    again = votes(after, first)
    assert again["usage"]["calls"] == 2
    assert plain(again) == plain(votes(after))
    assert votes(TOWN, again)["usage"]["calls"] == 2, "an edit taken back is an edit"


@pytest.mark.parametrize(
    "fields",
    [
        {"title": "another"},
        {"weight": 2.0},
        {"source": "elsewhere"},
        {"critique_request": "is it wrong ?"},
        {"enabled": False},
    ],
)
def test_votes_do_not_depend_on_what_they_are_not_asked_by(fields: dict[str, Any]) -> None:
    after = edited(TOWN, "privacy", **fields)
    again = votes(after, votes(TOWN))
    assert again["usage"]["calls"] == 0
    assert plain(again) == plain(votes(after))


@pytest.mark.parametrize("fields", [{"response_a": "no ."}, {"messages": MESSAGES * 3}])
def test_votes_on_something_else_are_asked_for(fields: dict[str, Any]) -> None:
    assert votes(TOWN, votes(TOWN), **fields)["usage"]["calls"] == 2 * len(TOWN.principles)


def test_a_principle_that_asks_for_the_worse_response_is_another() -> None:
    assert votes(edited(TOWN, "privacy", form="negative"), votes(TOWN))["usage"]["calls"] == 2


def test_steps_before_the_edit_are_taken_over_and_those_after_it_are_new() -> None:
    first = steps(TOWN)
    assert first["usage"]["calls"] == 1 + 2 * 4
    third = first["steps"][2]["principle_id"]
    after = edited(TOWN, third, revision_request="now write it again .")
    again = steps(after, first)
    assert again["usage"]["calls"] == 2 * 2
    assert plain(again) == plain(steps(after))
    assert [s["revision"] for s in again["steps"][:2]] == [s["revision"] for s in first["steps"][:2]]


def test_a_principle_that_is_off_leaves_the_steps_before_its_slot() -> None:
    first = steps(TOWN)
    after = TOWN.without([first["steps"][1]["principle_id"]])
    again = steps(after, first)
    assert again["usage"]["calls"] == 2 * 2
    assert plain(again) == plain(steps(after))


def test_an_answer_that_is_only_answered_is_taken_over_with_its_flags() -> None:
    first = {**steps(TOWN, kind="helpful"), "truncated": True}
    again = steps(TOWN, first, kind="helpful")
    assert again["usage"] == Usage()._asdict() and again["truncated"] is True
    assert steps(TOWN, first, kind="helpful", messages=MESSAGES * 3)["usage"]["calls"] == 1


def run_in(out: Path, *settings: str) -> Run:
    return Run(load_config("errand-town", ["label.gold=null", *settings], out=str(out)))


@pytest.mark.parametrize(
    "setting", ["label.judge.combine=mean", "label.judge.clamp=null", "label.judge.principles=2"]
)
def test_how_votes_are_counted_is_no_part_of_a_vote(tmp_path: Path, setting: str) -> None:
    assert label.make_chain(run_in(tmp_path, setting)).context == label.make_chain(run_in(tmp_path)).context


@pytest.mark.parametrize(
    "setting", ["label.judge.both_orders=false", "seed=1", "label.judge.model=sl", "templates=general"]
)
def test_how_a_vote_is_asked_for_is_part_of_it(tmp_path: Path, setting: str) -> None:
    assert label.make_chain(run_in(tmp_path, setting)).context != label.make_chain(run_in(tmp_path)).context


@pytest.mark.parametrize("setting", ["revise.rounds=2", "revise.limit=5", "engine.max_num_seqs=4"])
def test_how_many_steps_there_are_is_no_part_of_a_step(tmp_path: Path, setting: str) -> None:
    assert revise.make_chain(run_in(tmp_path, setting)).context == revise.make_chain(run_in(tmp_path)).context


@pytest.mark.parametrize("setting", ["revise.temperature=0.5", "revise.max_tokens=9", "thinking=keep"])
def test_how_a_step_is_sampled_is_part_of_it(tmp_path: Path, setting: str) -> None:
    assert revise.make_chain(run_in(tmp_path, setting)).context != revise.make_chain(run_in(tmp_path)).context


def test_rows_are_set_aside_whoever_wrote_them_and_until_the_stage_is_done(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    run.write_rows("label", to_table([votes(TOWN)], Label))
    files.write_json(run.path("label", "manifest.json"), {"inputs": {}})
    files.write_json(run.path("label", "certificate.json"), {"n": 1})
    reuse.set_aside(run, "label")
    assert run.manifest("label") is None and not files.exists(run.path("label", "certificate.json"))
    begin(run, "label", {"constitution": "1"})
    Journal(run, "label", label.LabelTask, Label, "part").write([{**votes(TOWN), "id": "c2"}])
    begin(run, "label", {"constitution": "1"})  # goes on
    assert Journal(run, "label", label.LabelTask, Label, "part").finished_ids() == {"c2"}
    begin(run, "label", {"constitution": "2"})  # another edit, before the first was done
    assert not Journal(run, "label", label.LabelTask, Label, "part").finished_ids()
    rows = [{**PAIR, "id": name} for name in ("c1", "c2", "c3")]
    found = list(reuse.with_earlier(run, "label", rows))
    assert [len(earlier_votes(row)) for row in found] == [5, 5, 0]
    assert not has_rows(run.path("label"))


def test_rows_of_a_version_without_keys_are_left_alone(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    old = to_table([steps(TOWN)], Revision).drop_columns(["key"])
    write_table(run.path("revise", reuse.FOLDER, "part-0.parquet"), old)
    (row,) = reuse.with_earlier(run, "revise", [PROMPT])
    (earlier,) = row["earlier"]
    assert reuse.by_key([earlier]) == {} and reuse.by_key(earlier["steps"]) != {}, (
        "steps had keys; the response is asked for"
    )


def test_predecessors_are_found_pass_by_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reuse, "CHUNK", 2)
    run = run_in(tmp_path)
    ids = [f"c{i}" for i in range(5)]
    write_table(
        run.path("label", reuse.FOLDER, "part-0.parquet"),
        to_table([{**votes(TOWN), "id": name} for name in ids[1:]], Label),
    )
    found = list(reuse.with_earlier(run, "label", ({**PAIR, "id": name} for name in ids)))
    assert [row["id"] for row in found] == ids
    assert [len(earlier_votes(row)) for row in found] == [0, 5, 5, 5, 5]


def test_a_file_of_earlier_rows_is_read_for_the_tasks_among_its_ids_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise every file would be read for every few tasks, and the time would be quadratic in the rows."""
    reads: list[str] = []

    def iter_file(fs: Any, path: str, columns: list[str]) -> Any:
        if columns != ["id"]:
            reads.append(path.rsplit("/", 1)[1])
        return tables.iter_file(fs, path, columns)

    monkeypatch.setattr(reuse, "CHUNK", 2)
    monkeypatch.setattr(reuse, "iter_file", iter_file)
    run = run_in(tmp_path)
    ids = [f"c{i}" for i in range(8)]
    for number in range(4):
        rows = [{**votes(TOWN), "id": name} for name in ids[2 * number : 2 * number + 2]]
        write_table(run.path("label", reuse.FOLDER, f"part-{number}.parquet"), to_table(rows, Label))
    found = list(reuse.with_earlier(run, "label", [{**PAIR, "id": name} for name in reversed(ids)]))
    assert [row["id"] for row in found] == ids
    assert [len(earlier_votes(row)) for row in found] == [5] * 8
    assert sorted(reads) == [f"part-{number}.parquet" for number in range(4)]


def test_another_runs_rows_are_borrowed_once(tmp_path: Path) -> None:
    full, less = run_in(tmp_path / "full"), run_in(tmp_path / "less")
    full.write_rows("label", to_table([votes(TOWN)], Label))
    reuse.borrow(less, full, "label")
    (row,) = reuse.with_earlier(less, "label", [PAIR])
    assert len(earlier_votes(row)) == 5
    files.write_json(less.path("sft", "manifest.json"), {"inputs": {}})
    files.delete(full.path("label"))
    reuse.borrow(less, full, "label")
    assert list(reuse.with_earlier(less, "label", [PAIR])) == [row]


def test_what_an_edit_costs_is_foretold(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    revising, labelling = revise.make_chain(run), label.make_chain(run)
    todo = [{**PROMPT, "id": f"r{i}"} for i in range(20)] + [{**PROMPT, "id": "h", "kind": "helpful"}]
    pairs = [{**PAIR, "id": f"c{i}", "response_a": f"{i} ."} for i in range(10)]
    made = [asyncio.run(revising(ENGINE, row)) for row in todo]
    voted = [asyncio.run(labelling(ENGINE, row)) for row in pairs]
    run.write_rows("revise", to_table(made, Revision))
    run.write_rows("label", to_table(voted, Label))
    for stage, rows in (("revise", 21), ("sft", 0), ("compare", 10), ("label", 10), ("rm", 0)):
        files.write_json(run.path(stage, "manifest.json"), {"seconds": 7.0, "rows_out": rows})

    after = edited(TOWN, "privacy", revision_request="now write it again .", comparison="which is kinder ?")
    found = edit_cost.cost(run, after)
    again, kept = ({row["stage"]: row for row in found[way]} for way in ("again", "kept"))
    spent = [
        asyncio.run(replace(chain, constitution=after)(ENGINE, {**row, "earlier": [old]}))
        for chain, rows, olds in ((revising, todo, made), (labelling, pairs, voted))
        for row, old in zip(rows, olds, strict=True)
    ]
    calls = [row["usage"]["calls"] for row in spent]
    assert 0 < again["revise"]["calls"] == sum(calls[:21]) < again["revise"]["all_calls"] == 20 * 9 + 1
    assert kept["label"]["calls"] == sum(calls[21:]) == 20
    assert again["label"]["calls"] == again["label"]["all_calls"] == 100
    assert (again["compare"]["calls"], kept["compare"]["calls"]) == (20, 0)
    assert [row["stage"] for row in found["kept"] if row["seconds"] is not None] == ["label", "rm"]
    assert all(row["seconds"] == 7.0 for row in found["again"])

    last = made[0]["steps"][-1]["principle_id"]
    off = {row["stage"]: row for row in edit_cost.cost(run, TOWN.without([last]))["again"]}
    assert off["sft"]["seconds"] == 7.0, (
        "a step that is left out costs no call, and changes what is trained on"
    )

    same = edit_cost.cost(run, edited(TOWN, "privacy", source="elsewhere"))
    assert all(row["seconds"] is None and not row["calls"] for row in same["again"])


def test_without_turns_principles_off_and_names_one_that_is_not_there() -> None:
    less = TOWN.without(["privacy"])
    assert [p.id for p in less.enabled] == ["property", "safety", "honesty", "respect"]
    assert [p.sha for p in less.principles] == [p.sha for p in TOWN.principles]
    with pytest.raises(InputError, match="without privavy: constitution errand-town has no such principle"):
        TOWN.without(["privavy"])
    with pytest.raises(InputError, match="no principle of errand-town is left"):
        TOWN.without([p.id for p in TOWN.principles])
