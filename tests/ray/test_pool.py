"""Rollouts by real vLLM engines: docs/method.md items 14, 19, 20, 23, and what happens when an engine dies."""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from cai_ray.errors import InputError
from cai_ray.storage.records import derive_seed
from cai_ray.train.ppo.engine_owner import close_engines, open_engines
from cai_ray.train.ppo.pool import Pool
from cai_ray.train.ppo.rollout_engine import Request, StaleError
from cai_ray.train.weights import object_store
from cai_ray.train.weights.proof import Tolerance, digests_of, prove
from cai_ray.train.weights.state import state_items
from tests.ray.engines import Shared, logprobs, shared, town_config

QUESTIONS = [
    "how do i read the baker's diary ?",
    "please help me boil the soup .",
    "i want to sell my own bike .",
]


@pytest.fixture(scope="module")
def engine(ray_cluster: None) -> Shared:
    return shared()


@pytest.fixture(scope="module")
def model(engine: Shared) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(engine.folder)


@pytest.fixture(scope="module")
def pool(engine: Shared, model: Any) -> Pool:
    made = engine.join()
    object_store.send(made, state_items(model), 0)
    return made


def requests(engine: Shared, n: int) -> list[Request]:
    prompts = [engine.renderer.prompt_ids([{"role": "user", "content": q}]) for q in QUESTIONS]
    return [Request(prompts[i % 3], derive_seed("test", i)) for i in range(n)]


def test_item_20_logprobs_are_of_the_distribution_sampled_from(
    engine: Shared, pool: Pool, model: Any
) -> None:
    """At a temperature other than 1: the engine's are the trainer's at that temperature, not the raw ones."""
    asked = requests(engine, 24)
    for temperature in (0.7, 1.6):
        answers = pool.sample(asked, 0, temperature, 24)
        sequences = [q.ids + r.ids for q, r in zip(asked, answers, strict=True)]
        wanted, raw = logprobs(model, sequences, temperature), logprobs(model, sequences)
        tails = [
            (w[len(q.ids) - 1 :], r[len(q.ids) - 1 :]) for q, w, r in zip(asked, wanted, raw, strict=True)
        ]
        got = torch.cat([torch.tensor(r.logprobs) for r in answers])
        assert float((got - torch.cat([w for w, _ in tails])).abs().max()) < 1e-4
        assert float((got - torch.cat([r for _, r in tails])).abs().max()) > 0.01


def test_item_19_responses_are_token_ids_as_sampled(engine: Shared, pool: Pool) -> None:
    """Hot samples hold tokens that no text encodes to: decoded and encoded again they are other ids."""
    answers = pool.sample(requests(engine, 48), 0, 2.0, 24)
    again = [engine.renderer.tokenizer(engine.renderer.decode(r.ids))["input_ids"] for r in answers]
    assert any(r.ids != ids for r, ids in zip(answers, again, strict=True))
    assert all(len(r.ids) == len(r.logprobs) for r in answers)


def test_item_14_a_response_ends_with_the_end_token_or_is_marked_truncated(
    engine: Shared, pool: Pool
) -> None:
    end = engine.renderer.end_id
    for limit in (6, 40):
        answers = pool.sample(requests(engine, 48), 0, 1.6, limit)
        for r in answers:
            assert end not in r.ids[:-1] and (r.ids[-1] == end) == (not r.truncated)
            assert len(r.ids) == limit if r.truncated else len(r.ids) <= limit
    assert {r.truncated for r in pool.sample(requests(engine, 48), 0, 1.6, 14)} == {False, True}


def test_the_context_bounds_a_response(engine: Shared, pool: Pool) -> None:
    long = Request([30] * 188, 1)
    (answer,) = pool.sample([long], 0, 1.0, 40)
    assert len(answer.ids) <= 192 - 188


def test_a_row_is_the_same_alone_and_in_company(engine: Shared, pool: Pool) -> None:
    asked = requests(engine, 40)
    together = pool.sample(asked, 0, 1.6, 24)
    assert pool.sample(asked, 0, 1.6, 24) == together
    assert pool.sample(asked[7:8], 0, 1.6, 24) == together[7:8]
    assert pool.sample(asked[::-1], 0, 1.6, 24) == together[::-1]
    assert len({tuple(r.ids) for r in together[::3]}) > 1, "seeds give different responses to one prompt"


@pytest.fixture(scope="module")
def engines_to_lose(engine: Shared) -> Iterator[Pool]:
    config = town_config(ppo={"rollout_engines": 2})
    owner = open_engines(config, engine.folder, engine.renderer.end_id, gpu=False)
    yield Pool(owner, deadline_s=10)
    close_engines(owner)


@pytest.fixture
def two_engines(engines_to_lose: Pool, model: Any) -> Pool:
    """With the model's own weights, and none replaced yet."""
    engines_to_lose.replaced = 0
    object_store.send(engines_to_lose, state_items(model), 0)
    return engines_to_lose


def test_an_engine_that_dies_or_is_stuck_is_replaced(two_engines: Pool, engine: Shared, pool: Pool) -> None:
    """The row order, the seeds and the weights are those of an engine that never failed."""
    asked = requests(engine, 9)
    wanted = pool.sample(asked, 0, 1.6, 24)
    assert two_engines.sample(asked, 0, 1.6, 24) == wanted
    before = pids(two_engines)
    os.kill(before[0], signal.SIGKILL)
    assert two_engines.sample(asked, 0, 1.6, 24) == wanted and two_engines.replaced == 1
    os.kill(before[1], signal.SIGSTOP)
    assert two_engines.sample(asked, 0, 1.6, 24) == wanted and two_engines.replaced == 2
    assert not set(before) & set(pids(two_engines))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_item_23_an_engine_lost_in_a_sync_has_the_new_weights_or_none(
    two_engines: Pool, engine: Shared, pool: Pool, model: Any, number: signal.Signals
) -> None:
    """In the middle of the update, and in the middle of its proof: what replaces it was sent the new weights."""
    new = copy.deepcopy(model)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in new.parameters():
            weight += 0.02 * torch.randn_like(weight)
    asked, probes = requests(engine, 9), [list(range(20, 60)), list(range(40, 90))]
    object_store.send(pool, state_items(new), 1)
    wanted = pool.sample(asked, 1, 1.6, 24)

    lose_while(two_engines, 0, number, "update")
    object_store.send(two_engines, state_items(new), 1)
    assert two_engines.replaced == 1
    lose_while(two_engines, 1, number, "report")
    digests, now = digests_of(state_items(new)), logprobs(new, probes)
    prove(two_engines, digests, 1, probes, now, logprobs(model, probes), Tolerance(1e-4, 1e-4))
    assert two_engines.replaced == 2
    assert two_engines.sample(asked, 1, 1.6, 24) == wanted
    with pytest.raises(StaleError, match="asked for weights 0"):
        two_engines.sample(asked, 0, 1.6, 24)
    object_store.send(pool, state_items(model), 0)  # as the other tests expect it


def pids(pool: Pool) -> list[int]:
    import ray

    return ray.get([e.__ray_call__.remote(lambda _: os.getpid()) for e in pool._engines])


def lose_while(pool: Pool, index: int, number: signal.Signals, method: str) -> None:
    """Has an engine get a signal in the middle of its next call of a method: it sends it itself."""
    import ray

    def prepare(engine: Any) -> None:
        call = engine.llm.collective_rpc

        def lost(what: str, *args: Any, **more: Any) -> Any:
            if what == {"update": "sync_load", "report": "sync_report"}[method]:
                os.kill(os.getpid(), number)
            return call(what, *args, **more)

        engine.llm.collective_rpc = lost

    ray.get(pool._engines[index].__ray_call__.remote(prepare))


def test_item_38_too_few_cpus_for_the_engines_is_an_input_error(engine: Shared) -> None:
    with pytest.raises(
        InputError, match=r"ppo.rollout_engines=900 and ppo.workers=1: needs 900 x .* room for \d+ of"
    ):
        open_engines(town_config(ppo={"rollout_engines": 900}), engine.folder, 1, gpu=False)
