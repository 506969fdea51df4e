"""What a changed setting does to a run: AUDIT E2. Manifests are real, checkpoints and rows are made up."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cai_ray import pipeline
from cai_ray.config.fingerprint import fingerprint, layout_settings, result_settings
from cai_ray.config.load import load_config
from cai_ray.config.run import RunConfig
from cai_ray.errors import InputError
from cai_ray.provenance.attempts import ATTEMPT, begin_attempt, check_attempt
from cai_ray.provenance.inputs import inputs, own_inputs
from cai_ray.stages import STAGES, needs_of, stages_that
from cai_ray.storage import files
from cai_ray.storage.arrow import to_table
from cai_ray.storage.records import Comparison, RolloutRow
from cai_ray.storage.run import Run
from cai_ray.storage.tables import write_table
from tests import tiny

# Changes of how a stage runs, each with what it takes for the setting to be allowed.
OPERATIONAL = [
    "sft.workers=2",
    "sft.micro_batch_tokens=99",
    "sft.gradient_checkpointing=true",
    "sft.checkpoint_every=3",
    "sft.keep_checkpoints=5",
    "sft.cpus_per_worker=2",
    "ppo.deadline_s=5",
    "ppo.max_logprob_gap=0.5",
    "ppo.rollout_engines=2",
    "ppo.weight_sync=gloo",
    "ppo.save_rollouts=0",
    "ppo.watch.on_alarm=stop",
    "ppo.watch.patience=7",
    "ppo.watch.max_refusals=null",
    "engine.timeout_s=9",
    "engine.max_num_seqs=3",
    "label.judge.engine={dtype: float32, kv_cache_mb: 99, max_model_len: 192}",
    "label.gates.max_ece=0.5",
    "sinks=[]",
    "max_error_rate=0.5",
    "ray.cpus=3",
    "budget.gpu_hours=1",
]
LAYOUT = ["sft.zero_stage=3", "sft.offload_optimizer=true", "sft.kernels=torch"]
RESULT = [
    ("sft.epochs=2", "sft", r"sft changed \(sft\.epochs: \d+ → 2\)"),
    ("sft.dtype=bfloat16", "sft", r'sft\.dtype: "float32" → "bfloat16"'),
    ("sft.lora.rank=4", "sft", r"sft\.lora: null → "),
    ("ppo.kl_coef=0.5", "ppo", r"ppo\.kl_coef: [\d.]+ → 0\.5"),
    ("ppo.watch.limit=3", "ppo", r"ppo\.watch\.limit: \d+ → 3"),
    ("seed=7", "rm", r"seed changed \(seed: 0 → 7\)"),
    ("label.judge.principles=1", "label", r'label\.judge\.principles: "all" → 1'),
    ("compare.temperature=0.5", "compare", r"compare\.temperature"),
    ("engine.quantization=fp8", "revise", r'engine\.quantization: null → "fp8"'),
    ("engine.dtype=bfloat16", "compare", r'engine\.dtype: "float32" → "bfloat16"'),
    ("engine.max_model_len=128", "ppo", r"engine\.max_model_len: 192 → 128"),
    ("engine.extra={kv_cache_dtype: fp8}", "revise", r"engine\.extra\.kv_cache_dtype: null → "),
    ("without=[privacy]", "revise", r'without: \[\] → \["privacy"\]'),
]


def load(out: Path, *overrides: str) -> RunConfig:
    return load_config("errand-town", list(overrides), out=str(out))


def stopped(out: Path, name: str, *overrides: str) -> Run:
    """A run whose stage was stopped: those before it are complete, and it has checkpoints or finished rows."""
    run = Run(load(out, *overrides))
    for need in needs_of(name, run.config.method):
        files.write_json(
            run.path(need, "manifest.json"), {"id": f"id of {need}", "inputs": {}, "seconds": 1.0}
        )
    begin_attempt(run, name, inputs(run, name))
    if STAGES[name].kind == "trains":
        files.write_bytes(run.path(name, "checkpoints", f"{name}-1", "checkpoint_0", "loop-0.pt"), b"state")
    else:
        write_table(run.path(name, "journal", "part", "done-1.parquet"), to_table([], Comparison))
    return run


def check(out: Path, name: str, *overrides: str, overwrite: bool = False) -> None:
    run = Run(load(out, *overrides))
    for need in needs_of(name, run.config.method):
        manifest = files.read_json(run.path(need, "manifest.json"))
        files.write_json(run.path(need, "manifest.json"), manifest | {"inputs": inputs_of(run, need)})
    pipeline.check_run(run, [name], overwrite)


def inputs_of(run: Run, name: str) -> dict[str, str]:
    return own_inputs(run, name) | {need: f"id of {need}" for need in needs_of(name, run.config.method)}


@pytest.mark.parametrize("override", OPERATIONAL)
def test_a_change_of_how_a_stage_runs_changes_no_input(tmp_path: Path, override: str) -> None:
    plain, changed = Run(load(tmp_path)), Run(load(tmp_path, override))
    assert plain.config != changed.config
    section = override.split(".")[0]
    for name in [section] if section in STAGES else ("revise", "sft", "evaluate"):
        assert own_inputs(changed, name) == own_inputs(plain, name), name


@pytest.mark.parametrize("override", LAYOUT)
def test_a_finished_stage_stays_finished_when_the_layout_of_checkpoints_changes(
    tmp_path: Path, override: str
) -> None:
    plain, changed = Run(load(tmp_path)), Run(load(tmp_path, override))
    assert own_inputs(changed, "sft") == own_inputs(plain, "sft")
    assert layout_settings(changed.config.sft) != layout_settings(plain.config.sft)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("sft", ["sft.gradient_checkpointing=true", "sft.workers=2", "sinks=[]"]),
        ("ppo", ["ppo.deadline_s=5", "ppo.save_rollouts=0", "engine.give_up_s=3"]),
        ("compare", ["engine.max_num_seqs=2", "max_error_rate=0.5"]),
    ],
)
def test_a_stopped_stage_goes_on_when_it_only_runs_otherwise(
    tmp_path: Path, name: str, overrides: list[str]
) -> None:
    stopped(tmp_path, name)
    check(tmp_path, name, *overrides)


@pytest.mark.parametrize(("override", "name", "says"), RESULT)
def test_a_stopped_stage_with_another_result_setting_is_one_line(
    tmp_path: Path, override: str, name: str, says: str
) -> None:
    stopped(tmp_path, name)
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    with pytest.raises(InputError, match=says) as told:
        check(tmp_path, name, override)
    assert "--overwrite" in str(told.value) and "\n" not in str(told.value)
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before, "nothing is deleted"
    check(tmp_path, name, override, overwrite=True)


@pytest.mark.parametrize("override", LAYOUT)
def test_checkpoints_of_another_layout_are_one_line(tmp_path: Path, override: str) -> None:
    stopped(tmp_path, "sft")
    key = override.split("=")[0]
    with pytest.raises(
        InputError, match=rf"its checkpoints were made with other settings \({key}: .* → .*\)"
    ):
        check(tmp_path, "sft", override)
    check(tmp_path, "sft")


def test_rollouts_are_work_too(tmp_path: Path) -> None:
    run = stopped(tmp_path, "ppo")
    shutil.rmtree(run.path("ppo", "checkpoints"))
    check(tmp_path, "ppo", "ppo.kl_coef=0.5")
    write_table(run.path("ppo", "part-00001.parquet"), to_table([], RolloutRow))
    with pytest.raises(InputError, match=r"ppo\.kl_coef"):
        check(tmp_path, "ppo", "ppo.kl_coef=0.5")


def test_an_attempt_that_made_nothing_is_forgotten(tmp_path: Path) -> None:
    """Ray Train writes its own notes before there is a checkpoint, and a stage its rows before it trains."""
    run = stopped(tmp_path, "sft")
    shutil.rmtree(run.path("sft", "checkpoints", "sft-1", "checkpoint_0"))
    files.write_bytes(run.path("sft", "checkpoints", "sft-1", "checkpoint_manager_snapshot.json"), b"{}")
    check(tmp_path, "sft", "sft.epochs=2")


def test_overwrite_removes_what_the_other_attempt_made(tmp_path: Path) -> None:
    stopped(tmp_path, "sft")
    again = Run(load(tmp_path, "sft.epochs=2"))
    begin_attempt(again, "sft", inputs(again, "sft"))
    assert [p.name for p in (tmp_path / "sft").iterdir()] == [ATTEMPT]
    same = Run(load(tmp_path, "sft.epochs=2", "sft.workers=2"))
    files.write_bytes(same.path("sft", "checkpoints", "sft-1", "checkpoint_0", "loop-0.pt"), b"state")
    begin_attempt(same, "sft", inputs(same, "sft"))
    assert files.exists(same.path("sft", "checkpoints", "sft-1", "checkpoint_0", "loop-0.pt"))


def test_an_upstream_stage_that_was_made_again_is_named(tmp_path: Path) -> None:
    run = stopped(tmp_path, "sft")
    with pytest.raises(
        InputError, match="its checkpoints were made with other inputs: revise changed; set it back"
    ):
        check_attempt(run, "sft", inputs(run, "sft") | {"revise": "another"})


def test_a_damaged_note_is_one_line(tmp_path: Path) -> None:
    run = stopped(tmp_path, "sft")
    files.write_bytes(run.path("sft", ATTEMPT), b"{")
    with pytest.raises(InputError, match=r"attempt\.json.* and run the stage again"):
        check(tmp_path, "sft")


# ------------------------------------------------------------------------------------------------ content, not paths


@pytest.mark.parametrize(
    ("setting", "name"), [("sft.init", "sft"), ("rm.init", "rm"), ("label.judge.model", "label")]
)
def test_a_copy_of_a_model_elsewhere_is_the_same(tmp_path: Path, setting: str, name: str) -> None:
    folders = [tiny.save_model(tmp_path / place / "model") for place in ("a", "b", "c")]
    a, b = (own_inputs(Run(load(tmp_path, f"{setting}={folder}")), name) for folder in folders[:2])
    assert a == b
    (folders[2] / "config.json").write_text((folders[2] / "config.json").read_text() + " ")
    assert own_inputs(Run(load(tmp_path, f"{setting}={folders[2]}")), name) != a


def test_the_run_s_model_and_a_copy_of_it_are_the_same_to_start_from(tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "model")
    base = own_inputs(Run(load(tmp_path, f"model={folder}")), "sft")
    assert own_inputs(Run(load(tmp_path, f"model={folder}", f"sft.init={folder}")), "sft") == base


@pytest.mark.parametrize(
    ("setting", "row", "name"),
    [
        ("prompts=[{{path: '{}', kind: helpful}}]", {"prompt": "a"}, "revise"),
        ("compare.prompts=[{{path: '{}', kind: helpful}}]", {"prompt": "a"}, "compare"),
        ("ppo.watch.prompts=[{{path: '{}', kind: helpful}}]", {"prompt": "a"}, "ppo"),
        ("rm.human=[{{path: '{}'}}]", {"prompt": "a", "chosen": "b", "rejected": "c"}, "rm"),
        ("label.gold={}", {"messages": "a", "response_a": "b", "response_b": "c", "gold": 1}, "label"),
        (
            "evaluate.sets=[{{name: x, kind: refusals, path: '{}'}}]",
            {"prompt": "a", "label": "safe"},
            "evaluate",
        ),
    ],
)
def test_a_file_that_was_moved_is_the_same(
    tmp_path: Path, setting: str, row: dict[str, Any], name: str
) -> None:
    def with_file(file: str, text: str) -> dict[str, str]:
        (tmp_path / file).write_text(text)
        return own_inputs(Run(load(tmp_path / "run", setting.format(tmp_path / file))), name)

    text = json.dumps(row)
    assert with_file("here.jsonl", text) == with_file("there.jsonl", text)
    assert with_file("other.jsonl", text.replace('"a"', '"z"')) != with_file("here.jsonl", text)


# ------------------------------------------------------------------------------------------------------ declarations


def test_every_section_that_a_stage_reads_has_a_fingerprint() -> None:
    config = load_config("errand-town")
    sections = {name: getattr(config, name) for name in stages_that("generates", "trains")}
    assert len({fingerprint(section) for section in sections.values()}) == len(sections)
    assert "workers" not in result_settings(config.sft) and "init" not in result_settings(config.sft)
    assert result_settings(config.sft, paths=True)["init"] == "base"
    assert {"max_boilerplate", "on_alarm"}.isdisjoint(result_settings(config.ppo)["watch"])
