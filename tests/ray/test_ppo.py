"""PPO on Ray Train, DeepSpeed and vLLM: docs/method.md items 20, 24, 28, 30, 31, 32, 35, 36, 38.

The policy is the embedded world's base model, the reward model the same with a random head. All runs but one use one
engine, which each start of a training group joins anew.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cai_ray import constitution
from cai_ray.data.left_out import LeftOut
from cai_ray.errors import InputError, Stopped
from cai_ray.prompts.load import load_templates
from cai_ray.prompts.renderer import Renderer
from cai_ray.storage import files
from cai_ray.storage.models import folder_sha
from cai_ray.storage.run import Run
from cai_ray.train.ppo import loop as ppo
from cai_ray.train.ppo import stage
from cai_ray.train.ppo.prompts import read_training_prompts
from cai_ray.train.ppo.watch import read_watch_prompts
from cai_ray.train.runtime.group import fit
from tests.ray.engines import shared, town_config
from tests.ray.runs import ready_for_ppo

SMALL: dict[str, Any] = {
    "steps": 3,
    "value_warmup_steps": 1,
    "rollout_batch": 32,
    "minibatch": 16,
    "epochs": 2,
    "max_tokens": 24,
    "learning_rate": 3e-4,
    "schedule": "linear",
    "min_lr_ratio": 0.0,
    "value_learning_rate": 3e-4,
    "value_clip": 0.01,
    "kl_target": 0.01,
    "kl_horizon": 100,
    "reward_clip": 3.0,
    "micro_batch_tokens": 512,
    "missing_eos_reward": -3.0,
    "whiten": "center",
    "save_rollouts": 4,
}


JUDGE = {"principles": "all", "combine": "log_odds"}


def train(run: Run, loop: Any = ppo.loop) -> dict[str, Any]:
    """What `stage.run` does, with the engine that the tests share, and no judge."""
    import ray

    renderer = Renderer(run.model("sl"), load_templates(run.config.templates).chat_template)
    prompts, _ = read_training_prompts(run, renderer)
    extra = {"engine_owner": shared().owner, "prompts": ray.put(prompts), "judge": None}
    if run.config.ppo.watch.every:
        extra["watch_prompts"] = read_watch_prompts(run, renderer, ())
    return fit(run, "ppo", loop, run.config.ppo, extra)


def metrics(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in files.read_bytes(run.path("ppo", "metrics.jsonl")).splitlines()]


def policy(run: Run, stage: str = "ppo") -> dict[str, torch.Tensor]:
    return load_file(run.path(stage, "model", "model.safetensors"))


@pytest.fixture(scope="module")
def one_rank(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The stage as the pipeline runs it, with an engine of its own that is gone at the end."""
    import ray

    run = ready_for_ppo(tmp_path_factory.mktemp("one"), ppo=SMALL)
    free = ray.available_resources()["CPU"]
    files.write_json(run.path("ppo", "manifest.json"), stage.run(run))
    until = time.monotonic() + 20
    # More than before is no leak: what an earlier test used may have been given back in between.
    while (now := ray.available_resources().get("CPU", 0)) < free:
        assert time.monotonic() < until, f"the stage left actors behind: {now} of {free} CPUs are free"
        time.sleep(0.1)
    return run


def test_the_stage_says_what_it_did(one_rank: Run) -> None:
    manifest = one_rank.manifest("ppo")
    assert manifest is not None and manifest["rows_out"] == 4 * 32 and manifest["errors"] == 0
    assert manifest["tokens"]["generated"] > 4 * 32
    assert manifest["model_sha"] == folder_sha(one_rank.path("ppo", "model"))


def test_the_policy_changes_and_keeps_its_folder(one_rank: Run) -> None:
    from transformers import AutoModelForCausalLM

    before, after = policy(one_rank, "sft"), policy(one_rank)
    assert before.keys() == after.keys() and any(not torch.equal(before[n], after[n]) for n in before)
    AutoModelForCausalLM.from_pretrained(one_rank.path("ppo", "model"))
    Renderer(one_rank.path("ppo", "model"))


def test_rollouts_are_kept_for_reading(one_rank: Run) -> None:
    rows = one_rank.rows("ppo")
    assert len(rows) == 4 * 4 and len({r["id"] for r in rows}) == 16
    assert all(r["policy_version"] == r["step"] - 1 for r in rows), "docs/method.md, item 23"
    assert all(r["response"] and r["messages"][0]["content"] and r["length"] > 0 for r in rows)


def test_item_20_engine_and_trainer_agree_at_every_step(one_rank: Run) -> None:
    gaps = [row["rollout/logprob_gap"] for row in metrics(one_rank)]
    assert len(gaps) == 4 and max(gaps) <= 1e-3
    assert max(gaps) < 1e-4, f"fp32 on one machine: {gaps}"


def test_item_24_every_sync_is_proved_on_tokens_that_moved(one_rank: Run) -> None:
    rows = metrics(one_rank)
    assert [row["step"] for row in rows if row["sync/shown"] > 20] == [2, 3, 4], (
        "step 1 trains the values only"
    )
    assert max(row["sync/gap"] for row in rows) <= 5e-5


def test_item_28_the_ratio_is_1_at_the_first_minibatch(one_rank: Run) -> None:
    rows = metrics(one_rank)[1:]
    assert [row["ppo/ratio_first"] for row in rows] == [1.0] * 3, "exactly, in the same micro-batches"
    assert all(row["ppo/ratio"] != 1.0 for row in rows), "and not later"


def test_item_28_graphs_kept_from_scoring_change_nothing(
    ray_cluster: None, one_rank: Run, tmp_path: Path
) -> None:
    """What the update need not repeat where the first minibatch is small: weights are the same to the last bit."""
    run = ready_for_ppo(tmp_path, ppo=SMALL)

    def loop(args: dict[str, Any]) -> dict[str, Any]:
        from cai_ray.train.ppo import loop as ppo
        from cai_ray.train.ppo import scoring

        scoring.keeps_graphs = lambda *_: True
        return ppo.loop(args)

    train(run, loop)
    assert all(torch.equal(tensor, policy(run)[name]) for name, tensor in policy(one_rank).items())
    assert [m["ppo/value_loss"] for m in metrics(run)] == [m["ppo/value_loss"] for m in metrics(one_rank)]


def test_item_28_another_ratio_stops_the_run() -> None:
    from cai_ray.train.ppo.scoring import check_ratio, difference

    cfg = shared_config()
    old, mask = torch.zeros(2, 3), torch.tensor([[0.0, 1, 1], [0, 1, 0]])
    check_ratio(float(difference(old + 1e-6, old, mask)), cfg)
    check_ratio(float(difference(old + torch.tensor([5.0, 0, 0]), old, mask)), cfg)
    for wrong in (1e-4, math.nan):
        with pytest.raises(RuntimeError, match="ratio is not 1"):
            check_ratio(float(difference(old + wrong, old, mask)), cfg)


def test_item_32_the_reference_is_the_sl_cai_snapshot(one_rank: Run) -> None:
    rows = metrics(one_rank)
    # The policy is the reference until its first update, and leaves it then; the snapshot does not follow.
    assert [row["kl/reference"] for row in rows[:2]] == [0.0, 0.0]
    assert all(abs(row["kl/reference"]) > 1e-5 for row in rows[2:])
    assert all(
        torch.equal(a, b) for a, b in zip(policy(one_rank, "sft").values(), base().values(), strict=True)
    )


def test_item_31_values_start_from_the_reward_model(ray_cluster: None, one_rank: Run) -> None:
    """At the last token, the first value is the normalised reward: head and scale are taken over."""
    from cai_ray.train.batches import pad
    from cai_ray.train.models import load_reward_model, load_value_model
    from cai_ray.train.sequences import score_last, sequence_values

    cfg = one_rank.config.ppo
    folder = one_rank.model("rm")
    inputs = pad([[5, 6, 7, 8], [9, 10]], 0)
    files.write_json(Path(folder) / "reward_head.json", {"mean": 0.7, "std": 2.5})
    try:
        with torch.no_grad():
            reward, value = (
                score_last(sequence_values(m, inputs), inputs["attention_mask"])
                for m in (load_reward_model(folder, cfg), load_value_model(folder, cfg, True))
            )
    finally:
        files.write_json(Path(folder) / "reward_head.json", {"mean": 0.0, "std": 1.0})
    assert torch.allclose(value, (reward - 0.7) / 2.5, atol=1e-5)
    from_policy = load_value_model(one_rank.model("sl"), cfg, False)
    assert float(sequence_values(from_policy, inputs).detach().abs().max()) == 0.0


def test_item_31_warm_up_trains_the_values_only(one_rank: Run) -> None:
    first, *rest = metrics(one_rank)
    assert "ppo/policy_loss" not in first and first["ppo/value_loss"] > 0 and first["sync/moved"] == 0.0
    assert all("ppo/policy_loss" in row for row in rest)
    # Nothing rests on these values yet: they move as far as they must.
    assert first["ppo/value_clipfrac"] == 0.0 < min(row["ppo/value_clipfrac"] for row in rest)


@pytest.mark.parametrize(("zero_stage", "dtype"), [(3, "float32")])
def test_item_30_two_ranks_learn_what_one_does(
    ray_cluster: None, one_rank: Run, tmp_path: Path, zero_stage: int, dtype: str
) -> None:
    two = ready_for_ppo(tmp_path, ppo=SMALL | {"workers": 2, "zero_stage": zero_stage, "dtype": dtype})
    train(two)
    for a, b in zip(metrics(one_rank), metrics(two), strict=True):
        for name in (
            "reward/mean",
            "kl/reference",
            "ppo/value_loss",
            "ppo/policy_grad_norm",
            "rollout/length",
        ):
            if name in a:
                assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-5), (a["step"], name)
        assert b.get("ppo/ratio_first", 1.0) == 1.0 and b["sync/gap"] <= 5e-5
    for name, tensor in policy(one_rank).items():
        assert torch.allclose(tensor, policy(two)[name], atol=2e-4), name


def test_item_24_weights_by_vllms_own_interface(ray_cluster: None, one_rank: Run, tmp_path: Path) -> None:
    """Gathered from two ranks, broadcast to two engines, proved as always: the same training."""
    ways = {"weight_sync": "gloo", "workers": 2, "zero_stage": 3, "rollout_engines": 2}
    run = ready_for_ppo(tmp_path, ppo=SMALL | ways)
    stage.run(run)
    rows = metrics(run)
    assert [row["step"] for row in rows if row["sync/shown"] > 20] == [2, 3, 4]
    assert max(row["sync/gap"] for row in rows) <= 5e-5 and max(r["rollout/logprob_gap"] for r in rows) < 1e-4
    for name, tensor in policy(one_rank).items():
        assert torch.allclose(tensor, policy(run)[name], atol=2e-4), name


def test_lora_is_merged_on_the_way_to_the_engine(ray_cluster: None, tmp_path: Path) -> None:
    """The reference is the policy with its adapter off; what is sent, and saved, is a plain model."""
    run = ready_for_ppo(tmp_path, ppo=SMALL | {"lora": {"rank": 4, "alpha": 8}, "learning_rate": 2e-3})
    train(run)
    rows = metrics(run)
    assert rows[0]["kl/reference"] == 0.0 and abs(rows[-1]["kl/reference"]) > 1e-5
    assert all(row["sync/shown"] > 20 for row in rows[1:]) and max(r["sync/gap"] for r in rows) <= 5e-5
    assert max(row["rollout/logprob_gap"] for row in rows) < 1e-4
    before, after = policy(run, "sft"), policy(run)
    assert before.keys() == after.keys()
    moved = {n.split(".")[-2] for n in before if not torch.equal(before[n], after[n])}
    assert "q_proj" in moved and "input_layernorm" not in moved


@pytest.fixture(scope="module")
def killed(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Rank 0 dies in the third step; the group starts again from its checkpoint, under a new epoch."""
    folder = tmp_path_factory.mktemp("killed")
    run = ready_for_ppo(folder / "run", ppo=SMALL | {"checkpoint_every": 1})
    mark = str(folder / "died")

    def loop(args: dict[str, Any]) -> dict[str, Any]:
        import os
        import pathlib

        from cai_ray.train.ppo import loop as ppo
        from cai_ray.train.ppo import sampling

        sample = sampling.sample

        def dying(pool: Any, prompts: Any, cfg: Any, step: int, seed: int, version: int) -> Any:
            if step == 2 and not os.path.exists(mark):
                pathlib.Path(mark).write_text(str(pool.epoch))
                os._exit(1)
            return sample(pool, prompts, cfg, step, seed, version)

        sampling.sample = dying
        return ppo.loop(args)

    epoch = shared().join().epoch
    train(run, loop)
    assert int(Path(mark).read_text()) == epoch + 1 and shared().join().epoch == epoch + 3
    return run


def test_item_35_a_checkpoint_holds_all_that_a_resume_needs(killed: Run) -> None:
    """Policy, value model, both optimizers and schedules, random numbers, and what the loop counts by."""
    (record,) = Path(killed.path("ppo", "checkpoints")).glob("*/checkpoint_manager_snapshot.json")
    # Not every folder beside the record: half a checkpoint may be left where rank 0 died.
    counted = json.loads(record.read_text())["checkpoint_results"]
    folders = [record.parent / one["checkpoint_dir_name"] for one in counted]
    assert len(folders) == killed.config.ppo.keep_checkpoints
    for folder in folders:
        own = torch.load(folder / "loop-0.pt", weights_only=False)
        state, step = own["state"], own["step"]
        assert own["random"]["torch"].numel() and own["world_size"] == 1
        assert state["step"] == step == len(state["log"]) and state["tokens"] > 0
        assert state["prompts_consumed"] == step * SMALL["rollout_batch"]
        coefs = [row["kl/coef"] for row in metrics(killed)] + [None]
        assert coefs[step] in (state["kl_coef"], None) and state["reward_scales"] == [(0.0, 1.0)]
        assert state["constitution_sha"] == constitution.load("errand-town").sha
        # 2 epochs of 2 minibatches a step; the policy rests in the first.
        for model, updates in (("policy", 4 * (step - 1)), ("value", 4 * step)):
            saved = torch.load(folder / model / "mp_rank_00_model_states.pt", weights_only=False)
            assert saved["module"] and saved["lr_scheduler"]["last_epoch"] == updates, model
            shard = torch.load(
                folder / model / "zero_pp_rank_0_mp_rank_00_optim_states.pt", weights_only=False
            )
            moments = shard["optimizer_state_dict"]["base_optimizer_state"]["state"]
            assert moments and all(m["exp_avg_sq"].sum() > 0 for m in moments.values()), model


def test_the_kl_coefficient_is_steered(one_rank: Run) -> None:
    coefs = [row["kl/coef"] for row in metrics(one_rank)]
    # No KL yet in the step that trains values alone, nor in the one after it; the steps have 32 responses.
    assert coefs[:3] == pytest.approx([0.05 * (1 - 0.2 * 32 / 100) ** n for n in range(3)])
    assert coefs[3] != coefs[2]


def test_group_baselines_need_no_value_model(ray_cluster: None, tmp_path: Path) -> None:
    """And updates end where the policy has moved farther than it may."""
    few = {"advantage": "rloo", "group": 4, "value_warmup_steps": 0, "steps": 2, "max_update_kl": 1e-12}
    run = ready_for_ppo(tmp_path, ppo=SMALL | few)
    train(run)
    rows = metrics(run)
    assert [row["ppo/minibatches"] for row in rows] == [2, 2], "the first has not moved, the second has"
    assert not any(name.startswith("ppo/value") for row in rows for name in row)
    assert any(not torch.equal(tensor, policy(run)[name]) for name, tensor in policy(run, "sft").items())
    kept = run.rows("ppo")
    first = [row for row in kept if row["step"] == 1]
    assert len({str(row["messages"]) for row in first}) == 1 and len({row["response"] for row in first}) > 1


def test_item_36_a_killed_run_ends_with_the_same_weights(killed: Run, one_rank: Run) -> None:
    run = killed
    timeless = [{k: v for k, v in row.items() if "time/" not in k and "_s" not in k} for row in metrics(run)]
    wanted = [
        {k: v for k, v in row.items() if "time/" not in k and "_s" not in k} for row in metrics(one_rank)
    ]
    assert timeless == wanted
    assert all(torch.equal(tensor, policy(run)[name]) for name, tensor in policy(one_rank).items())


AHEAD = SMALL | {"async_steps": 1, "value_warmup_steps": 0, "steps": 4}


@pytest.fixture(scope="module")
def one_ahead(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = ready_for_ppo(tmp_path_factory.mktemp("ahead"), ppo=AHEAD)
    train(run)
    return run


def test_item_21_responses_that_are_one_step_old_are_weighted(one_ahead: Run) -> None:
    rows = metrics(one_ahead)
    versions = {(row["step"], row["policy_version"]) for row in one_ahead.rows("ppo")}
    assert versions == {(1, 0), (2, 0), (3, 1), (4, 2)}
    assert rows[0]["rollout/logprob_gap"] < 1e-4 and rows[0]["rollout/weight"] == pytest.approx(1, abs=1e-4)
    assert all(row["rollout/stale_gap"] > 1e-3 for row in rows[1:])
    assert all(abs(row["rollout/weight"] - 1) > 1e-4 for row in rows[1:])
    # The ratio is of the trainer's own policy before and after, whoever sampled; the engine has each version.
    assert all(row["ppo/ratio_first"] == 1.0 and row["sync/gap"] <= 5e-5 for row in rows)


def test_item_36_responses_sampled_ahead_outlive_a_kill(one_ahead: Run, tmp_path: Path) -> None:
    run = ready_for_ppo(tmp_path / "run", ppo=AHEAD | {"checkpoint_every": 1})
    mark = str(tmp_path / "died")

    def loop(args: dict[str, Any]) -> dict[str, Any]:
        from cai_ray.train.ppo import loop as ppo
        from tests.ray.training import die_once

        update = ppo.update_policy

        def dying(*given: Any, **more: Any) -> Any:
            if given[0].engine.global_steps == 8:  # in the third step
                die_once(mark)
            return update(*given, **more)

        ppo.update_policy = dying
        return ppo.loop(args)

    train(run, loop)
    assert Path(mark).exists()
    assert all(torch.equal(tensor, policy(run)[name]) for name, tensor in policy(one_ahead).items())


WATCH = {"every": 2, "prompts": [{"path": "town:dev"}], "limit": 24}


def test_the_best_snapshot_is_the_result(ray_cluster: None, tmp_path: Path) -> None:
    """Of a policy that an untrained reward model spoils, by fresh labels of the feedback model."""
    spoilt = SMALL | {"learning_rate": 3e-3, "kl_coef": 0.0, "max_tokens": 40}
    run = ready_for_ppo(
        tmp_path, ppo=spoilt | {"watch": WATCH | {"max_opinion_drop": None}}, label={"judge": JUDGE}
    )
    done = stage.run(run)
    told = [(row["step"], row["watch/opinion"]) for row in metrics(run) if "watch/opinion" in row]
    rows = run.rows("ppo", name="snapshot")
    assert [step for step, _ in told] == [2, 4]
    assert len(rows) == 3 * 24 and len({row["id"] for row in rows}) == len(rows)
    assert {row["opinion"] for row in rows if row["step"] == 0} == {0.5}, "of the same text"
    best = max([(0, 0.5), *told], key=lambda item: (item[1], item[0]))[0]
    assert done["snapshot"] == best and done["alarms"], "what an untrained reward model makes of a policy"
    kept = sorted(path.name for path in Path(run.path("ppo", "snapshots")).iterdir())
    assert kept == [f"step-{best:06d}"], "one model is kept"
    best_weights = load_file(Path(run.path("ppo", "snapshots")) / kept[0] / "model.safetensors")
    assert all(torch.equal(tensor, best_weights[name]) for name, tensor in policy(run).items())


def test_an_alarm_stops_the_run_and_finish_takes_the_best_snapshot(ray_cluster: None, tmp_path: Path) -> None:
    """By the second opinion of a reward model, which needs no engine of its own."""
    run = ready_for_ppo(tmp_path, ppo=SMALL)
    watch = WATCH | {"every": 1, "max_length_drift": 1.0001, "limit": 8, "opinion": run.model("rm")}
    cfg = SMALL | {"steps": 40, "value_warmup_steps": 0, "checkpoint_every": 100}

    def run_with(how: str) -> Run:
        ppo = town_config(ppo=cfg | {"watch": watch | {"on_alarm": how}}).ppo
        return Run(run.config.model_copy(update={"ppo": ppo}))

    with pytest.raises(Stopped, match=r"ppo, step \d+: length: \d+ tokens .*on_alarm=finish") as stopped:
        train(run_with("stop"))
    said = str(stopped.value)
    with pytest.raises(Stopped) as again:
        train(run_with("stop"))
    assert str(again.value) == said, "at once, from the checkpoint of the alarm"
    done = train(run_with("finish"))
    assert f"best snapshot (step {done['snapshot']})" in said and done["alarms"]


def test_item_36_another_number_of_workers_goes_on(ray_cluster: None, one_rank: Run, tmp_path: Path) -> None:
    """Two ranks go on from what one saved after the second step, policy and value model alike."""

    def stopped(args: dict[str, Any]) -> dict[str, Any]:
        from cai_ray.train.ppo import loop as ppo
        from cai_ray.train.ppo import state
        from cai_ray.train.runtime import checkpoints

        save = state.save_checkpoint

        def save_and_stop(*given: Any) -> None:
            save(*given)
            checkpoints.wait_until_saved()
            raise Stopped("by the user")

        state.save_checkpoint = save_and_stop
        return ppo.loop(args)

    changes = SMALL | {"checkpoint_every": 2}
    run = ready_for_ppo(tmp_path, ppo=changes)
    with pytest.raises(Stopped, match="by the user"):
        train(run, stopped)
    run.config = run.config.model_copy(update={"ppo": run.config.ppo.model_copy(update={"workers": 2})})
    epoch = shared().join().epoch
    train(run)
    assert shared().join().epoch == epoch + 2
    rows, wanted = metrics(run), metrics(one_rank)
    for name in ("reward/mean", "kl/reference", "kl/coef", "ppo/value_loss", "ppo/learning_rate"):
        assert [row[name] for row in rows] == pytest.approx([row[name] for row in wanted], rel=1e-3, abs=1e-5)
    assert len(list(Path(run.path("ppo", "checkpoints")).glob("*/checkpoint_manager_snapshot.json"))) == 1
    for name, tensor in policy(one_rank).items():
        assert torch.allclose(tensor, policy(run)[name], atol=2e-4), name


def test_item_24_a_sync_that_sends_nothing_stops_the_run(ray_cluster: None, tmp_path: Path) -> None:
    """At the second sync: the engine goes on with the weights of the step before under the new number."""
    run = ready_for_ppo(tmp_path, ppo=SMALL | {"value_warmup_steps": 0})

    def loop(args: dict[str, Any]) -> dict[str, Any]:
        from cai_ray.train.ppo import loop as ppo
        from cai_ray.train.weights import object_store

        send, kept = object_store.send, {}

        def stale(pool: Any, tensors: Any, version: int, dtype: str | None = None) -> Any:
            now = {name: tensor.clone() for name, tensor in tensors}
            kept.setdefault("first", now)
            return send(pool, kept["first"].items(), version, dtype)

        object_store.send = stale
        return ppo.loop(args)

    with pytest.raises(Stopped, match=r"weight sync failed: engine 0, weights 1: holds other values"):
        train(run, loop)


def test_item_20_a_gap_above_the_limit_stops_the_run(ray_cluster: None, tmp_path: Path) -> None:
    run = ready_for_ppo(tmp_path, ppo=SMALL | {"max_logprob_gap": 1e-12})
    with pytest.raises(Stopped, match=r"more than ppo.max_logprob_gap=1e-12"):
        train(run)


def test_item_38_prompts_that_do_not_fit_are_counted(tmp_path: Path) -> None:
    run = ready_for_ppo(
        tmp_path, ppo=SMALL, prompts=[{"path": str(long_prompts(tmp_path)), "kind": "helpful"}]
    )
    prompts, errors = read_training_prompts(run, Renderer(run.model("sl")))
    assert len(prompts) == 2 and errors == 1


def test_item_38_a_row_longer_than_a_micro_batch_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ready_for_ppo(tmp_path, ppo=SMALL | {"micro_batch_tokens": 30})
    prompts, errors = read_training_prompts(run, Renderer(run.model("sl")))
    assert prompts and not errors
    assert "longer than ppo.micro_batch_tokens=30" in capsys.readouterr().err


def test_item_38_prompts_that_do_not_fit_max_length_are_counted(tmp_path: Path) -> None:
    given = [{"path": str(long_prompts(tmp_path)), "kind": "helpful"}]
    run = ready_for_ppo(tmp_path, ppo=SMALL | {"max_length": 100}, prompts=given)
    left_out = LeftOut()
    prompts, errors = read_training_prompts(run, Renderer(run.model("sl")), left_out=left_out)
    assert (len(prompts), errors, dict(left_out)) == (2, 1, {"too_long": 1})
    ppo = run.config.ppo.model_copy(update={"max_length": 2})
    short = Run(run.config.model_copy(update={"ppo": ppo}))
    with pytest.raises(InputError, match=r"ppo: none of 3 training prompts .*'too_long': 3"):
        read_training_prompts(short, Renderer(run.model("sl")))


def long_prompts(folder: Path) -> Path:
    texts = ["how do i boil the soup ?", "baker " * 400, "how do i read my own diary ?"]
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": t}) + "\n" for t in texts))
    return path


def shared_config() -> Any:
    return town_config(ppo=SMALL).ppo


def base() -> dict[str, torch.Tensor]:
    from cai_ray.town import BASE

    return load_file(Path(BASE) / "model.safetensors")
