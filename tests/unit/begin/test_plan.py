"""The settings of a first run, on machines and models of all sizes."""

from typing import Any, cast

import pytest
import yaml

from cai_ray.begin.lengths import Lengths
from cai_ray.begin.machine import Machine
from cai_ray.begin.model import ModelFacts, StepTokens
from cai_ray.begin.plan import SAVINGS, Setting, choose_amounts, plan
from cai_ray.begin.write import nested, to_yaml
from cai_ray.config.load import validate
from cai_ray.config.run import RunConfig
from cai_ray.estimate.shape import Shape

LENGTHS = Lengths(prompt=100, answer=64, context=2048, seen="seen")
COUNTS = {"train": 500, "development": 40, "held_out": 60}


def model(params: float) -> ModelFacts:
    shape = Shape(int(params), 30, 576, 192, 1536, 49152, 0, 8192, False, ())
    return ModelFacts("org/name", cast(Any, None), cast(Any, None), "general", True, shape)


def config(settings: list[Setting]) -> RunConfig:
    given = {"name": "t", "model": "m", "constitution": "harmless", "prompts": [{"path": "x"}]}
    data = nested(settings)
    if data.get("ppo", {}).get("watch"):
        data["ppo"]["watch"]["prompts"] = [{"path": "x"}]
    return validate(given | data, "test")


@pytest.mark.parametrize("gpus", [0, 1, 2, 3, 4, 6, 8, 16])
@pytest.mark.parametrize("params", [2e5, 135e6, 8e9])
@pytest.mark.parametrize("train", [6, 25, 500])
def test_settings_are_valid_and_fit_the_gpus(gpus: int, params: float, train: int) -> None:
    machine = Machine(8, 32, gpus, 80 if gpus else 0)
    for saving in SAVINGS:
        made = config(plan(model(params), LENGTHS, machine, COUNTS | {"train": train}, saving))
        assert made.method == ("dpo" if gpus == 1 else "ppo")
        assert made.revise.limit == made.compare.limit <= train
        for section in (made.sft, made.rm, made.ppo, made.dpo):
            assert section.workers <= max(1, gpus)
            assert section.micro_batch_tokens >= LENGTHS.context
        if gpus > 1:
            judge = 1 if made.ppo.watch.asks_judge else 0
            assert made.ppo.workers + made.ppo.rollout_engines + judge <= gpus


def test_a_small_model_takes_minutes_on_a_laptop() -> None:
    amounts = choose_amounts(135_000_000, LENGTHS, Machine(4, 16, 0, 0), 5000)
    assert 32 <= amounts.prompts <= 256 and 4 <= amounts.ppo_steps <= 20
    assert amounts.seconds <= 30 * 60


def test_a_slower_machine_and_longer_texts_do_less() -> None:
    def prompts(params: int, cores: int, answer: int) -> int:
        lengths = LENGTHS._replace(answer=answer)
        return choose_amounts(params, lengths, Machine(cores, 64, 0, 0), 5000).prompts

    assert prompts(135_000_000, 2, 64) < prompts(135_000_000, 4, 64)
    assert prompts(135_000_000, 4, 96) < prompts(135_000_000, 4, 64)
    assert prompts(8_000_000_000, 4, 64) == 32


def test_a_step_has_room_for_its_longest_prompt() -> None:
    steps = StepTokens(critique=700, revision=900, feedback=500)
    assert steps.needed(prompt=100, answer=64) == 100 + 900 + 3 * 64
    assert StepTokens(0, 0, 500).needed(100, 64) == 100 + 500 + 2 * 64 + 1


@pytest.mark.parametrize(
    "value",
    [
        "plain",
        "org/name@v2",
        "./a b.jsonl",
        "über/böse: #1.jsonl",
        "yes",
        "1e5",
        "null",
        "[x]",
        'say "hi"',
        "a\tb",
        "",
    ],
)
def test_any_text_is_itself_again_in_the_yaml(value: str) -> None:
    settings = [
        Setting("model", value, "why"),
        Setting("prompts", [{"path": value}], "why: # and why not"),
        Setting("sft.lora", {"rank": 32, "note": value}, ""),
        Setting("sft.learning_rate", 1e-05, "why"),
        Setting("ppo.watch.every", 2, "why"),
        Setting("ppo.steps", 4, "why"),
    ]
    read = yaml.safe_load(to_yaml(["Head: of it"], settings))
    assert read == nested(settings)
    assert isinstance(read["sft"]["learning_rate"], float)
