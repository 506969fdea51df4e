"""Stage `sft` on tiny random models: what it trains on, what it writes, how it goes on. docs/method.md item 36."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ray import cloudpickle

from cai_ray.config.training import SftConfig
from cai_ray.errors import Stopped
from cai_ray.storage import files
from cai_ray.storage.models import folder_sha
from cai_ray.storage.run import Run
from cai_ray.train import sft
from cai_ray.train.runtime import checkpoints
from cai_ray.train.runtime.engine import Trained
from cai_ray.train.runtime.ranks import rank
from tests.ray import training

for module in (sys.modules[__name__], training):
    cloudpickle.register_pickle_by_value(module)

SFT = {"epochs": 2, "batch_size": 8, "learning_rate": 1e-2, "revisions": "all"}
RESUMED = SFT | {"init": "base", "epochs": 3, "checkpoint_every": 4, "warmup_steps": 3}


def test_records_hold_the_revisions_asked_for_and_as_many_helpful_samples_as_allowed() -> None:
    rows = training.revisions(12)  # 8 revised in two rounds, 4 helpful
    rows[0]["error"] = "a revision is empty"
    count = {
        ("final", 1.0): (7, 4),
        ("all", 1.0): (14, 4),
        ("up_to_n", 0.3): (7, 2),
        ("final", 0.0): (7, 0),
    }
    for (which, ratio), (revised, helpful) in count.items():
        cfg = SftConfig(revisions=which, helpful_per_revision=ratio)
        records = training.sft_records(rows, cfg)
        assert sum(r["kind"] == "revision" for r in records) == revised
        assert sum(r["kind"] == "helpful" for r in records) == helpful
        assert len({r["id"] for r in records}) == len(records)
        assert records == training.sft_records(rows[::-1], cfg), "the order of the rows has no influence"
        assert all(r["source_id"] != "r000" for r in records)
    by_source = {r["source_id"]: r for r in training.sft_records(rows, SftConfig())}
    assert by_source["r001"]["messages"][-1] == {"role": "assistant", "content": rows[1]["revision"]}
    assert by_source["r002"]["messages"][-1]["content"] == rows[2]["response"]


def test_a_row_whose_principles_are_all_disabled_gives_its_response() -> None:
    row = training.revisions(1)[0] | {"steps": [], "response": "as it was"}
    for which in ("final", "all", "up_to_n"):
        (record,) = training.sft_records([row], SftConfig(revisions=which))
        assert record["messages"][-1]["content"] == "as it was"


def test_rounds_are_counted_by_the_draw_and_not_by_what_is_left_of_it() -> None:
    """Round 1 drew a disabled principle: after it the response still stands."""
    row = training.revisions(1)[0]
    row["steps"] = row["steps"][1:]
    given = {
        which: [r["messages"][-1]["content"] for r in training.sft_records([row], SftConfig(revisions=which))]
        for which in ("final", "all", "up_to_n")
    }
    last = row["steps"][-1]["revision"]
    assert given == {"final": [last], "all": [last], "up_to_n": [row["response"]]}


def test_item_14_a_truncated_sample_is_not_trained_to_end_there(tmp_path: Path) -> None:
    run = training.make_run(tmp_path, "qwen2", sft=SFT | {"init": "base"})
    rows = training.revisions(6)
    rows[2]["truncated"] = True
    cut = {r["source_id"]: r["truncated"] for r in training.sft_records(rows, run.config.sft)}
    assert cut == {r["id"]: r["id"] == "r002" for r in rows}


def test_sft_trains_and_leaves_out_what_does_not_fit(tmp_path: Path, ray_cluster: None) -> None:
    run = training.make_run(tmp_path, "qwen2", sft=SFT | {"epochs": 4, "init": "base"})
    rows = training.revisions()
    rows[0]["error"] = "the first response is empty"
    rows[1]["steps"][0]["revision"] = "word " * 5000  # longer than the context
    training.write(run, "revise", rows)
    result = sft.run(run)

    written = run.rows("sft")
    assert result["rows_in"] == 24
    assert result["errors"] == 1
    assert result["left_out_too_long"] == 1 and result["left_out_refused"] == 0
    assert result["rows_out"] == len(written) == 15 * 2 + 8 - 1
    metrics = [json.loads(line) for line in files.read_bytes(run.path("sft", "metrics.jsonl")).splitlines()]
    assert [m["step"] for m in metrics] == list(range(1, result["steps"] + 1))
    assert metrics[-1]["sft/loss"] < 0.7 * metrics[0]["sft/loss"]
    assert folder_sha(run.path("sft", "model")) == result["model_sha"]
    assert _loss(run, run.path("sft", "model")) < 0.7 * _loss(run, run.config.model)


def _loss(run: Run, folder: str) -> float:
    """Of the written rows, by transformers alone, from the text that the chat template gives."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, words = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    losses = []
    for row in run.rows("sft")[:8]:
        prompt = words.apply_chat_template(row["messages"][:-1], add_generation_prompt=True, tokenize=False)
        text = prompt + row["messages"][-1]["content"] + "<|im_end|>"
        ids = words(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        start = len(words(prompt, add_special_tokens=False)["input_ids"])
        with torch.no_grad():
            logprobs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[start - 1 :]
        losses.append(-float(logprobs.mean()))
    return sum(losses) / len(losses)


def test_a_row_longer_than_a_micro_batch_is_trained_on_alone(
    tmp_path: Path, ray_cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run = training.make_run(tmp_path, sft=SFT | {"init": "base", "micro_batch_tokens": 8})
    training.write(run, "revise", training.revisions())
    result = sft.run(run)
    assert result["left_out_too_long"] == 0 and result["rows_out"] == len(run.rows("sft"))
    assert "longer than sft.micro_batch_tokens=8" in capsys.readouterr().err


def dying_loop(config: dict[str, Any]) -> dict[str, Any]:
    """The loop on a machine that loses its power in the middle of step 6."""
    step, run = Trained.step, config["run"]

    def die_in_step_6(self: Trained) -> float:
        norm = step(self)
        if self.engine.global_steps == 6 and rank() == 0:
            training.die_once(run.path("died"))
        return norm

    Trained.step = die_in_step_6  # type: ignore[method-assign]
    return sft.loop(config)


def test_item_36_a_dead_worker_leaves_the_same_weights(
    tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second attempt goes on from step 4 with its schedule, moments and shuffle: two ranks, ZeRO-3, adapters."""
    sections = SFT | {"init": "base", "checkpoint_every": 4, "warmup_steps": 3}
    sections |= {"zero_stage": 3, "workers": 2, "lora": {"rank": 4}}
    runs = {}
    for name in ("whole", "dying"):
        if name == "dying":
            monkeypatch.setattr(sft, "loop", dying_loop)
        runs[name] = training.make_run(tmp_path / name, sft=sections)
        training.write(runs[name], "revise", training.revisions())
        sft.run(runs[name])
    assert files.exists(runs["dying"].path("died"))
    _same(runs["whole"], runs["dying"])


def _same(one: Run, other: Run) -> None:
    """Weights bit for bit, and the losses of every step."""
    a, b = (training.weights(r.path("sft", "model")) for r in (one, other))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    losses = [
        [
            (m["step"], m["sft/loss"])
            for m in map(json.loads, files.read_bytes(r.path("sft", "metrics.jsonl")).splitlines())
        ]
        for r in (one, other)
    ]
    assert losses[0] == losses[1]


def noting_loop(config: dict[str, Any], stop: bool) -> dict[str, Any]:
    """The loop, up to its first checkpoint if the user is to stop it there; it notes where it began."""
    restore, save, began = sft.restore, sft.save_checkpoint, Path(config["run"].path("began"))

    def noted(engines: Any) -> Any:
        state = restore(engines)
        if rank() == 0:
            with began.open("a") as f:
                f.write(f"{state['step'] if state else 0} ")
        return state

    def save_and_stop(*args: Any) -> None:
        save(*args)
        checkpoints.wait_until_saved()
        if stop:
            raise Stopped("by the user")

    sft.restore, sft.save_checkpoint = noted, save_and_stop
    return sft.loop(config)


@pytest.fixture(scope="module")
def undisturbed(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return _finished(training.make_run(tmp_path_factory.mktemp("undisturbed"), sft=RESUMED))


def _finished(run: Run) -> Run:
    training.write(run, "revise", training.revisions())
    sft.run(run)
    return run


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_item_36_another_number_of_workers_goes_on(
    tmp_path: Path, undisturbed: Run, monkeypatch: pytest.MonkeyPatch, zero_stage: int
) -> None:
    """Of two, one and two ranks each goes on with moments, schedule and batches: only the rounding differs. The
    one rank computes its activations again."""
    for workers, stop in ((2, True), (1, True), (2, False)):
        how = {"workers": workers, "zero_stage": zero_stage, "gradient_checkpointing": workers == 1}
        run = training.make_run(tmp_path, sft=RESUMED | how)
        monkeypatch.setattr(sft, "loop", functools.partial(noting_loop, stop=stop))
        with contextlib.suppress(Stopped):
            _finished(run)
    assert Path(run.path("began")).read_text() == "0 4 8 "
    _alike(undisturbed, run)


def _alike(one: Run, other: Run) -> None:
    """Up to rounding, of which Adam makes more with every step; moments that are lost show in the loss."""
    rows = [
        [json.loads(line) for line in files.read_bytes(r.path("sft", "metrics.jsonl")).splitlines()]
        for r in (one, other)
    ]
    for name in ("step", "sft/loss", "sft/grad_norm", "sft/learning_rate"):
        assert [s[name] for s in rows[1]] == pytest.approx([s[name] for s in rows[0]], rel=2e-3), name
    whole, got = (training.weights(r.path("sft", "model")) for r in (one, other))
    for name, tensor in whole.items():
        apart = float((got[name] - tensor).abs().max())
        assert apart < 5e-4, (name, apart)


ALONE = """
import sys
from cai_ray.cluster.connect import connect
from cai_ray.config.run import RunConfig
from cai_ray.storage.run import Run
from cai_ray.train import sft
run = Run(RunConfig.model_validate_json(sys.argv[1]))
connect(run.config)
sft.run(run)
"""


def test_item_36_a_killed_stage_goes_on_where_it_was(tmp_path: Path, ray_cluster: None) -> None:
    """The driver is killed after its first checkpoint, with its whole cluster, and the stage is run again."""
    sections = SFT | {"init": "base", "checkpoint_every": 2, "epochs": 4}
    whole = training.make_run(tmp_path / "whole", sft=sections)
    killed = training.make_run(tmp_path / "killed", sft=sections)
    for run in (whole, killed):
        training.write(run, "revise", training.revisions())
    sft.run(whole)

    checkpoints = Path(killed.path("sft", "checkpoints"))
    driver = subprocess.Popen(
        [sys.executable, "-c", ALONE, killed.config.model_dump_json()], start_new_session=True
    )
    try:
        while not list(checkpoints.glob("*/checkpoint_*/loop-0.pt")):
            assert driver.poll() is None, "the stage ended before it could be killed"
            time.sleep(0.05)
        time.sleep(0.3)  # Ray Train registers a checkpoint a moment after it is written
    finally:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    assert not files.exists(killed.path("sft", "model")), "killed too late"
    first = json.loads(next(checkpoints.glob("*/checkpoint_manager_snapshot.json")).read_text())
    assert first["checkpoint_results"], "killed too early"
    sft.run(killed)
    _same(whole, killed)
