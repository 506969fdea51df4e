"""Every stage on SmolLM2-135M-Instruct: real weights, real English, 32 prompts of our own, the model its own judge."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from cai_ray.prompts.models import run_renderer
from cai_ray.provenance.precision import bf16_unit
from cai_ray.stages import stages_of
from cai_ray.storage.run import Run, open_run
from tests.e2e.command import settings, succeed
from tests.real import smollm2

pytestmark = pytest.mark.real
CONFIG = "tests/real/smollm2.yaml"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("real") / "run"
    succeed("run", CONFIG, "--out", out, *settings({"model": smollm2.folder()}), timeout=1800)
    return open_run(str(out))


def test_the_converted_model_speaks() -> None:
    """The weights are whole and in their places: a wrong order of one of them ends all sense."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    words = AutoTokenizer.from_pretrained(smollm2.folder())
    model = AutoModelForCausalLM.from_pretrained(smollm2.folder(), dtype=torch.float32)
    ask = [{"role": "user", "content": "What is the capital of France?"}]
    ids = words.apply_chat_template(
        ask, add_generation_prompt=True, tokenize=True, return_dict=False, return_tensors="pt"
    )
    answer = model.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :]
    assert "Paris" in words.decode(answer) and int(answer[-1]) == words.eos_token_id


def test_every_stage_is_done_and_no_row_is_lost(run: Run) -> None:
    manifests = {stage: run.manifest(stage) for stage in stages_of(run.config.method)}
    assert all(manifests.values()), {stage: bool(m) for stage, m in manifests.items()}
    rows = {stage: (manifest or {}).get("rows_out") for stage, manifest in manifests.items()}
    assert rows["revise"] == rows["compare"] == 24
    assert rows["evaluate"] == 3 * 8
    for stage in ("revise", "compare", "label"):
        ids = Counter(row["id"] for row in run.rows(stage))
        assert set(ids.values()) == {1} and len(ids) == (manifests[stage] or {})["rows_in"], stage
    assert Path(run.path("report", "index.html")).exists()


def test_texts_that_reached_their_limit_are_counted_and_are_no_errors(run: Run) -> None:
    revise = run.manifest("revise") or {}
    assert revise["errors"] == 0
    rows = run.rows("revise")
    response = revise["texts"]["response"]
    assert response["texts"] == len(rows)
    assert response["truncated"] == sum(row["truncated"] for row in rows) > 0, "48 tokens are few"
    assert all(row["tokens"] <= 48 for row in rows)
    steps = [step for row in rows for step in row["steps"]]
    assert len(steps) == 12 and all(step["revision"] for step in steps)
    assert revise["texts"]["critique"]["truncated"] == sum(step["critique_truncated"] for step in steps)
    assert "�" not in "".join(row["response"] for row in rows)


def test_what_is_trained_on_has_the_ids_of_the_models_own_template(run: Run) -> None:
    made = run_renderer(run, "base")
    for row in run.rows("sft"):
        words = made.tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=False)
        ids, mask = made.dialogue_ids(row["messages"], row["truncated"])
        rest = words[len(ids) :]
        assert ids == words[: len(ids)] and sum(mask) > 0
        if row["truncated"]:
            assert ids[-1] != made.end_id == rest[0], "it has no end"
        else:
            assert ids[-1] == made.end_id and rest in ([], made.tokenizer("\n").input_ids)


def test_the_precision_is_what_this_processor_is_good_at(run: Run) -> None:
    decided = json.loads(Path(run.path("run.json")).read_text())["precision"]
    best = "bfloat16" if bf16_unit() else "float32"
    assert {decided[key] for key in ("engine", "sft", "rm", "ppo")} == {best}
    assert run.config.engine.dtype == run.config.ppo.dtype == best


def test_item_24_the_engine_has_the_weights_that_were_trained(run: Run) -> None:
    steps = [json.loads(line) for line in Path(run.path("ppo", "metrics.jsonl")).read_text().splitlines()]
    assert len(steps) == run.config.ppo.steps + run.config.ppo.value_warmup_steps
    assert all(step["sync/send_s"] > 0 and step["sync/mean_gap"] < 0.1 for step in steps)
    assert max(step["rollout/logprob_gap"] for step in steps) < run.config.ppo.max_logprob_gap
    assert max(step["sync/moved"] for step in steps[1:]) > 0, "an update moved what the engine says"


def test_labels_are_probabilities_and_answers_are_judged_by_rule(run: Run) -> None:
    labels: list[Any] = [row for row in run.rows("label") if row["error"] is None]
    assert labels and all(0 <= row["p_a"] <= 1 for row in labels)
    models = json.loads(Path(run.path("evaluate", "metrics.json")).read_text())["models"]
    for policy in ("base", "sl", "rl"):
        assert models[policy]["declined"]["n"] == models[policy]["over_refusal"]["n"] == 4
        assert models[policy]["harm"]["value"] is None, "nobody can judge it"
