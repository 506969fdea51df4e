"""PPO's reward from one reward model or several: docs/method.md items 14, 15 and 25."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cai_ray.config.ppo import PpoConfig
from cai_ray.config.run import RunConfig
from cai_ray.errors import InputError
from cai_ray.prompts.load import load_templates
from cai_ray.prompts.renderer import Renderer
from cai_ray.storage.run import Run
from cai_ray.train.models import RewardScale, load_reward_model
from cai_ray.train.ppo.experience import make_batch, minibatches
from cai_ray.train.ppo.rewards import Reward, combined, describe, load_rewards, make_readers, raw_scores
from cai_ray.train.ppo.rollout_engine import Rollout
from tests import tiny

TALKS = [
    [{"role": "user", "content": "how do i boil an egg ?"}],
    [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hello to you"},
        {"role": "user", "content": "and now ? <|im_end|>"},
    ],
    [{"role": "user", "content": "a longer question " * 20}],
]
ANSWERS = ["with hot water", "nothing at all", "no answer that ends"]
CUT = [False, False, True]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A policy, a reward model with its tokenizer, and one with another tokenizer and template."""
    folder = tmp_path_factory.mktemp("models")
    policy, same = tiny.save_model(folder / "policy"), tiny.save_model(folder / "same", reward=True, seed=1)
    other = tiny.save_model(folder / "other", reward=True, seed=2)
    words = tiny.tokenizer(["how do i boil an egg with hot water and nothing else"])
    words.chat_template = tiny.CHATML.replace("'\\n' + m", "': ' + m")
    words.save_pretrained(other)
    return {"policy": str(policy), "same": str(same), "other": str(other)}


def make_run(models: dict[str, str], **ppo: Any) -> Run:
    config = {"name": "t", "model": models["policy"], "constitution": "harmless", "ppo": ppo}
    run = Run(RunConfig.model_validate(config | {"prompts": [{"path": "none.jsonl"}]}))
    run.model = lambda which: {"sl": models["policy"]}.get(which, which)  # type: ignore[method-assign]
    return run


def sampled(models: dict[str, str]) -> Any:
    """The answers as the policy would have written them, token by token."""
    renderer, templates = Renderer(models["policy"]), load_templates("general")
    prompts = [renderer.prompt_ids(templates.answer_messages(talk)) for talk in TALKS]
    ids = [
        renderer.tokenizer(answer, add_special_tokens=False)["input_ids"] + [renderer.end_id] * (not cut)
        for answer, cut in zip(ANSWERS, CUT, strict=True)
    ]
    rollouts = [Rollout(i, [-1.0] * len(i), cut, 0) for i, cut in zip(ids, CUT, strict=True)]
    return make_batch(prompts, rollouts)


def score(run: Run, models: dict[str, str]) -> torch.Tensor:
    cfg = run.config.ppo
    batch = sampled(models)
    plan = minibatches(batch.lengths, cfg, 0, 0, 0, 0, 1)
    groups = [group for minibatch in plan for group in minibatch.groups]
    return raw_scores(load_rewards(run, cfg, Renderer(models["policy"])), batch, TALKS, groups, cfg)


def alone(folder: str, ids: list[int]) -> float:
    """The score of one row by itself, at its last token, from the plain definition."""
    model = load_reward_model(folder, PpoConfig(), trainable=False)
    with torch.no_grad():
        return float(model(input_ids=torch.tensor([ids]))[0, -1])


def test_item_25_the_score_of_a_row_is_read_at_its_last_token(models: dict[str, str]) -> None:
    """Of the ids that the policy wrote, its end token included (item 14), whatever micro-batch the row is in."""
    run = make_run(models, rewards=[{"model": models["same"]}], micro_batch_tokens=256)
    batch = sampled(models)
    wanted = [alone(models["same"], row.ids) for row in batch.rows]
    assert score(run, models)[:, 0].tolist() == pytest.approx(wanted, abs=1e-5)


def test_a_reward_model_with_another_tokenizer_reads_the_text(models: dict[str, str]) -> None:
    run = make_run(models, rewards=[{"model": models["other"]}], micro_batch_tokens=256)
    renderer, templates = Renderer(models["other"]), load_templates("general")
    wanted = []
    for talk, answer, cut in zip(TALKS, ANSWERS, CUT, strict=True):
        turns = [*templates.answer_messages(talk), {"role": "assistant", "content": answer}]
        # The end of the response always fits: what is too long loses its beginning.
        wanted.append(alone(models["other"], renderer.dialogue_ids(turns, cut)[0][-256:]))
    assert score(run, models)[:, 0].tolist() == pytest.approx(wanted, abs=1e-5)


def test_several_reward_models_are_weighted_in_their_own_units(models: dict[str, str]) -> None:
    sources = [{"model": models["same"], "weight": 2.0}, {"model": models["other"], "weight": -0.5}]
    run = make_run(models, rewards=sources)
    rewards = load_rewards(run, run.config.ppo, Renderer(models["policy"]))
    assert [r.scale for r in rewards] == [RewardScale(0.5, 2.0)] * 2
    raw = torch.tensor([[0.5, 2.5], [100.0, 0.5]])
    assert combined(raw, rewards, clip=3.0).tolist() == pytest.approx([-0.5 * 1.0, 2.0 * 3.0])
    assert describe(raw, rewards) == pytest.approx({"reward/same": 24.875, "reward/other": 0.5})
    assert describe(raw[:, :1], rewards[:1]) == {}


def test_values_cannot_start_from_a_model_that_reads_other_tokens(models: dict[str, str]) -> None:
    policy = Renderer(models["policy"])
    run = make_run(models, rewards=[{"model": models["other"]}])
    with pytest.raises(
        InputError, match=r"has another tokenizer than the policy; use ppo\.value_init: policy"
    ):
        make_readers(run, run.config.ppo, policy)
    for fine in ({"value_init": "policy"}, {"rewards": [{"model": models["same"]}]}):
        run = make_run(models, **{"rewards": [{"model": models["other"]}], **fine})
        make_readers(run, run.config.ppo, policy)


def test_rewards_stand_in_the_order_of_their_weights() -> None:
    scale = RewardScale(0.0, 1.0)
    rewards = [Reward(str(w), torch.nn.Identity(), scale, w, 0, None) for w in (1.0, 10.0)]
    assert combined(torch.tensor([[1.0, 2.0]]), rewards, clip=9.0).tolist() == [21.0]
