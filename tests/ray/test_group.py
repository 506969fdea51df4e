"""Ray Train and DeepSpeed under the loops: docs/method.md items 30 and 38, faults, and what is saved."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray import cloudpickle

from cai_ray.config.training import LoraConfig, TrainConfig
from cai_ray.errors import InputError, Stopped
from cai_ray.storage.run import Run
from cai_ray.train import rm, sft
from cai_ray.train.batches import Example, pad
from cai_ray.train.dialogues import Dialogues
from cai_ray.train.losses import sft_loss, soft_bradley_terry
from cai_ray.train.models import load_policy, load_reward_model
from cai_ray.train.pairs import Pairs
from cai_ray.train.runtime import checkpoints, group
from cai_ray.train.runtime.checkpoints import restore, save_checkpoint
from cai_ray.train.runtime.engine import distribute
from cai_ray.train.runtime.group import fit
from cai_ray.train.runtime.ranks import global_sum, rank, world_size
from cai_ray.train.sequences import score_last, sequence_values
from cai_ray.train.weights.state import gathered_state, save_model, state_items
from tests.ray import training

for module in (sys.modules[__name__], training):
    cloudpickle.register_pickle_by_value(module)
pytestmark = pytest.mark.usefixtures("ray_cluster")

# With an epsilon this large Adam's first step is the gradient, g / (|g| + 1), and no sign of a tiny number.
PLAIN = {
    "learning_rate": 1.0,
    "schedule": "constant",
    "eps": 1.0,
    "max_grad_norm": 1e9,
    "micro_batch_tokens": 256,
}
STAGES = (0, 1, 2, 3)
BATCH = list(range(11))  # two ranks cannot share it equally


def steps_on_each_stage(config: dict[str, Any]) -> None:
    """One step of SFT and of the reward model under every ZeRO stage: weights, losses and gradient norms."""
    run, out = config["run"], {}
    data = ray.get(config["data"])
    for stage in STAGES:
        cfg = TrainConfig(**PLAIN, zero_stage=stage)
        policy = distribute(load_policy(run.config.model, cfg), cfg, 2)
        loss, norm = sft.update(policy, data, BATCH, cfg, config["pad_id"])
        reward = distribute(load_reward_model(run.config.model, cfg), cfg, 2)
        pairs = Pairs(
            ray.get(config["pairs"]), ray.get(config["p_a"]), ray.get(config["human"]), config["pad_id"]
        )
        sums, reward_norm = rm.update(reward, pairs, BATCH, cfg)
        out[stage] = {
            "world": world_size(),
            "sft": {n: t.clone() for n, t in gathered_state(policy)},
            "rm": {n: t.clone() for n, t in gathered_state(reward)},
            "norms": (norm, reward_norm),
            "losses": (loss, (sums["ai/loss"] + sums["human/loss"]) / len(BATCH)),
        }
    if rank() == 0:
        torch.save(out | {"adapters": with_adapters(run, data)}, config["got"])
    else:
        with_adapters(run, data)


def with_adapters(run: Run, data: Dialogues) -> torch.Tensor:
    """Trains adapters under ZeRO-3, saves the model, and returns its logits on the first row."""
    cfg = TrainConfig(learning_rate=0.1, zero_stage=3, lora=LoraConfig(rank=4, alpha=8))
    policy = distribute(load_policy(run.config.model, cfg), cfg, 2)
    for _ in range(2):
        sft.update(policy, data, BATCH, cfg, 0)
    save_model(policy, run.config.model, run.path("saved"))
    with torch.no_grad():
        return logits_of(policy, data[0])


def logits_of(model: Any, row: Example) -> torch.Tensor:
    return model(input_ids=torch.tensor([row.ids])).logits  # type: ignore[no-any-return]


def whole_batch(model: Any, loss: torch.Tensor) -> tuple[dict[str, torch.Tensor], float]:
    """The same step by plain PyTorch on one unsplit batch, and the gradient's norm."""
    loss.backward()
    grads = [p.grad for p in model.parameters()]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1.0, eps=1.0, betas=TrainConfig().betas, weight_decay=0.0
    )
    optimizer.step()
    state = {n: t.clone() for n, t in state_items(model)}
    return state, float(torch.stack([g.norm() for g in grads if g is not None]).norm())


def test_item_30_two_ranks_and_every_zero_stage_give_the_step_of_one(tmp_path: Path) -> None:
    import numpy as np

    run = training.make_run(tmp_path, "qwen2", sft={"workers": 2})
    data = training.dialogues(run, training.revisions(11), "response")
    compared = training.labels(11)
    pairs = training.dialogues(run, compared, "response_a", "response_b")
    p_a, human = np.asarray([r["p_a"] for r in compared]), np.asarray([i % 2 == 0 for i in range(11)])
    extra = {
        "data": ray.put(data),
        "pairs": ray.put(pairs),
        "p_a": ray.put(p_a),
        "human": ray.put(human),
        "pad_id": 0,
        "got": str(tmp_path / "got.pt"),
    }
    fit(run, "sft", steps_on_each_stage, run.config.sft, extra)
    got = torch.load(tmp_path / "got.pt")

    cfg = TrainConfig()
    policy = load_policy(run.config.model, cfg)
    rows = pad([data[i] for i in BATCH], 0)
    logits = policy(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits[:, :-1]
    logprobs = logits.log_softmax(-1).gather(-1, rows["input_ids"][:, 1:, None]).squeeze(-1)
    logprobs = torch.nn.functional.pad(logprobs, (1, 0))
    sft_value = sft_loss(logprobs, rows["loss_mask"], float(rows["loss_mask"].sum()))
    reward = load_reward_model(run.config.model, cfg)
    rows = pad([pairs[2 * i + side] for side in (0, 1) for i in BATCH], 0)
    r_a, r_b = score_last(sequence_values(reward, rows), rows["attention_mask"]).split(len(BATCH))
    rm_value = soft_bradley_terry(r_a, r_b, torch.tensor(p_a, dtype=torch.float32)).mean()

    for name, model, value in (("sft", policy, sft_value), ("rm", reward, rm_value)):
        before = {n: t.clone() for n, t in state_items(model)}
        after, norm = whole_batch(model, value)
        which = ("sft", "rm").index(name)
        for stage in STAGES:
            assert got[stage]["world"] == 2
            assert got[stage]["losses"][which] == pytest.approx(float(value.detach()), rel=1e-5)
            assert got[stage]["norms"][which] == pytest.approx(norm, rel=1e-5), f"{name}, stage {stage}"
            moved = sum(float((after[n] - before[n]).double().square().sum()) for n in after)
            apart = sum(float((after[n] - got[stage][name][n]).double().square().sum()) for n in after)
            assert set(got[stage][name]) == set(after)
            assert (apart / moved) ** 0.5 < 1e-5, f"{name}, stage {stage}"

    # The tied model with adapters that ZeRO-3 spread over both ranks was saved whole, adapters merged.
    with torch.no_grad():
        saved = logits_of(load_policy(run.path("saved"), TrainConfig()), data[0])
        old = logits_of(load_policy(run.config.model, TrainConfig()), data[0])
    torch.testing.assert_close(saved, got["adapters"], rtol=1e-4, atol=1e-4)
    assert (saved - old).abs().max() > 0.1


def fail_on_the_last_rank(config: dict[str, Any]) -> None:
    with open(config["count"], "a") as f:
        f.write("x")
    if rank() == world_size() - 1:
        raise {"input": InputError, "stop": Stopped}[config["kind"]]("the reason")
    global_sum(torch.zeros(1))  # waits for the last rank, which never comes


@pytest.mark.parametrize(("kind", "error", "ranks"), [("input", InputError, 2), ("stop", Stopped, 1)])
def test_a_fault_on_one_rank_reaches_the_driver_and_is_not_tried_again(
    tmp_path: Path, kind: str, error: type[Exception], ranks: int
) -> None:
    run = training.make_run(tmp_path, sft={"workers": ranks})
    count = tmp_path / "count"
    with pytest.raises(error, match=r"^the reason$"):
        fit(run, "sft", fail_on_the_last_rank, run.config.sft, {"kind": kind, "count": str(count)})
    # Each rank once, or not at all where the fault came first; nobody a second time.
    assert count.read_text() in {"x", "x" * ranks}


def test_item_38_too_few_cpus_is_said_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(run: Run) -> None:
        pytest.fail("a group was started, which would wait for ever")

    monkeypatch.setattr(group, "_trainer_class", start)
    run = training.make_run(tmp_path, sft={"workers": 4, "cpus_per_worker": 50})
    with pytest.raises(
        InputError,
        match=r"workers=4: needs 4 x \{CPU: 50\}, each on one node, and there is room for 0; the cluster has 1 node "
        r"of \{CPU: 16\} and no autoscaler that adds more; use fewer `workers`",
    ):
        fit(run, "sft", fail_on_the_last_rank, run.config.sft)


def dies_after(config: dict[str, Any]) -> None:
    """Three attempts that each get to another checkpoint and die; the others die before they do."""
    state = restore({}) or {"step": 0}
    with open(config["began"], "a") as f:
        f.write(f"{state['step']} ")
    if state["step"] < 3:
        save_checkpoint({}, {"step": state["step"] + 1}, state["step"] + 1)
        checkpoints.wait_until_saved()
    os._exit(1)


def test_a_stage_goes_on_as_long_as_it_gets_on(tmp_path: Path) -> None:
    """Failures count anew with every checkpoint, and the same one comes back three times at most."""
    from ray.train import WorkerGroupError

    run, began = training.make_run(tmp_path), tmp_path / "began"
    with pytest.raises(WorkerGroupError):
        fit(run, "sft", dies_after, run.config.sft, {"began": str(began)})
    assert began.read_text() == "0 1 2 3 3 3 "


UPLOAD_S = 3.0


def saves_slowly(config: dict[str, Any]) -> dict[str, float]:
    """Saves to a storage that takes its time, is killed in the middle of an upload, and saves on."""
    from ray.train.v2._internal.execution.storage import StorageContext

    persist, out = StorageContext.persist_current_checkpoint, {}

    def slow(self: Any, checkpoint: Any, name: str) -> Any:
        Path(self.build_checkpoint_path_from_name(name)).mkdir(parents=True)
        Path(self.build_checkpoint_path_from_name(name), "loop-0.pt").write_bytes(b"half of")
        time.sleep(UPLOAD_S)
        return persist(self, checkpoint, name)

    def save(step: int) -> float:
        started = time.monotonic()
        save_checkpoint({}, {"step": step}, step)
        return time.monotonic() - started

    state = restore({})
    if state is None:
        save(1)
        checkpoints.wait_until_saved()
        StorageContext.persist_current_checkpoint = slow
        save(2)
        time.sleep(1)
        os._exit(1)
    out["restored"] = state["step"]
    out["leftovers"] = len(list(checkpoints._scratch().glob("*")))
    StorageContext.persist_current_checkpoint = slow
    out |= {"first_s": save(3), "second_s": save(4)}
    return out


def test_item_35_a_checkpoint_is_uploaded_beside_training_and_counts_when_it_is_whole(tmp_path: Path) -> None:
    run = training.make_run(tmp_path)
    out = fit(run, "sft", saves_slowly, run.config.sft)
    assert out["restored"] == 1, "the second was half there"
    assert out["leftovers"] == 0
    assert out["first_s"] < 1 and out["second_s"] > UPLOAD_S - 0.5, "one is on its way at a time"
    (record,) = Path(run.path("sft", "checkpoints")).glob("*/checkpoint_manager_snapshot.json")
    kept = json.loads(record.read_text())
    last = record.parent / kept["latest_checkpoint_result"]["checkpoint_dir_name"]
    assert torch.load(last / "loop-0.pt", weights_only=False)["step"] == 4, "waited for at the end"
    assert not list(Path(tempfile.gettempdir()).glob(f"cai_ray-*/checkpoints/{_scratch_of(record.parent)}/*"))


def _scratch_of(folder: Path) -> str:
    from cai_ray.storage.records import derive_id

    return derive_id(str(folder))


def cannot_share(config: dict[str, Any]) -> None:
    """Goes on from a checkpoint of four ranks, which DeepSpeed will not convert."""
    from deepspeed.checkpoint import ds_to_universal

    def refuse(how: Any) -> None:
        raise NotImplementedError("not this one")

    ds_to_universal.main = refuse
    cfg: TrainConfig = config["run"].config.sft
    policy = distribute(load_policy(config["run"].config.model, cfg), cfg, 2)
    if restore({"policy": policy}) is None:
        checkpoints.world_size = lambda: 4
        save_checkpoint({}, {}, 1)
        checkpoints.wait_until_saved()
        os._exit(1)


def test_a_checkpoint_that_cannot_be_shared_out_is_an_input_error(tmp_path: Path) -> None:
    run = training.make_run(tmp_path)
    with pytest.raises(InputError, match=r"that 4 workers saved cannot .* not this one\); use workers=4$"):
        fit(run, "sft", cannot_share, run.config.sft)
