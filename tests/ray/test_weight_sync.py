"""Weight sync against a real vLLM engine: docs/method.md items 23 and 24.

The update in these tests is of the size of a PPO step at the demo's learning rate (AdamW, 1e-4, four steps).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cai_ray.train.ppo.pool import Pool
from cai_ray.train.ppo.rollout_engine import Request, StaleError
from cai_ray.train.weights import object_store
from cai_ray.train.weights.object_store import pack, unpack
from cai_ray.train.weights.proof import TOLERANCE, Proof, SyncError, check_probes, digest, digests_of, prove
from tests.ray.engines import Shared, logprobs, shared, weights

FP32 = TOLERANCE["float32"].largest
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def engine(ray_cluster: None) -> Shared:
    return shared()


@pytest.fixture(scope="module")
def versions(engine: Shared) -> tuple[list[list[int]], list[dict[str, Tensor]], list[list[Tensor]]]:
    """Probes, the weights of two versions one PPO step apart, and their log-probabilities of the probes."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(engine.folder)
    torch.manual_seed(1)
    probes = torch.randint(0, 550, (12, 48)).tolist()
    states, values = [weights(model)], [logprobs(model, probes)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.0)
    ids = torch.randint(0, 550, (16, 40))
    for _ in range(4):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return probes, [*states, weights(model)], [*values, logprobs(model, probes)]


@pytest.fixture
def pool(engine: Shared, versions: Any) -> Pool:
    """A pool whose engine was sent version 0."""
    made = engine.join()
    object_store.send(made, versions[1][0].items(), 0)
    return made


def prove_version(pool: Pool, versions: Any, version: int = 1) -> Proof:
    probes, states, values = versions
    return prove(
        pool, digests_of(states[1].items()), version, probes, values[1], values[0], TOLERANCE["float32"]
    )


def forward_gap(pool: Pool, versions: Any, version: int = 1) -> float:
    """What the engine's log-probabilities alone show."""
    probes, _, values = versions
    (_, got), *_ = pool.report(probes, version)
    return float((torch.tensor(got) - torch.stack(values[1])).abs().max())


def test_item_24_a_send_is_proved_on_tokens_that_moved(pool: Pool, versions: Any) -> None:
    probes, states, values = versions
    prove(pool, digests_of(states[0].items()), 0, probes, values[0], None, TOLERANCE["float32"])
    sent = [object_store.send(pool, states[1].items(), v) for v in (1, 2, 3)]
    proof = prove_version(pool, versions, version=3)
    assert proof.gap <= FP32 and proof.moved > 10 * FP32 and proof.shown > 100
    print({"send_s": [round(s.seconds, 3) for s in sent], **proof._asdict()})


def test_item_24_a_skipped_send_fails_the_proof(pool: Pool, versions: Any) -> None:
    with pytest.raises(SyncError, match="holds weights 0"):
        prove_version(pool, versions)


def test_item_24_a_send_of_nothing_under_a_new_number_fails_the_proof(pool: Pool, versions: Any) -> None:
    object_store.send(pool, (), 1)
    with pytest.raises(SyncError, match="did not receive"):
        prove_version(pool, versions)
    assert forward_gap(pool, versions) > 10 * FP32


def test_item_24_the_weights_of_the_step_before_fail_the_proof(pool: Pool, versions: Any) -> None:
    object_store.send(pool, versions[1][0].items(), 1)
    with pytest.raises(SyncError, match="holds other values"):
        prove_version(pool, versions)
    # Without digests the forward pass says so too.
    probes, _, values = versions
    (_, got), *_ = pool.report(probes, 1)
    old, new = torch.cat(values[0]), torch.cat(values[1])
    with pytest.raises(SyncError, match="nearer to the weights before"):
        check_probes(torch.tensor(got).flatten(), new, old, TOLERANCE["float32"], "engine")


def test_item_24_any_tensor_left_out_fails_the_proof(pool: Pool, versions: Any) -> None:
    """Of every tensor, norms and the tied head included; and the forward pass alone shows it, too."""
    states = versions[1]
    unseen = []
    for name in states[1]:
        # The same number each time: only what was received differs.
        object_store.send(pool, states[0].items(), 0)
        object_store.send(pool, ((n, t) for n, t in states[1].items() if n != name), 1)
        with pytest.raises(SyncError, match=f"did not receive {name}"):
            prove_version(pool, versions)
        if forward_gap(pool, versions) <= FP32:
            unseen.append(name)
    # The engine's embedding and head are one parameter: either tensor fills it, only the head renews the packed copy.
    assert unseen == [EMBEDDING]


def test_item_24_the_tied_head_must_be_sent(versions: Any) -> None:
    assert torch.equal(versions[1][1][HEAD], versions[1][1][EMBEDDING])


def test_item_24_an_update_too_small_for_the_forward_pass_is_seen(pool: Pool, versions: Any) -> None:
    """One unit in the last place of one norm weight."""
    name = "model.layers.3.input_layernorm.weight"
    stale = dict(versions[1][1])
    stale[name] = stale[name].clone()
    stale[name][7] = torch.nextafter(stale[name][7], torch.tensor(9.0))
    object_store.send(pool, stale.items(), 1)
    assert forward_gap(pool, versions) <= FP32
    with pytest.raises(SyncError, match=f"holds other values in {name}"):
        prove_version(pool, versions)


def test_item_23_the_prefix_cache_is_reset_at_every_update(pool: Pool, engine: Shared, versions: Any) -> None:
    """The same long prompt under two versions: the second must not read the first's keys and values."""
    from transformers import AutoModelForCausalLM

    probes, states, _ = versions
    long = [Request(probes[0] + probes[1], seed) for seed in range(8)]
    model = AutoModelForCausalLM.from_pretrained(engine.folder)
    for version in (0, 1):
        object_store.send(pool, states[version].items(), version)
        model.load_state_dict(states[version])
        rollouts = pool.sample(long, version, 1.0, 8)
        assert {r.version for r in rollouts} == {version}
        wanted = logprobs(model, [q.ids + r.ids for q, r in zip(long, rollouts, strict=True)])
        for request, rollout, row in zip(long, rollouts, wanted, strict=True):
            got = torch.tensor(rollout.logprobs)
            assert torch.allclose(got, row[len(request.ids) - 1 :], atol=FP32)


def test_item_23_no_engine_answers_for_another_version(pool: Pool, versions: Any) -> None:
    with pytest.raises(StaleError, match="asked for weights 1; the engine has 0"):
        pool.sample([Request([5, 6], 0)], 1, 1.0, 4)


def test_no_engine_answers_an_epoch_that_is_over(engine: Shared, versions: Any) -> None:
    first = engine.join()
    object_store.send(first, versions[1][0].items(), 0)
    second = engine.join()
    assert second.epoch == first.epoch + 1
    with pytest.raises(StaleError, match="asked for epoch"):
        first.sample([Request([5, 6], 0)], 0, 1.0, 4)
    with pytest.raises(StaleError, match="asked for epoch"):
        object_store.send(first, versions[1][0].items(), 1)
    # Joined, and sent nothing yet: it has no weights, though it has the same ones in memory.
    with pytest.raises(StaleError, match="the engine has None"):
        second.sample([Request([5, 6], 0)], 0, 1.0, 4)


def test_packing_keeps_every_bit() -> None:
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(4).bfloat16(),
        "c": torch.arange(6).reshape(2, 3),
        "d": torch.tensor(2.5),
    }
    back = {n: t for chunk in pack(tensors.items(), None) for n, t in unpack(chunk)}
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[n], t) and back[n].dtype == t.dtype for n, t in tensors.items())


def test_digests_see_every_bit_and_the_order() -> None:
    torch.manual_seed(0)
    for x in (torch.randn(7, 3), torch.randn(21).bfloat16()):
        flat = x.flatten()
        changed = x.clone().flatten()
        changed[4] = torch.nextafter(changed[4], torch.full_like(changed[4], 9.0))
        assert len({digest(x), digest(changed), digest(flat.flip(0)), digest(torch.zeros_like(x))}) == 4
        assert digest(x) == digest(x.clone()) == digest(x, step=5)
    assert digest(torch.zeros(3)) != digest(torch.zeros(4))
