"""Stage `rm` on tiny random models: docs/method.md items 14, 15, 18, and what is trained on."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cai_ray.config.training import RmConfig
from cai_ray.errors import InputError
from cai_ray.storage import files
from cai_ray.storage.run import Run
from cai_ray.train import comparisons, rm
from cai_ray.train.models import reward_scale
from cai_ray.train.pairs import Pairs
from tests.ray import training

RM = {"epochs": 3, "batch_size": 8, "learning_rate": 1e-2, "eval_fraction": 0.2, "init": "base"}


def chosen(labels: Any, cfg: RmConfig, seed: int = 0) -> tuple[list[dict[str, Any]], Counter[str]]:
    left_out: Counter[str] = Counter()
    return list(comparisons.ai_comparisons(labels, cfg, seed, left_out)), left_out


def test_labels_that_say_nothing_are_left_out_and_counted() -> None:
    labels = training.labels(8)
    labels[0]["error"] = "no verdict"
    labels[1]["response_b"] = labels[1]["response_a"]
    labels[2]["p_a"] = 0.52
    labels[3]["p_a"] = None
    rows, left_out = chosen(labels, RmConfig(min_margin=0.05))
    assert [r["id"] for r in rows] == ["c004", "c005", "c006", "c007"]
    assert left_out == {"error": 2, "identical": 1, "min_margin": 1}
    assert [r["p_a"] for r in rows] == [0.9, 0.1, 0.9, 0.1]


def test_hard_labels_are_rounded_and_ties_left_out() -> None:
    labels = training.labels(6)
    for row, p in zip(labels, (0.51, 0.49, 0.5, 0.9, 0.0, 0.5), strict=True):
        row["p_a"] = p
    rows, left_out = chosen(labels, RmConfig(hard_labels=True))
    assert [(r["id"], r["p_a"]) for r in rows] == [("c000", 1.0), ("c001", 0.0), ("c003", 1.0), ("c004", 0.0)]
    assert left_out["tie"] == 2
    soft, left_out = chosen(labels, RmConfig())
    assert [r["p_a"] for r in soft] == [0.51, 0.49, 0.5, 0.9, 0.0, 0.5] and not left_out["tie"]


def test_shuffled_labels_are_flipped_for_half_of_the_rows_and_never_otherwise() -> None:
    labels = [row | {"id": f"c{i}", "p_a": 0.8} for i, row in enumerate(training.labels(1) * 1000)]
    rows, _ = chosen(labels, RmConfig(shuffle_labels=True), seed=3)
    flipped = sum(r["p_a"] == pytest.approx(0.2) for r in rows)
    assert 450 < flipped < 550
    again, _ = chosen(labels[::-1], RmConfig(shuffle_labels=True), seed=3)
    assert sorted(rows, key=lambda r: r["id"]) == sorted(again, key=lambda r: r["id"])
    assert all(r["p_a"] == 0.8 for r in chosen(labels, RmConfig(), seed=3)[0])


def test_a_prompts_comparisons_are_on_one_side_of_the_split() -> None:
    rows = [
        r | {"messages": training.labels(100)[i // 3]["messages"] + [i // 3]}
        for i, r in enumerate(training.labels(300))
    ]
    held = [i for i, row in enumerate(rows) if comparisons.is_held_out(row, 0.2, seed=0)]
    assert 30 < len(held) < 90
    assert not {i // 3 for i in {*range(300)} - {*held}} & {i // 3 for i in held}
    assert not any(comparisons.is_held_out(row, 0.0, seed=0) for row in rows)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> tuple[Run, dict[str, Any]]:
    """Trained by two ranks on 48 labels and 25 human comparisons, which prefer "kind" and "ask"."""
    folder = tmp_path_factory.mktemp("rm")
    human = folder / "human.jsonl"
    with human.open("w") as f:
        for i in (*range(24), 0):  # two raters agree word for word
            answers = (f" ask {training.text(i, 3)}", f" {training.text(i, 2 + i % 5).replace('ask', '')}")
            chosen, rejected = (f"\n\nHuman: {training.text(i, 4)}\n\nAssistant:{a}" for a in answers)
            f.write(json.dumps({"chosen": chosen, "rejected": rejected}) + "\n")
    run = training.make_run(folder, "qwen2", rm=RM | {"human": [{"path": str(human)}], "workers": 2})
    labels = training.labels(48)
    labels[0]["response_a"] = "word " * 5000  # longer than the context
    labels[1]["error"] = "no verdict"
    training.write(run, "label", labels)
    return run, rm.run(run)


def _scores(folder: str, run: Run, rows: list[dict[str, Any]], ends: bool = True) -> torch.Tensor:
    """Of both responses, (rows, 2), by transformers alone, one text at a time, end of the turn included."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    words = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    out = []
    for row in rows:
        prompt = words.apply_chat_template(row["messages"], add_generation_prompt=True, tokenize=False)
        for key in ("response_a", "response_b"):
            text = prompt + row[key] + ("<|im_end|>" if ends else "")
            ids = words(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                backbone = getattr(model, model.base_model_prefix)
                out.append(model.score(backbone(ids).last_hidden_state[:, -1]).item())
    return torch.tensor(out).view(-1, 2)


def test_the_reward_model_learns_and_is_saved_with_its_scale(trained: tuple[Run, dict[str, Any]]) -> None:
    run, result = trained
    folder = run.path("rm", "model")
    assert (result["rows_ai"], result["rows_human"]) == (46, 25)
    assert result["left_out"] == {"error": 1, "identical": 0, "min_margin": 0, "too_long": 1}
    assert result["human_labels"] == {"helpful": 25}
    metrics = [json.loads(line) for line in files.read_bytes(run.path("rm", "metrics.jsonl")).splitlines()]
    assert metrics[-1]["rm/ai_loss"] < 0.8 * metrics[0]["rm/ai_loss"]
    assert result["metrics"].keys() == {
        f"{m}_{s}" for m in ("accuracy", "loss", "n") for s in ("ai", "human")
    }
    assert result["metrics"]["accuracy_ai"] > 0.8

    # docs/method.md item 14: what is scored ends with the end of the turn; a score before it is another one.
    rows = [r for r in run.rows("label") if not r["error"] and r["id"] != "c000"]
    scores = _scores(folder, run, rows)
    preferred = torch.tensor([r["p_a"] > 0.5 for r in rows]) == (scores[:, 0] > scores[:, 1])
    assert preferred.float().mean() > 0.85


def test_item_15_scale_is_that_of_a_fixed_reference_set(trained: tuple[Run, dict[str, Any]]) -> None:
    run, result = trained
    # Fewer than REFERENCE comparisons: the set is all of the policy's own samples.
    rows = [r for r in run.rows("label") if not r["error"] and r["id"] != "c000"]
    folder = run.path("rm", "model")
    scores, unended = _scores(folder, run, rows), _scores(folder, run, rows, ends=False)
    scale = reward_scale(folder)
    assert scale.mean == pytest.approx(scores.mean().item(), rel=1e-4, abs=1e-4)
    assert scale.std == pytest.approx(scores.std(correction=0).item(), rel=1e-4)
    assert scale.mean == pytest.approx(result["reward_mean"])
    assert abs(scale.mean - unended.mean().item()) > 1e-2, "the end of the turn is part of what is scored"


def test_item_15_reference_set_depends_on_ids_alone() -> None:
    ids = np.array([f"c{i}".encode() for i in range(1000)])
    human = np.arange(1000) % 4 == 0
    chosen = rm.reference_set(ids, human, seed=1)
    assert len(chosen) == rm.REFERENCE
    assert not human[chosen].any()
    again = rm.reference_set(ids[::-1], human[::-1], seed=1)
    assert ids[chosen].tolist() == ids[::-1][again].tolist()
    assert sorted(rm.reference_set(ids[:5], human[:5] | True, seed=1)) == [*range(5)]


def test_item_18_metrics_are_kept_apart_by_source() -> None:
    sums = {"ai/n": 2.0, "ai/loss": 1.0, "ai/accuracy": 2.0, "ai/margin": 4.0}
    sums |= {"human/n": 4.0, "human/loss": 8.0, "human/accuracy": 1.0, "human/margin": -4.0}
    means = comparisons.means("eval", sums)
    assert (means["eval/ai_accuracy"], means["eval/human_accuracy"]) == (1.0, 0.25)
    assert (means["eval/ai_loss"], means["eval/human_loss"]) == (0.5, 2.0)
    assert not any(k.startswith("eval/human") for k in comparisons.means("eval", sums | {"human/n": 0.0}))


def test_item_18_sources_reach_the_metrics_in_their_own_columns() -> None:
    """Scores that are right about every AI label and wrong about every human one."""
    labels = training.labels(6)
    examples = training.pack(_example(9 if i % 2 else 4) for i in range(12))
    p_a = np.asarray([0.9, 0.9, 0.9, 0.1, 0.1, 0.1])
    human = np.asarray([False] * 3 + [True] * 3)
    pairs = Pairs(examples, p_a, human, pad_id=0)

    def model(input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        return -input_ids.float()  # the score is the last token: a ends with 4, b with 9

    means = rm.evaluate(model, pairs, list(range(len(labels))), RmConfig())  # type: ignore[arg-type]
    assert (means["eval/ai_n"], means["eval/human_n"]) == (3, 3)
    assert (means["eval/ai_accuracy"], means["eval/human_accuracy"]) == (1.0, 0.0)
    assert means["eval/ai_margin"] == pytest.approx(5.0)
    assert means["eval/human_margin"] == pytest.approx(-5.0)


def _example(last: int) -> Any:
    from cai_ray.train.batches import Example

    return Example([1, 2, last], [0, 1, 1])


def test_no_label_to_train_on_is_an_input_error(tmp_path: Path) -> None:
    run = training.make_run(tmp_path, rm=RM)
    training.write(run, "label", [row | {"error": "no verdict"} for row in training.labels(4)])
    with pytest.raises(InputError, match="no comparison can be trained on"):
        rm.run(run)
