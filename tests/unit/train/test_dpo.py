"""DPO's step and measures in plain PyTorch, without Ray and DeepSpeed: docs/method.md items 18 and 30."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cai_ray.config.training import DpoConfig
from cai_ray.train import comparisons, dpo
from cai_ray.train.batches import Example, pad
from cai_ray.train.dialogues import pack
from cai_ray.train.models import load_policy
from tests import tiny

P_A = [0.9, 0.2, 0.5, 1.0, 0.35, 0.8, 0.6]
HUMAN = [False, False, False, True, True, False, True]
BATCH = list(range(len(P_A)))


class Plain:
    """A model with the calls of `engine.Trained`; a step only returns the gradient's norm."""

    def __init__(self, module: Any):
        self.module = module

    def __call__(self, **inputs: Any) -> Any:
        return self.module(**inputs)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self) -> float:
        return float(torch.stack([p.grad.norm() for p in self.module.parameters()]).norm())


@pytest.fixture
def data() -> comparisons.Pairs:
    rng = np.random.default_rng(0)
    examples = []
    for length in rng.integers(3, 12, 2 * len(P_A)).tolist():
        prompt = int(rng.integers(1, length - 1))
        ids = rng.integers(5, 200, length).tolist()
        examples.append(Example(ids, [0] * prompt + [1] * (length - prompt)))
    return comparisons.Pairs(pack(examples), np.asarray(P_A), np.asarray(HUMAN), pad_id=0)


@pytest.fixture
def models(tmp_path: Path) -> tuple[Any, Any]:
    """A policy and the reference that it has left."""
    folder = str(tiny.save_model(tmp_path / "model"))
    policy, reference = (load_policy(folder, DpoConfig()) for _ in range(2))
    with torch.no_grad():
        for n, p in enumerate(policy.parameters()):
            p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(n))
    return policy, reference


def of_responses(model: Any, data: comparisons.Pairs) -> torch.Tensor:
    """(comparisons, 2): every response by itself, from whole logits."""
    out = []
    for i in range(2 * len(P_A)):
        row = pad([data.responses[i]], 0)
        every = model(input_ids=row["input_ids"]).logits[0, :-1].log_softmax(-1)
        every = every.gather(-1, row["input_ids"][0, 1:, None]).squeeze(-1)
        out.append((every * row["loss_mask"][0, 1:]).sum())
    return torch.stack(out).view(-1, 2)


@pytest.mark.parametrize("tokens", [24, 60, 4096])
def test_item_30_a_step_is_that_of_the_formula_for_any_split(
    data: comparisons.Pairs, models: tuple[Any, Any], tokens: int
) -> None:
    policy, reference = models
    cfg = DpoConfig(beta=0.3, micro_batch_tokens=tokens)
    scores = dpo.response_logprobs(Plain(reference), data, cfg)  # type: ignore[arg-type]
    before = of_responses(reference, data).detach()
    torch.testing.assert_close(scores, before, rtol=1e-5, atol=1e-4)

    ratios = of_responses(policy, data) - before
    d, p = 0.3 * (ratios[:, 0] - ratios[:, 1]), torch.tensor(P_A)
    loss = -(p * torch.sigmoid(d).log() + (1 - p) * torch.sigmoid(-d).log()).mean()
    loss.backward()
    wanted = [w.grad.clone() for w in policy.parameters()]
    policy.zero_grad()
    sums, _ = dpo.update(Plain(policy), data, scores, BATCH, cfg)  # type: ignore[arg-type]
    assert sums["loss"] / len(P_A) == pytest.approx(loss.item(), rel=1e-5)
    apart = sum(float((w - g.grad).square().sum()) for w, g in zip(wanted, policy.parameters(), strict=True))
    assert (apart / sum(float(w.square().sum()) for w in wanted)) ** 0.5 < 1e-4


def test_item_18_measures_are_kept_apart_by_source(data: comparisons.Pairs, models: tuple[Any, Any]) -> None:
    policy, reference = models
    cfg = DpoConfig(beta=0.3, label_smoothing=0.2, micro_batch_tokens=60)
    scores = dpo.response_logprobs(Plain(reference), data, cfg)  # type: ignore[arg-type]
    found = dpo.evaluate(Plain(policy), data, scores, BATCH, cfg)  # type: ignore[arg-type]
    with torch.no_grad():
        ratios = (of_responses(policy, data) - of_responses(reference, data)).tolist()
    for source, human in (("ai", False), ("human", True)):
        rows = [(a, b, p) for (a, b), p, h in zip(ratios, P_A, HUMAN, strict=True) if h == human]
        mean = {
            "n": len(rows) ** 2,
            "chosen": sum(0.3 * (a if p >= 0.5 else b) for a, b, p in rows),
            "rejected": sum(0.3 * (b if p >= 0.5 else a) for a, b, p in rows),
            "drift": sum(-(a + b) / 2 for a, b, _ in rows),
            "accuracy": sum(0.5 if p == 0.5 else float((a > b) == (p > 0.5)) for a, b, p in rows),
            # Of the labels as they are: smoothing is the training's alone.
            "loss": sum(
                -p * np.log(1 / (1 + np.exp(-0.3 * (a - b)))) - (1 - p) * np.log(1 / (1 + np.exp(0.3 * (a - b))))
                for a, b, p in rows
            ),
        }  # fmt: skip
        for name, total in mean.items():
            assert found[f"eval/{source}_{name}"] == pytest.approx(total / len(rows), rel=1e-3, abs=1e-4), (
                name
            )
