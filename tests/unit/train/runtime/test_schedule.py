"""The optimizer as a configuration asks for it, under DeepSpeed in this process."""

from itertools import pairwise

import pytest
import torch
import torch.distributed as dist

from cai_ray.config.training import TrainConfig
from cai_ray.train.runtime.engine import distribute, schedule


@pytest.fixture
def group(monkeypatch):
    """A process group of this process alone."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("LOCAL_RANK", "0")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 3])
def test_item_34_no_step_has_a_rate_of_zero(kind, warmup):
    cfg = TrainConfig(schedule=kind, warmup_steps=warmup, min_lr_ratio=0.0)
    factors = [schedule(step, cfg, 10) for step in range(10)]
    assert all(0 < f <= 1 for f in factors)
    assert all(a < b for a, b in pairwise(factors[: warmup + 1]))
    assert factors[warmup] == 1.0  # the configured rate is reached
    assert all(a == b if kind == "constant" else a > b for a, b in pairwise(factors[warmup:]))


def test_item_34_schedule_ends_at_its_floor():
    for kind in ("linear", "cosine"):
        cfg = TrainConfig(schedule=kind, min_lr_ratio=0.1)
        assert schedule(5, cfg, 10) == pytest.approx(0.55)
        assert schedule(10, cfg, 10) == schedule(99, cfg, 10) == pytest.approx(0.1)


def test_item_34_adam_is_as_configured_and_the_first_step_moves(group):
    """eps, betas and decay reach the optimizer; one step is Adam's, at the schedule's first rate."""
    cfg = TrainConfig(
        learning_rate=0.01, betas=(0.8, 0.9), eps=1e-2, weight_decay=0.0, warmup_steps=1, max_grad_norm=1e9
    )
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    before = [p.detach().clone() for p in model.parameters()]
    trained = distribute(model, cfg, total_steps=4)
    settings = trained.engine.optimizer.param_groups[0]
    assert tuple(settings["betas"]) == (0.8, 0.9)
    assert settings["eps"] == 1e-2
    x = torch.tensor([[0.01, -0.02, 0.5]])
    assert trained.lr == 0.005
    trained.backward(trained(x).sum())
    trained.step()
    assert trained.lr == 0.01  # the schedule moved on
    # At Adam's first step both bias-corrected moments are those of the gradient: lr · g / (|g| + eps).
    for parameter, old, g in zip(model.parameters(), before, (x, torch.ones(1)), strict=True):
        torch.testing.assert_close(
            old - parameter.detach(), 0.005 * g / (g.abs() + 1e-2), rtol=1e-4, atol=1e-7
        )
