"""What a run has cost: records of attempts, prices, limits; and the arithmetic of an estimate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cai_ray import pipeline
from cai_ray.cluster import cost, holder
from cai_ray.cluster.cost import Attempt, Spent
from cai_ray.cluster.usage import Usage
from cai_ray.config.cost import PricesConfig
from cai_ray.config.load import load_config
from cai_ray.config.run import RunConfig
from cai_ray.errors import InputError, OverBudget
from cai_ray.estimate import lines, sample, scale
from cai_ray.provenance.inputs import inputs
from cai_ray.provenance.status import status
from cai_ray.report import costs
from cai_ray.storage import files
from cai_ray.storage.run import Run

ENDPOINT = {
    "input_per_million_tokens": 2.0,
    "cached_input_per_million_tokens": 1.0,
    "output_per_million_tokens": 10.0,
}
PRICES = PricesConfig.model_validate(
    {"gpu_hour": 3.0, "generation_gpu_hour": 1.0, "cpu_hour": 0.5, "endpoint": ENDPOINT}
)


def load(out: Path, *overrides: str) -> RunConfig:
    return load_config("errand-town", list(overrides), out=str(out))


def attempt(name: str, stage: str, made: str | None = None, **spent: Any) -> Attempt:
    return Attempt(name, stage, "inputs", "2026-01-01T00:00:00Z", made, Spent(**spent))


def test_money_is_of_gpus_cpus_and_the_tokens_of_endpoints() -> None:
    held = Spent(cpu_seconds=7200, gpu_seconds=1800)
    assert cost.money(held, "sft", PRICES) == pytest.approx(2 * 0.5 + 0.5 * 3)
    assert cost.money(held, "label", PRICES) == pytest.approx(2 * 0.5 + 0.5 * 1)
    same = PRICES.model_copy(update={"generation_gpu_hour": None})
    assert cost.money(held, "label", same) == cost.money(held, "sft", PRICES)
    asked = Spent(endpoint=Usage(prompt=1_000_000, cached=400_000, generated=50_000, calls=9))
    assert cost.money(asked, "label", PRICES) == pytest.approx(0.6 * 2 + 0.4 * 1 + 0.05 * 10)
    uncached = PricesConfig.model_validate({"endpoint": {"input_per_million_tokens": 2.0}})
    assert cost.money(asked, "label", uncached) == pytest.approx(2)
    assert cost.money(held, "label", uncached) == 0
    assert cost.money(held, "sft", None) is None


def test_what_endpoints_refused_is_recorded_by_attempt(tmp_path: Path) -> None:
    run = Run(load(tmp_path))
    attempt("label-1", "label")._replace(left_out={"seed": None, "top_logprobs": 5}).write(run)  # killed
    attempt("label-2", "label")._replace(left_out={"max_tokens": "max_completion_tokens"}).write(run)
    attempt("label-0", "label", made="before")._replace(left_out={"top_p": None}).write(run)
    assert cost.left_out(run, "label", "inputs") == {
        "seed": None, "top_logprobs": 5, "max_tokens": "max_completion_tokens",
    }  # fmt: skip
    assert cost.left_out(run, "label", "others") == {}


def test_attempts_add_up_to_the_stage_that_they_led_to(tmp_path: Path) -> None:
    run = Run(load(tmp_path))
    for name, seconds in (("revise-1", 10.0), ("revise-2", 5.0)):
        attempt(name, "revise", wall_seconds=seconds, endpoint=Usage(1, 0, 2, 1)).write(run)
    attempt("revise-0", "revise", made="before", wall_seconds=100.0).write(run)
    attempt("sft-1", "sft", wall_seconds=50.0).write(run)
    attempt("revise-3", "revise", wall_seconds=70.0)._replace(inputs="others").write(run)
    found = cost.resources(run, "revise", "inputs")
    assert (found["attempts"], found["wall_seconds"]) == (2, 15.0)
    assert found["endpoint"] == {"prompt": 2, "cached": 0, "generated": 4, "calls": 2}
    assert Spent.from_dict(found) == Spent(wall_seconds=15.0, endpoint=Usage(2, 0, 4, 2))
    cost.settle(run, "revise", "inputs", "now")
    assert cost.resources(run, "revise", "inputs")["attempts"] == 0
    assert {a.name: a.made for a in cost.attempts(run)} == {
        "revise-0": "before", "revise-1": "now", "revise-2": "now", "revise-3": None, "sft-1": None,
    }  # fmt: skip
    assert cost.total(cost.attempts(run)).wall_seconds == 235.0


def test_a_damaged_record_of_an_attempt_is_named(tmp_path: Path) -> None:
    run = Run(load(tmp_path))
    attempt("revise-1", "revise", wall_seconds=10.0).write(run)
    (record,) = tmp_path.glob("spent/*.json")
    record.write_bytes(record.read_bytes()[:9])
    with pytest.raises(
        InputError, match=r"spent/revise-1\.json: is not valid JSON .*; delete it; what that attempt cost"
    ):
        cost.attempts(run)


@pytest.mark.parametrize(
    ("limit", "says"),
    [
        ("gpu_hours=1", "1.5 of 1 GPU hours (budget.gpu_hours)"),
        ("cpu_hours=2.5", "3 of 2.5 CPU hours (budget.cpu_hours)"),
        ("wall_hours=0.5", "0.5 of 0.5 hours (budget.wall_hours)"),
        ("money=4", "4.5 of 4 EUR (budget.money)"),
        ("gpu_hours=1.6", None),
        ("money=4.6", None),
    ],
)
def test_a_limit_is_on_all_that_the_run_has_seen(tmp_path: Path, limit: str, says: str | None) -> None:
    config = load(tmp_path, f"budget.{limit}", "prices={currency: EUR, gpu_hour: 2, cpu_hour: 0.5}")
    found = [
        attempt("a", "revise", made="gone", wall_seconds=1800, cpu_seconds=7200, gpu_seconds=3600),
        attempt("b", "sft", cpu_seconds=3600, gpu_seconds=1800),
    ]
    said = cost.over_budget(config, found)
    if says is None:
        assert said is None
    else:
        assert said and says in said
        more = said.rpartition("--set ")[2]
        assert cost.over_budget(load(tmp_path, more, "prices={gpu_hour: 2, cpu_hour: 0.5}"), found) is None


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("budget.money=3", "budget.money=3 needs prices"),
        ("budget.money=0", "budget.money"),
        ("budget.gpu_hour=1", "did you mean 'gpu_hours'"),
        ("prices={}", "no price is given"),
        ("prices={gpu_hour: -1}", "prices.gpu_hour"),
        ("prices={gpu: 1}", "known keys: currency, gpu_hour"),
    ],
)
def test_a_budget_that_cannot_be(tmp_path: Path, given: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        load(tmp_path, given)


def test_prices_and_limits_change_no_stage(tmp_path: Path) -> None:
    plain = inputs(Run(load(tmp_path)), "revise")
    bounded = load(tmp_path, "prices={gpu_hour: 2}", "budget={gpu_hours: 1, money: 5}")
    assert inputs(Run(bounded), "revise") == plain


def test_over_its_budget_a_run_starts_no_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(config: RunConfig) -> None:
        raise AssertionError("nothing may be started")

    monkeypatch.setattr("cai_ray.cluster.connect.connect", connect)
    config = load(tmp_path, "budget.cpu_hours=1")
    attempt("revise-1", "revise", made="gone", cpu_seconds=3600).write(Run(config))
    with pytest.raises(OverBudget, match="before revise: the budget is spent: 1 of 1 CPU hours"):
        pipeline.run_stages(config, ["revise"], say=lambda _: None)
    with pytest.raises(AssertionError, match="nothing may be started"):
        pipeline.run_stages(load(tmp_path, "budget.cpu_hours=2"), ["revise"], say=lambda _: None)


def test_endpoints_are_paid_for_every_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holder, "_paid", Usage())
    holder.count_paid(Usage(10, 4, 1, 1))
    holder.count_paid(Usage(10, 0, 0, 1))
    assert holder._paid == Usage(20, 4, 1, 2)


def test_what_was_thrown_away_is_in_the_sum(tmp_path: Path) -> None:
    run = Run(load(tmp_path, "prices={cpu_hour: 3.6}"))
    spent = Spent(wall_seconds=10, cpu_seconds=20)
    manifest = {"id": "now", "seconds": 9.0, "tokens": {"trained": 5}, "resources": spent.as_dict()}
    files.write_json(run.path("sft", "manifest.json"), manifest)
    attempt("sft-1", "sft", made="now", wall_seconds=10, cpu_seconds=20).write(run)
    attempt("sft-0", "sft", made="before", wall_seconds=4, cpu_seconds=5).write(run)
    attempt("rm-0", "rm", wall_seconds=1, cpu_seconds=1).write(run)
    found = costs.read(run)
    assert found["stages"]["sft"]["money"] == pytest.approx(0.02)
    assert found["set_aside"]["cpu_seconds"] == 6
    assert (found["total"]["wall_seconds"], found["total"]["money"]) == (15, pytest.approx(0.026))
    rows = {row["stage"]: row for row in status(run)}
    assert (rows["sft"]["cpu_seconds"], rows["rm"]["cpu_seconds"]) == (20, 1)
    assert "cpu_seconds" not in rows["revise"]


def test_a_sample_has_each_kind_in_its_share() -> None:
    prompts = [{"id": f"{i}", "kind": "helpful" if i % 10 == 0 else "red_team"} for i in range(200)]
    chosen = sample.choose(prompts, 20, seed=0)
    assert [p["kind"] for p in chosen].count("helpful") == 2 and len(chosen) == 20
    assert chosen == sample.choose(list(reversed(prompts)), 20, seed=0)
    assert chosen != sample.choose(prompts, 20, seed=1)
    rare = [*prompts[1:10], {"id": "x", "kind": "helpful"}]
    assert {p["kind"] for p in sample.choose(rare, 2, seed=0)} == {"red_team", "helpful"}
    assert len(sample.choose(prompts, 999, seed=0)) == 200


def test_the_configuration_of_a_sample(tmp_path: Path) -> None:
    given = ("revise.limit=100", "engine.max_actors=6", "budget.cpu_hours=1", "label.gates={max_ece: 0.01}")
    config = load(tmp_path / "run", *given, "ppo.value_warmup_steps=0")
    small = sample.sampled(config, str(tmp_path / "sample"), 10)
    assert len(sample.prompts_of(small)["revise"]) == 10
    ids = {p["id"] for p in sample.prompts_of(config)["revise"]}
    assert {p["id"] for p in sample.prompts_of(small)["revise"]} < ids, "rows of the run itself"
    assert small.engine.max_actors == 1 and not small.budget.given and small.label.gates.max_ece is None
    assert (small.ppo.steps, small.ppo.value_warmup_steps) == (2, 0)
    assert small.ppo.rollout_batch == config.ppo.rollout_batch
    assert small.out.startswith(str(tmp_path / "sample"))


def test_usage_grows_by_kind() -> None:
    few = {"red_team": (2, Usage(200, 20, 40, 18)), "helpful": (1, Usage(10, 0, 8, 1))}
    assert scale.whole_usage(few, {"red_team": 10, "helpful": 3}) == Usage(1030, 100, 224, 93)
    assert scale.whole_usage(few, {"other": 3}) == Usage(210, 20, 48, 19)


def test_the_start_does_not_grow() -> None:
    spent = Spent(wall_seconds=30, cpu_seconds=60, gpu_seconds=15, endpoint=Usage(10, 0, 1, 1))
    whole = scale.scaled(spent, work=10, whole=100, endpoint=10)
    assert whole.wall_seconds == 20 + 100
    assert (whole.cpu_seconds, whole.gpu_seconds) == (240, 60)
    assert whole.endpoint == Usage(100, 0, 10, 10)
    four = scale.scaled(spent, work=10, whole=100, at_once=4)
    assert four.wall_seconds == 20 + 25
    assert four.cpu_seconds == pytest.approx(4 * 2 * 45)


def test_rates_of_training_leave_the_first_step_out() -> None:
    assert scale.rate([{"tokens/per_s": v} for v in (1, 10, 12, 11)]) == 11
    assert scale.rate([{"tokens/per_s": 3}]) == 3
    steps = [{"time/sample_s": s, "time/update_s": 1.0, "time/rollout_s": 99.0} for s in (5.0, 4.0, 3.0)]
    assert scale.ppo_seconds(steps, warmup=1) == (15.0, 4.0, 4.0)
    assert scale.ppo_seconds(steps[1:], warmup=0) == (9.0, 0.0, 4.0)


def test_an_estimate_as_a_table() -> None:
    stage = {
        "stage": "label", "rows": 1200, "tokens": {"prompt": 5000, "cached": 0}, "wall_seconds": 7200.0,
        "start_seconds": 30.0, "cpu_seconds": 90.0, "gpu_seconds": 0.0, "money": 1.5, "how": "32 rows in 2.0 s",
    }  # fmt: skip
    found = {
        "sample": {"prompts": 32, "of": {"revise": "32 of 900"}, "models": ["sft"]},
        "currency": "USD", "done": ["sft"], "stages": [stage], "notes": ["a note"],
        "total": {"wall_seconds": 7200.0, "cpu_seconds": 90.0, "gpu_seconds": 0.0, "money": 1.5},
    }  # fmt: skip
    told = lines(json.loads(json.dumps(found)))
    assert "GPU" not in told[0] and told[0].startswith("estimate")
    assert "2.00 h" in told[1] and "1.50 USD" in told[1] and "1,200" in told[1] and "5.0 k prompt" in told[1]
    assert told[-3:] == [
        "estimated from a sample that was run (prompts: revise 32 of 900), with the run's own sft",
        "already done, and not in the estimate: sft",
        "a note",
    ]
