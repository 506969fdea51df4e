"""Stage `dpo` on tiny random models: it learns, and it is the same however it is cut, killed or adapted."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ray import cloudpickle

from cai_ray.config.training import DpoConfig
from cai_ray.errors import InputError
from cai_ray.storage import files
from cai_ray.storage.models import folder_sha
from cai_ray.storage.run import Run
from cai_ray.train import comparisons, dpo
from cai_ray.train.batches import pad
from cai_ray.train.losses import direct_preference
from cai_ray.train.models import load_policy
from cai_ray.train.pairs import load_pairs
from cai_ray.train.runtime.engine import Trained, distribute
from cai_ray.train.runtime.group import fit
from cai_ray.train.runtime.ranks import rank
from cai_ray.train.weights.state import gathered_state, state_items
from tests.ray import training

for module in (sys.modules[__name__], training):
    cloudpickle.register_pickle_by_value(module)

DPO = {"epochs": 4, "batch_size": 8, "learning_rate": 1e-3, "eval_fraction": 0.2, "beta": 0.3}


def make_run(folder: Path, labels: int = 48, **settings: Any) -> Run:
    """A run whose SL-CAI policy is a random model, with labels that prefer "kind"."""
    run = training.make_run(folder, "qwen2", method="dpo", dpo=DPO | settings)
    files.upload_folder(run.config.model, run.path("sft", "model"))
    files.write_json(run.path("sft", "manifest.json"), {"id": "made-by-the-test"})
    training.write(run, "label", training.labels(labels))
    return run


def metrics(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in files.read_bytes(run.path("dpo", "metrics.jsonl")).splitlines()]


def logprobs(folder: str, run: Run, rows: list[dict[str, Any]]) -> torch.Tensor:
    """Of both responses, ends included, (rows, 2), by transformers alone, one text at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, words = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    out = []
    for row in rows:
        prompt = words.apply_chat_template(row["messages"], add_generation_prompt=True, tokenize=False)
        start = len(words(prompt, add_special_tokens=False)["input_ids"])
        for key in ("response_a", "response_b"):
            text = prompt + row[key] + "<|im_end|>"
            ids = words(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                every = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
            out.append(float(every[start - 1 :].sum()))
    return torch.tensor(out).view(-1, 2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> tuple[Run, dict[str, Any]]:
    """Trained by two ranks on 46 labels and 24 human comparisons, which prefer "ask"."""
    folder = tmp_path_factory.mktemp("dpo")
    human = folder / "human.jsonl"
    with human.open("w") as f:
        for i in range(24):
            answers = (f" ask {training.text(i, 3)}", f" {training.text(i, 2 + i % 5).replace('ask', '')}")
            chosen, rejected = (f"\n\nHuman: {training.text(i, 4)}\n\nAssistant:{a}" for a in answers)
            f.write(json.dumps({"chosen": chosen, "rejected": rejected, "target": 0.8}) + "\n")
    run = make_run(folder, human=[{"path": str(human)}], workers=2)
    labels = training.labels(48)
    labels[0]["response_a"] = "word " * 5000  # longer than the context
    labels[1]["error"] = "no verdict"
    training.write(run, "label", labels)
    return run, dpo.run(run)


def test_the_policy_learns_the_labels_and_the_measures_are_those_of_its_model(
    trained: tuple[Run, dict[str, Any]],
) -> None:
    run, result = trained
    assert (result["rows_ai"], result["rows_human"]) == (46, 24)
    assert result["left_out"] == {"error": 1, "identical": 0, "min_margin": 0, "too_long": 1}
    assert result["human_labels"] == {"helpful": 24}
    assert result["model_sha"] == folder_sha(run.path("dpo", "model")) != result["init_sha"]
    rows = metrics(run)
    held = [row for row in rows if "eval/ai_accuracy" in row]
    assert len(held) == DPO["epochs"]
    losses = [row["eval/ai_loss"] for row in held]
    assert math.log(2) > losses[0] > losses[-1] and held[-1]["eval/ai_accuracy"] > 0.85
    assert held[-1]["eval/ai_margin"] > held[0]["eval/ai_margin"]
    assert result["metrics"]["accuracy_ai"] == held[-1]["eval/ai_accuracy"]
    for source in ("ai", "human"):
        chosen, rejected = (held[-1][f"eval/{source}_{what}"] for what in ("chosen", "rejected"))
        assert chosen - rejected == pytest.approx(held[-1][f"eval/{source}_margin"], abs=1e-5)

    # The same from the two saved models, by transformers alone.
    found = comparisons.load_comparisons(run, "dpo", "sl")
    kept = {found.ids[i].decode() for i in found.held_out if not found.human[i]}
    labels = [r for r in run.rows("label") if r["id"] in kept]
    logp, ref = (logprobs(run.model(role), run, labels) for role in ("rl", "sl"))
    side = torch.tensor([1.0 if r["p_a"] > 0.5 else -1.0 for r in labels])
    margin = run.config.dpo.beta * (side * ((logp - ref)[:, 0] - (logp - ref)[:, 1])).mean()
    assert held[-1]["eval/ai_margin"] == pytest.approx(float(margin), rel=1e-3, abs=1e-4)
    assert held[-1]["eval/ai_drift"] == pytest.approx(float((ref - logp).mean()), rel=1e-3, abs=1e-4)


def test_training_starts_where_the_reference_is(trained: tuple[Run, dict[str, Any]]) -> None:
    first = metrics(trained[0])[0]
    assert first["dpo/loss"] == pytest.approx(math.log(2), abs=1e-5)
    for name in ("chosen", "rejected", "margin", "drift"):
        assert abs(first[f"dpo/ai_{name}"]) < 1e-4, name


# With an epsilon this large Adam's first step is the gradient, g / (|g| + 1), and no sign of a tiny number.
PLAIN: dict[str, Any] = {
    "learning_rate": 0.1, "schedule": "constant", "eps": 1.0, "max_grad_norm": 1e9, "micro_batch_tokens": 256
}  # fmt: skip
BATCH = list(range(11))  # two ranks cannot share it equally
KINDS: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "smoothed": {"label_smoothing": 0.2},
    "ipo": {"loss": "ipo"},
    "zero3": {"zero_stage": 3},
}


def two_steps(config: dict[str, Any]) -> None:
    """Two steps of each kind, and the reference, also with adapters."""
    run, data, out = config["run"], load_pairs(config), {}
    for kind, settings in KINDS.items():
        cfg = DpoConfig(**PLAIN, beta=0.3, **settings)
        policy = distribute(load_policy(run.config.model, cfg), cfg, 2)
        reference = dpo.response_logprobs(policy, data, cfg)
        losses, norms = [], []
        for _ in range(2):  # at the first, policy and reference agree whatever the labels are
            sums, norm = dpo.update(policy, data, reference, BATCH, cfg)
            losses.append(sums["loss"] / len(BATCH))
            norms.append(norm)
        state = {n: t.clone() for n, t in gathered_state(policy)}
        out[kind] = {"losses": losses, "norms": norms, "state": state, "reference": reference}
    cfg = DpoConfig(**PLAIN, lora={"rank": 4})
    policy = distribute(load_policy(run.config.model, cfg), cfg, 2)
    on = dpo.response_logprobs(policy, data, cfg)
    with policy.module.disable_adapter():
        out["adapter"] = {"on": on, "off": dpo.response_logprobs(policy, data, cfg)}
    if rank() == 0:
        torch.save(out, config["got"])


def test_item_30_two_ranks_give_the_step_of_one_whole_batch(tmp_path: Path, ray_cluster: None) -> None:
    """Against plain PyTorch on one batch; with adapters the reference is what they are added to."""
    run = make_run(tmp_path, 11, workers=2, eval_fraction=0.0)
    data = comparisons.load_comparisons(run, "dpo", "sl")
    fit(run, "dpo", two_steps, run.config.dpo, {**data.shared(), "got": str(tmp_path / "got.pt")})
    got = torch.load(tmp_path / "got.pt")
    rows = pad([data.responses[2 * i + side] for side in (0, 1) for i in BATCH], data.pad_id)
    p_a = torch.tensor(data.p_a, dtype=torch.float32)

    def whole(model: Any) -> torch.Tensor:
        logits = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits[:, :-1]
        every = logits.log_softmax(-1).gather(-1, rows["input_ids"][:, 1:, None]).squeeze(-1)
        return (every * rows["loss_mask"][:, 1:]).sum(1).view(2, -1).T

    for kind, settings in KINDS.items():
        cfg = DpoConfig(**PLAIN, beta=0.3, **settings)
        model = load_policy(run.config.model, cfg)
        before = {n: t.clone() for n, t in state_items(model)}
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, eps=1.0, betas=cfg.betas, weight_decay=0.0)
        with torch.no_grad():
            reference = whole(model)
        torch.testing.assert_close(got[kind]["reference"], reference, rtol=1e-5, atol=1e-4)
        for step in range(2):
            r = 0.3 * (whole(model) - reference)
            loss = direct_preference(
                r[:, 0], r[:, 1], p_a, beta=0.3, smoothing=cfg.label_smoothing, kind=cfg.loss
            ).mean()
            optimizer.zero_grad()
            loss.backward()
            norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
            optimizer.step()
            assert got[kind]["losses"][step] == pytest.approx(loss.item(), rel=1e-4), kind
            assert got[kind]["norms"][step] == pytest.approx(norm.item(), rel=1e-4), kind
        after = dict(state_items(model))
        moved = sum(float((after[n] - before[n]).double().square().sum()) for n in after)
        apart = sum(float((after[n] - got[kind]["state"][n]).double().square().sum()) for n in after)
        assert (apart / moved) ** 0.5 < 1e-4, kind
    torch.testing.assert_close(got["adapter"]["on"], got["adapter"]["off"], rtol=0, atol=0)
    torch.testing.assert_close(got["adapter"]["off"], got["sigmoid"]["reference"], rtol=1e-5, atol=1e-4)


def dying_loop(config: dict[str, Any]) -> dict[str, Any]:
    """The loop on a machine that loses its power in the middle of step 6."""
    step, run = Trained.step, config["run"]

    def die_in_step_6(self: Trained) -> float:
        norm = step(self)
        if self.engine.global_steps == 6 and rank() == 0:
            training.die_once(run.path("died"))
        return norm

    Trained.step = die_in_step_6  # type: ignore[method-assign]
    return dpo.loop(config)


def test_item_36_a_dead_worker_leaves_the_same_weights(
    tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second attempt goes on from step 4 with the reference of the first, which the policy has left by then."""
    runs = {}
    for name in ("whole", "dying"):
        if name == "dying":
            monkeypatch.setattr(dpo, "loop", dying_loop)
        runs[name] = make_run(
            tmp_path / name, 24, checkpoint_every=4, warmup_steps=3, epochs=3, lora={"rank": 4}
        )
        dpo.run(runs[name])
    assert files.exists(runs["dying"].path("died"))
    a, b = (training.weights(r.path("dpo", "model")) for r in runs.values())
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    kept = [
        [{k: v for k, v in m.items() if k.startswith(("dpo/", "eval/"))} for m in metrics(r)]
        for r in runs.values()
    ]
    assert kept[0] == kept[1]


def test_no_label_to_train_on_is_an_input_error(tmp_path: Path) -> None:
    run = make_run(tmp_path, 4)
    training.write(run, "label", [row | {"error": "no verdict"} for row in training.labels(4)])
    with pytest.raises(InputError, match="dpo: no comparison can be trained on"):
        dpo.run(run)
