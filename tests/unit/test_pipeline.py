"""Stages, manifests and resuming, with stages that only count: docs/method.md item 38."""

import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cai_ray import pipeline
from cai_ray.config.load import find_config, load_config
from cai_ray.config.run import RunConfig
from cai_ray.data.left_out import LeftOut
from cai_ray.data.training import training_comparisons, training_prompts
from cai_ray.errors import InputError, Stopped
from cai_ray.provenance.inputs import inputs
from cai_ray.provenance.status import status
from cai_ray.stages import STAGES, stages_of
from cai_ray.storage import files
from cai_ray.storage import hub as hub_module
from cai_ray.storage.arrow import to_table
from cai_ray.storage.records import Revision, SftRow
from cai_ray.storage.run import Run, open_run
from cai_ray.storage.tables import write_table
from tests.hub import Hub

CALLS: list[str] = []


@pytest.fixture(autouse=True)
def stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages `revise` and `sft` write one file. Their checks, and the other stages, are the real ones."""
    CALLS.clear()
    for name, needs, reads in (
        ("revise", (), ("revise", "prompts", "model", "templates", "constitution")),
        ("sft", ("revise",), ("sft",)),
    ):
        module = ModuleType(f"counting_{name}")

        def run(run: Run, name: str = name) -> dict[str, Any]:
            CALLS.append(name)
            files.write_bytes(run.path(name, "result"), b"x")
            return {"rows_out": 1}

        module.run = run  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        counting = {"module": module.__name__, "kind": "reads", "needs": needs, "reads": reads}
        monkeypatch.setitem(STAGES, name, STAGES[name]._replace(**counting))


def load(out: Path, *overrides: str) -> RunConfig:
    return load_config("errand-town", list(overrides), out=str(out))


def go(out: Path, *overrides: str, stages: tuple[str, ...] = ("revise", "sft"), **options: Any) -> Run:
    return pipeline.run_stages(load(out, *overrides), stages, say=lambda _: None, **options)


def test_a_completed_stage_is_skipped(tmp_path: Path) -> None:
    go(tmp_path, stages=("revise",))
    go(tmp_path)
    go(tmp_path)
    assert CALLS == ["revise", "sft"]
    states = status(open_run(str(tmp_path)))
    assert [(s["stage"], s["state"]) for s in states] == [("revise", "done"), ("sft", "done")] + [
        (name, "missing") for name in stages_of("ppo")[2:]
    ]


def test_a_stage_that_is_kept_stays_and_those_after_it_say_so(tmp_path: Path) -> None:
    go(tmp_path)
    go(tmp_path, "without=[privacy]", "sft.epochs=1", overwrite=True, keep=["revise"])
    assert CALLS == ["revise", "sft", "sft"]
    run = open_run(str(tmp_path))
    sft = run.manifest("sft")
    assert sft and sft["kept"] == {"revise": ["constitution"]}
    same = "revise was made with other inputs: constitution changed"
    with pytest.raises(InputError, match=same):  # kept once is not kept for ever
        go(tmp_path, "without=[privacy]", "sft.epochs=1")


def test_a_stage_made_again_with_the_same_rows_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An edit that no row meets leaves what was made of the rows as it is."""
    said = {"revision": "sorry"}

    def run(run: Run) -> dict[str, Any]:
        CALLS.append("revise")
        row = {
            "id": "r1",
            "usage": {"calls": len(CALLS)},
            "constitution_sha": run.config.document.sha,
            **said,
        }
        run.write_rows("revise", to_table([row], Revision))
        return {"rows_out": 1}

    monkeypatch.setattr(sys.modules["counting_revise"], "run", run)
    go(tmp_path)
    go(tmp_path, "without=[privacy]", overwrite=True)
    assert CALLS == ["revise", "sft", "revise"]
    said["revision"] = "no"
    go(tmp_path, "without=[safety]", overwrite=True)
    assert CALLS == ["revise", "sft", "revise", "revise", "sft"]


def test_what_is_not_complete_cannot_be_kept(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--keep sft: it is not complete"):
        go(tmp_path, keep=["sft"])
    assert not CALLS


def test_the_manifest_is_written_last_and_leftovers_are_cleared(tmp_path: Path) -> None:
    (tmp_path / "revise").mkdir()
    (tmp_path / "revise" / "part-leftover.parquet").write_text("half a file")
    run = go(tmp_path, stages=("revise",))
    assert not (tmp_path / "revise" / "part-leftover.parquet").exists()
    manifest = run.manifest("revise")
    assert (
        manifest
        and manifest["rows_out"] == 1
        and set(manifest["inputs"]) >= {"model", "prompts", "constitution"}
    )


def test_other_inputs_say_what_changed_and_lose_nothing(tmp_path: Path) -> None:
    go(tmp_path)
    with pytest.raises(
        InputError, match=r"revise was made with other inputs: revise changed \(revise.rounds: 4 → 3\)"
    ):
        go(tmp_path, "revise.rounds=3")
    assert CALLS == ["revise", "sft"] and files.exists(tmp_path / "revise" / "manifest.json")
    go(tmp_path, "revise.rounds=3", overwrite=True)
    assert CALLS == ["revise", "sft"] * 2, "what depends on it is made again too"


def test_a_later_stage_alone_is_made_again(tmp_path: Path) -> None:
    go(tmp_path)
    go(tmp_path, "sft.epochs=2", overwrite=True)
    assert CALLS == ["revise", "sft", "sft"]


def test_how_a_stage_is_run_does_not_change_what_it_is(tmp_path: Path) -> None:
    go(tmp_path)
    go(tmp_path, "sft.workers=2", "sft.micro_batch_tokens=99")
    assert CALLS == ["revise", "sft"]


def test_a_stage_needs_those_before_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="sft needs revise, which is not complete"):
        go(tmp_path, stages=("sft",))


def test_force_makes_a_done_stage_again(tmp_path: Path) -> None:
    go(tmp_path)
    go(tmp_path, stages=("sft",), force=True)
    assert CALLS == ["revise", "sft", "sft"]


def test_a_new_constitution_is_a_change(tmp_path: Path) -> None:
    go(tmp_path)
    document = Path(find_config("errand-town.yaml")).parent.parent / "constitutions" / "errand-town.yaml"
    mine = tmp_path / "mine.yaml"
    mine.write_text(document.read_text().replace("no snooping .", "no peeping .", 1))
    with pytest.raises(InputError, match="constitution changed"):
        go(tmp_path, f"constitution={mine}")


def test_an_edited_template_set_is_a_change(tmp_path: Path) -> None:
    shipped = Path(find_config("errand-town.yaml")).parent.parent / "templates" / "errand-town.yaml"
    mine = tmp_path / "mine.yaml"
    mine.write_text(shipped.read_text())
    go(tmp_path, f"templates={mine}")
    mine.write_text(shipped.read_text() + "\n# a remark changes nothing\n")
    go(tmp_path, f"templates={mine}")
    mine.write_text(
        shipped.read_text().replace(
            '{role: user, content: "{comparison}"}', '{role: user, content: "rule : {comparison}"}'
        )
    )
    with pytest.raises(InputError, match="templates changed"):
        go(tmp_path, f"templates={mine}")


def test_a_run_directory_holds_one_configuration(tmp_path: Path) -> None:
    """What a command does not touch must agree too, or run.json and the constitution beside it would not be its own."""
    go(tmp_path)
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(InputError, match=r"sft changed \(sft\.epochs"):
        go(tmp_path, "sft.epochs=3", stages=("revise",))
    assert (tmp_path / "run.json").read_bytes() == before
    # A later stage that waits to be made again is no other configuration.
    pipeline.run_stages(load(tmp_path), ["revise"], say=lambda _: None, force=True)
    go(tmp_path, stages=("revise",))
    with pytest.raises(InputError, match="sft was made with other inputs: revise changed"):
        go(tmp_path)


def test_a_stage_is_kept_until_the_cluster_can_make_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go(tmp_path)
    for name in ("revise", "sft"):
        monkeypatch.setitem(STAGES, name, STAGES[name]._replace(kind="generates"))

    def connect(config: RunConfig) -> None:
        raise InputError("no cluster answers there")

    monkeypatch.setattr("cai_ray.cluster.connect.connect", connect)
    with pytest.raises(InputError, match="no cluster"):
        go(tmp_path, stages=("sft",), overwrite=True, force=True)
    assert (tmp_path / "sft" / "manifest.json").exists()


def test_a_stopped_stage_is_not_begun_again_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = tmp_path / "sft" / "journal" / "part" / "done-1.parquet"

    def stop(run: Run) -> dict[str, Any]:
        write_table(str(finished), to_table([], SftRow))
        raise Stopped("by the user")

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["counting_sft"], "run", stop)
        with pytest.raises(Stopped):
            go(tmp_path)
    with pytest.raises(
        InputError, match=r"sft is not complete, .* sft changed \(sft\.epochs: \d → 2\); set it back"
    ):
        go(tmp_path, "sft.epochs=2")
    # What the stage reads is made before it: it is checked when its turn comes.
    files.delete(tmp_path / "revise")
    with pytest.raises(InputError, match=r"sft is not complete, .* revise changed; set it back"):
        go(tmp_path)
    assert finished.exists() and CALLS == ["revise", "revise"]
    go(tmp_path, overwrite=True)
    assert CALLS == ["revise", "revise", "sft"]
    assert not finished.exists() and not (tmp_path / "sft" / "attempt.json").exists()


def test_a_check_leaves_no_directory_behind(tmp_path: Path) -> None:
    pipeline.check_inputs(load(tmp_path / "new"))
    assert not (tmp_path / "new").exists()
    with pytest.raises(InputError, match="revise"):
        pipeline.check_run(Run(load(tmp_path / "new")), ["sft"], overwrite=False)


def test_the_run_keeps_its_configuration_and_constitution(tmp_path: Path) -> None:
    go(tmp_path, "seed=7")
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["seed"] == 7 and record["versions"]["python"]
    assert (tmp_path / "constitution.yaml").exists()


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model=/nowhere", "no such folder"),
        ("constitution=/nowhere.yaml", "no such file"),
        ("templates=nowhere", "template set nowhere"),
        ("prompts=[{path: /nowhere.jsonl, kind: helpful}]", "no such file"),
        ("out=/proc/nowhere", "cannot be written"),
        ("evaluate.prompts=[{path: 'town:revise'}]", "also a training prompt"),
        ("prompts=[{path: 'town:dev'}]", "all 600 rows have split 'dev'"),
        ("label.gold=town:nosuch", "no such data"),
        ("label.gold=/nowhere.jsonl", "no such file"),
        ("label.gold=town:human", "gold"),
        ("label.judge.model=/nowhere", "no such folder"),
        ("label.judge.answer=reasoned", "template set errand-town has no reasoning"),
        ("rm.init=/nowhere", "no such folder"),
        ("revise.reviser.model=/nowhere", "no such folder"),
        ("revise.reviser.templates=nowhere", "template set nowhere"),
    ],
)
def test_item_38_what_is_wrong_is_said_before_any_work(tmp_path: Path, override: str, says: str) -> None:
    config = load_config("errand-town", [override], out=None if override.startswith("out") else str(tmp_path))
    with pytest.raises(InputError, match=says):
        pipeline.run_stages(config, ["revise"], say=lambda _: None)
    assert CALLS == []


def test_a_method_has_its_own_stages_and_reads_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = ["revise", "sft", "compare", "label"]
    for method, own in (("ppo", ["rm", "ppo"]), ("dpo", ["dpo"])):
        run = Run(load(tmp_path, f"method={method}"))
        assert stages_of(run.config.method) == [*shared, *own, "evaluate", "report"]
        assert [s["stage"] for s in status(run)] == stages_of(run.config.method)
        assert run.locate("rl") == run.path(method, "model")
        for stage in [*shared, *own]:
            files.write_json(run.path(stage, "manifest.json"), {"id": f"{method} {stage}", "inputs": {}})
        read = inputs(run, "evaluate")
        assert {k: read[k] for k in STAGES if k in read and k != "evaluate"} == {
            s: f"{method} {s}" for s in ["sft", "label", *own]
        }
    with pytest.raises(InputError, match=r"ppo is not a stage of method=dpo; set method=ppo"):
        pipeline.check_inputs(run.config, ["ppo"])
    with pytest.raises(InputError, match=r"dpo is not a stage of method=ppo; set method=dpo"):
        pipeline.check_inputs(load(tmp_path), ["dpo"])
    with pytest.raises(InputError, match=r"best_of=4 chooses by a reward model, and method=dpo trains none"):
        load(tmp_path, "method=dpo", "evaluate.best_of=4")


@pytest.mark.parametrize("method", ["rm", "dpo"])
def test_item_10_human_comparisons_of_each_method(tmp_path: Path, method: str) -> None:
    (tmp_path / "held.jsonl").write_text('{"prompt": "how do i rest ?"}')
    (tmp_path / "human.jsonl").write_text('{"prompt": "How do I rest ?", "chosen": "lie", "rejected": "run"}')
    held = f"evaluate.prompts=[{{path: {tmp_path / 'held.jsonl'}, kind: helpful}}]"
    human = f"{method}.human=[{{path: {tmp_path / 'human.jsonl'}}}]"
    which = f"method={'dpo' if method == 'dpo' else 'ppo'}"
    with pytest.raises(InputError, match="also a training prompt"):
        pipeline.check_inputs(load(tmp_path, which, held, "evaluate.gold=null", human))


def test_layers_on_several_gpus_are_not_for_rollouts(tmp_path: Path) -> None:
    config = load_config(
        "errand-town", ["engine.pipeline_parallel=2", "engine.device=gpu"], out=str(tmp_path)
    )
    pipeline.check_inputs(config, ["revise", "label"])
    with pytest.raises(InputError, match="pipeline_parallel=2: PPO sends its weights to engines that hold"):
        pipeline.check_inputs(config, ["ppo"])
    on_cpu = load_config(
        "errand-town", ["engine.pipeline_parallel=2", "engine.device=cpu"], out=str(tmp_path)
    )
    with pytest.raises(InputError, match="pipeline_parallel=2: vLLM splits layers over GPUs only"):
        pipeline.check_inputs(on_cpu, ["revise"])


@pytest.mark.parametrize(("device", "way"), [("cpu", "nccl"), ("gpu", "gloo")])
def test_a_way_for_weights_that_the_device_does_not_have(tmp_path: Path, device: str, way: str) -> None:
    changes = [f"ppo.weight_sync={way}", f"engine.device={device}"]
    config = load_config("errand-town", changes, out=str(tmp_path))
    with pytest.raises(InputError, match=f"weight_sync={way}: nccl is for GPUs and gloo for CPUs"):
        pipeline.check_inputs(config, ["ppo"])


@pytest.mark.parametrize(
    "engine",
    [
        "engine.block_size=16",
        "label.judge.engine={block_size: 48}",
        "revise.reviser={engine: {block_size: 48}}",
    ],
)
def test_a_block_size_that_vllm_refuses_on_cpu(tmp_path: Path, engine: str) -> None:
    config = load_config("errand-town", ["engine.device=cpu", engine], out=str(tmp_path))
    with pytest.raises(InputError, match="on CPU vLLM takes multiples of 32"):
        pipeline.check_inputs(config, ["revise"])


@pytest.mark.parametrize("stage", ["compare", "ppo"])
def test_item_10_prompts_of_one_stage_are_training_prompts(tmp_path: Path, stage: str) -> None:
    (tmp_path / "own.jsonl").write_text('{"prompt": "how do i rest ?"}')
    same = f"prompts=[{{path: {tmp_path / 'own.jsonl'}, kind: helpful}}]"
    with pytest.raises(InputError, match="also a training prompt"):
        pipeline.check_inputs(load(tmp_path, f"{stage}.{same}", f"evaluate.{same}"))


def test_item_10_human_comparisons_are_training_prompts(tmp_path: Path) -> None:
    (tmp_path / "held.jsonl").write_text('{"prompt": "how do i rest ?"}')
    (tmp_path / "human.jsonl").write_text('{"prompt": "How do I rest ?", "chosen": "lie", "rejected": "run"}')
    held = f"evaluate.prompts=[{{path: {tmp_path / 'held.jsonl'}, kind: helpful}}]"
    human = f"rm.human=[{{path: {tmp_path / 'human.jsonl'}}}]"
    judge = "evaluate.gold=null"
    pipeline.check_inputs(load(tmp_path, held, judge))
    with pytest.raises(InputError, match="also a training prompt"):
        pipeline.check_inputs(load(tmp_path, held, judge, human))
    with pytest.raises(InputError, match="is not a request of Errand Town"):
        pipeline.check_inputs(load(tmp_path, held))


def overlapping(folder: Path) -> list[str]:
    """Settings of a run with a held-out prompt in its prompts, comparisons and a set; each has one that is not."""
    (folder / "held.jsonl").write_text('{"prompt": "how do i rest ?"}\n{"prompt": "where do i rest ?"}\n')
    rows = [
        {"prompt": text, "kind": "helpful"} for text in ("How do I rest ?", "how do i fly ?", "who is safe ?")
    ]
    (folder / "own.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    pairs = [{"prompt": r["prompt"], "chosen": "lie", "rejected": "run"} for r in rows[:2]]
    (folder / "human.jsonl").write_text("".join(json.dumps(r) + "\n" for r in pairs))
    (folder / "set.jsonl").write_text('{"prompt": "Who is safe ?"}\n')
    return [
        f"prompts=[{{path: {folder / 'own.jsonl'}}}]",
        f"rm.human=[{{path: {folder / 'human.jsonl'}}}]",
        "compare.prompts=[]",
        "ppo.prompts=[]",
        "ppo.watch.every=0",
        "evaluate.gold=null",
        f"evaluate.prompts=[{{path: {folder / 'held.jsonl'}, kind: helpful}}]",
        f"evaluate.sets=[{{name: s, path: {folder / 'set.jsonl'}, kind: refusals, expect: comply}}]",
    ]


def test_item_10_overlapping_prompts_can_be_left_out_of_training(tmp_path: Path) -> None:
    settings = overlapping(tmp_path)
    with pytest.raises(
        InputError, match=r"'how do i rest \?' is also a training prompt; .* evaluate\.overlap=drop"
    ):
        pipeline.check_inputs(load(tmp_path / "run", *settings))
    said: list[str] = []
    config = load(tmp_path / "run", *settings, "evaluate.overlap=drop")
    pipeline.check_inputs(config, say=said.append)
    assert said == [
        f"{what}: {n} rows are held out as well, and left out of training (evaluate.overlap=drop)"
        for what, n in (("prompts", 2), (str(tmp_path / "human.jsonl"), 1))
    ]
    left_out = LeftOut()
    (prompt,) = training_prompts(config, left_out=left_out)
    (pair,) = training_comparisons(config, config.rm.human[0], left_out)
    assert prompt["messages"] == pair["messages"] == [{"role": "user", "content": "how do i fly ?"}]
    assert left_out == Counter(held_out=3)


def test_what_is_held_out_is_an_input_of_training_where_it_is_left_out(tmp_path: Path) -> None:
    settings = overlapping(tmp_path)
    stop = inputs(Run(load(tmp_path / "run", *settings)), "revise")
    drop = inputs(Run(load(tmp_path / "run", *settings, "evaluate.overlap=drop")), "revise")
    assert "held_out" not in stop and stop == {k: v for k, v in drop.items() if k != "held_out"}
    (tmp_path / "held.jsonl").write_text('{"prompt": "how do i fly ?"}')
    more = inputs(Run(load(tmp_path / "run", *settings, "evaluate.overlap=drop")), "revise")
    assert [k for k in drop if drop[k] != more[k]] == ["held_out"]


def test_item_38_rows_that_are_left_out_are_told_before_any_work(tmp_path: Path) -> None:
    """By a run as by a check, and once, though several stages read the source."""
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": ""}\n{"messages": [{"role": "tool", "content": "b"}]}\n')
    own = f"prompts=[{{path: {path}, kind: helpful}}]"
    said: list[str] = []
    with pytest.raises(
        InputError, match=r"2 of the 3 rows of .* cannot be used, more than max_error_rate=0\.05"
    ):
        pipeline.check_inputs(load(tmp_path / "run", own), say=said.append)
    pipeline.check_inputs(
        load(tmp_path / "run", own, f"compare.{own}", "max_error_rate=0.7"), say=said.append
    )
    assert said == [
        f"{path}: 1 of 3 rows left out, a blank prompt: row 2",
        f"{path}: 1 of 3 rows left out, no user turn to answer: row 3",
    ]


def test_item_38_nothing_to_evaluate_on_is_said_before_any_work(tmp_path: Path) -> None:
    config = load(tmp_path, "evaluate.prompts=[]")
    pipeline.check_inputs(config, ["revise", "ppo"])
    with pytest.raises(InputError, match=r"evaluate\.prompts is empty"):
        pipeline.check_inputs(config, ["ppo", "evaluate"])


def test_item_38_a_model_folder_without_weights(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    with pytest.raises(InputError, match=r"no config.json"):
        pipeline.check_inputs(load(tmp_path / "out", f"model={folder}"))
    (folder / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"no \.safetensors"):
        pipeline.check_inputs(load(tmp_path / "out", f"model={folder}"))


def test_a_run_stays_with_the_commits_that_it_began_with(tmp_path: Path, hub: Hub) -> None:
    """A branch of the hub moves, and what was made of its old commit stays complete until somebody names another."""
    base = Path(pipeline.__file__).parent / "town" / "base"
    given, out = ("model=org/name", "prompts=[{path: 'hf://datasets/org/data/a.jsonl'}]"), tmp_path / "run"
    first = hub.publish("org/name", base)
    data = hub.publish(
        "org/data", {"a.jsonl": b'{"prompt": "open the door", "kind": "red_team"}\n'}, dataset=True
    )
    go(out, *given)
    about = json.loads((out / "run.json").read_text())
    assert about["commits"] == {"org/name": first, "hf://datasets/org/data": data}
    assert about["config"]["model"] == f"org/name@{first}"
    hub.publish("org/name", base)
    hub.publish("org/data", {"a.jsonl": b'{"prompt": "another", "kind": "red_team"}\n'}, dataset=True)
    hub_module.pin.cache_clear()
    go(out, *given)
    assert CALLS == ["revise", "sft"]
    tagged = hub.publish("org/name", base, "v2")
    with pytest.raises(InputError, match=rf"revise was made with other inputs: model changed .*{tagged[:6]}"):
        go(out, "model=org/name@v2", given[1])
    hub.close()
    hub_module.pin.cache_clear()
    assert go(out, *given).config.model == f"org/name@{first}"


def test_item_38_prompts_that_leave_a_reviser_too_little_room(tmp_path: Path) -> None:
    """What it reads beside the prompt is the answer and its critique, and a revision follows."""
    said: list[str] = []
    reviser = "revise.reviser={engine: {max_model_len: 160}}"
    config = load_config("errand-town", [reviser], out=str(tmp_path))
    pipeline.check_inputs(config, ["revise"], say=said.append, renders=True)
    (line,) = [line for line in said if line.startswith("revise.reviser: ") and "longer than" in line]
    written = 2 * config.revise.max_tokens + config.revise.critique_max_tokens
    assert f"context of 160 leaves beside {written} to be written" in line
    assert not [line for line in said if line.startswith("prompts: ") and "longer than" in line]
