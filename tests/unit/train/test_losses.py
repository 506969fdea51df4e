"""The losses against loops of a few lines, which read like the formulas."""

import math

import pytest
import torch
from torch.nn.functional import log_softmax

from cai_ray.train import losses
from cai_ray.train.losses import (
    direct_preference,
    head_logprobs,
    importance_weights,
    kl_k1,
    kl_k2,
    kl_k3,
    policy_loss,
    preference_metrics,
    sft_loss,
    soft_bradley_terry,
    token_logprobs,
    value_loss,
)


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def test_item_12_soft_bradley_terry():
    r_a, r_b = draw(16, seed=1, scale=3), draw(16, seed=2, scale=3)
    p = torch.rand(16, generator=torch.Generator().manual_seed(3))
    for a, b, q, got in zip(
        r_a.tolist(), r_b.tolist(), p.tolist(), soft_bradley_terry(r_a, r_b, p), strict=True
    ):
        s = 1 / (1 + math.exp(-(a - b)))
        assert got.item() == pytest.approx(-q * math.log(s) - (1 - q) * math.log(1 - s), rel=1e-4, abs=1e-6)
    swapped = soft_bradley_terry(r_b, r_a, 1 - p)
    torch.testing.assert_close(swapped, soft_bradley_terry(r_a, r_b, p))

    # Gradient with respect to d is sigmoid(d) - p: zero where the model says what the label says.
    d = torch.zeros(1, requires_grad=True)
    soft_bradley_terry(d, torch.zeros(1), torch.tensor([0.5])).backward()
    assert d.grad is not None
    assert d.grad.item() == 0.0

    far = torch.tensor([1e4, -1e4], requires_grad=True)
    loss = soft_bradley_terry(far, torch.zeros(2), torch.tensor([0.25, 0.25]))
    torch.testing.assert_close(loss, torch.tensor([7500.0, 2500.0]))
    loss.sum().backward()
    torch.testing.assert_close(far.grad, torch.tensor([0.75, -0.25]))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_direct_preference_loss_against_the_formulas(kind, smoothing):
    """From log-probabilities of two responses under policy and reference, one comparison at a time."""
    beta = 0.3
    logp, ref = draw(16, 2, seed=1, scale=3), draw(16, 2, seed=2, scale=3)
    labels = torch.rand(16, generator=torch.Generator().manual_seed(3))
    r = beta * (logp - ref)
    got = direct_preference(r[:, 0], r[:, 1], labels, beta=beta, smoothing=smoothing, kind=kind)

    def losses_of(h: float) -> tuple[float, float]:
        """Where a is preferred, and where b is."""
        if kind == "ipo":
            return (h - 1 / (2 * beta)) ** 2, (h + 1 / (2 * beta)) ** 2
        return math.log1p(math.exp(-beta * h)), math.log1p(math.exp(beta * h))

    for (la, lb), (fa, fb), p, loss in zip(logp.tolist(), ref.tolist(), labels.tolist(), got, strict=True):
        preferred = p * (1 - smoothing) + (1 - p) * smoothing  # P(a preferred), the label's errors counted
        a, b = losses_of((la - fa) - (lb - fb))
        expected = preferred * a + (1 - preferred) * b
        if kind == "ipo":  # what does not depend on the policy is left out
            expected -= (1 - (2 * preferred - 1) ** 2) / (2 * beta) ** 2
        assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-4)

    # A label of one half pulls neither way where the policy is the reference; nothing overflows far from it.
    d = torch.zeros(1, requires_grad=True)
    half = direct_preference(
        d, torch.zeros(1), torch.tensor([0.5]), beta=beta, smoothing=smoothing, kind=kind
    )
    half.sum().backward()
    assert d.grad.item() == 0.0
    far = torch.tensor([1e4, -1e4], requires_grad=True)
    loss = direct_preference(
        far, torch.zeros(2), torch.tensor([0.25, 1.0]), beta=beta, smoothing=smoothing, kind=kind
    )
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(far.grad).all()


def test_item_18_metrics_per_source():
    r_a, r_b = torch.tensor([2.0, 0.0, 1.0, 3.0]), torch.tensor([0.0, 1.0, 1.0, 5.0])
    p = torch.tensor([0.8, 0.9, 1.0, 1.0])
    human = torch.tensor([False, False, True, True])
    got = preference_metrics(r_a, r_b, p, human)
    rows = soft_bradley_terry(r_a, r_b, p)
    for source, which, right, margin in (("ai", [0, 1], 1.0, 1.0), ("human", [2, 3], 0.5, -2.0)):
        assert got[f"{source}/n"] == 2
        assert got[f"{source}/loss"].item() == pytest.approx(sum(rows[i].item() for i in which))
        assert got[f"{source}/accuracy"] == right
        assert got[f"{source}/margin"] == margin
    empty = preference_metrics(r_a, r_b, p, torch.zeros(4, dtype=torch.bool))
    assert empty["human/n"] == 0
    assert empty["human/loss"] == 0


def test_item_21_importance_weights():
    trainer = torch.tensor([[-1.0, -1.0, -2.0, 500.0]], requires_grad=True)
    engine = torch.tensor([[-1.0, -1.5, -9.0, -500.0]])
    weights = importance_weights(trainer, engine, cap=2.0)
    naive = [
        min(math.exp(min(t - e, 20)), 2.0)
        for t, e in zip(trainer[0].tolist(), engine[0].tolist(), strict=True)
    ]
    torch.testing.assert_close(weights, torch.tensor([naive]))
    assert not weights.requires_grad
    assert weights.max() <= 2.0  # really clamped, not only reported as clipped
    uncapped = importance_weights(trainer, engine, cap=math.inf)
    assert torch.isfinite(uncapped).all()

    # In the loss a weight scales its token, carries no gradient, and counts nowhere outside the mask.
    logp = draw(1, 4, seed=4).requires_grad_()
    mask = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    w = torch.tensor([[0.5, 1.0, 2.0, math.nan]], requires_grad=True)
    advantages = torch.tensor([[1.0, -2.0, 3.0, 4.0]])
    loss, _ = policy_loss(logp, logp.detach(), advantages, mask, clip=0.2, global_tokens=3, weights=w)
    assert loss.item() == pytest.approx(-(0.5 * 1 + 1 * -2 + 2 * 3) / 3)
    loss.backward()
    assert w.grad is None
    torch.testing.assert_close(logp.grad, -torch.tensor([[0.5, -2.0, 6.0, 0.0]]) / 3)


def test_item_22_logprobs_are_from_fp32_logits():
    logits = draw(2, 5, 50, seed=5, scale=4).to(torch.bfloat16)
    ids = torch.randint(0, 50, (2, 5), generator=torch.Generator().manual_seed(6))
    got = token_logprobs(logits, ids, torch.ones(2, 5))
    assert got.dtype == torch.float32
    exact = log_softmax(logits.double(), -1)
    for b in range(2):
        assert got[b, 0] == 0
        for t in range(1, 5):
            assert got[b, t].item() == pytest.approx(exact[b, t - 1, ids[b, t]].item(), abs=1e-5)


@pytest.mark.parametrize("numbers", [1, 33, 1 << 20])
def test_token_logprobs_gradient_and_chunks(monkeypatch, numbers):
    """The gradient made by hand is autograd's, at a temperature, whatever the chunk, with a head and without."""
    monkeypatch.setattr(losses, "CHUNK_NUMBERS", numbers)
    ids = torch.randint(0, 11, (3, 6), generator=torch.Generator().manual_seed(7))
    upstream, mask = draw(3, 6, seed=8), torch.tensor([[0, 1, 1, 0, 1, 1], [1] * 6, [0] * 6])
    hidden, weight, bias = (draw(*shape, seed=9) for shape in ((3, 6, 4), (11, 4), (11,)))
    plain = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    logits = plain[0] @ plain[1].T + plain[2]
    logits.retain_grad()
    naive = log_softmax(logits[:, :-1].double() / 0.7, -1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    naive = naive * (mask[:, 1:] != 0)
    (naive * upstream[:, 1:]).sum().backward()

    ours = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    whole = logits.detach().clone().requires_grad_()
    for got in (
        head_logprobs(*ours, ids, mask, temperature=0.7),
        token_logprobs(whole, ids, mask, temperature=0.7),
    ):
        torch.testing.assert_close(got[:, 1:].double(), naive.detach(), atol=1e-5, rtol=0)
        assert not got[:, 0].any()
        (got * upstream).sum().backward()
    for mine, theirs in zip([*ours, whole], [*plain, logits], strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-5, rtol=1e-5)


def test_item_22_gradients_of_many_chunks_are_added_in_fp32(monkeypatch):
    """Each chunk's is small beside their sum: in bf16 the later ones would be lost."""
    monkeypatch.setattr(losses, "CHUNK_NUMBERS", 2)
    hidden = torch.full((1, 1025, 1), 0.01, dtype=torch.bfloat16)
    weight = torch.tensor([[0.5], [0.25]], dtype=torch.bfloat16, requires_grad=True)
    ids, mask = torch.zeros(1, 1025, dtype=torch.int64), torch.ones(1, 1025)
    head_logprobs(hidden, weight, None, ids, mask).sum().backward()
    naive = weight.detach().double().requires_grad_()
    log_softmax(hidden[:, :-1].double() @ naive.T, -1)[..., 0].sum().backward()
    torch.testing.assert_close(weight.grad.double(), naive.grad, rtol=1e-2, atol=0)


def test_sft_loss_counts_masked_tokens_only():
    logp = draw(2, 3, seed=10)
    logp[0, 0] = math.nan
    mask = torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 1.0]])
    naive = -sum(logp[b, t].item() for b in range(2) for t in range(3) if mask[b, t]) / 7
    assert sft_loss(logp, mask, 7).item() == pytest.approx(naive)


def naive_policy_loss(logp, old, advantages, mask, clip, tokens):
    total, clipped, kl, ratios = 0.0, 0, 0.0, 0.0
    for b in range(logp.shape[0]):
        for t in range(logp.shape[1]):
            if mask[b, t]:
                ratio, a = math.exp(logp[b, t] - old[b, t]), advantages[b, t].item()
                cut = max(min(ratio, 1 + clip), 1 - clip)
                total -= min(ratio * a, cut * a)
                clipped += cut * a < ratio * a
                kl += ratio - 1 - math.log(ratio)
                ratios += ratio
    return total / tokens, clipped, kl, ratios


def test_policy_loss_is_the_clipped_objective():
    logp, old, advantages = (
        draw(4, 6, seed=11, scale=0.4),
        draw(4, 6, seed=12, scale=0.4),
        draw(4, 6, seed=13),
    )
    mask = (draw(4, 6, seed=14) > 0).float()
    logp[mask == 0] = math.nan
    loss, metrics = policy_loss(logp, old, advantages, mask, clip=0.2, global_tokens=17)
    want, clipped, kl, ratios = naive_policy_loss(logp, old, advantages, mask, 0.2, 17)
    assert clipped > 0
    assert loss.item() == pytest.approx(want, rel=1e-5)
    assert metrics["clipfrac"] == clipped
    assert metrics["tokens"] == mask.sum()
    assert metrics["approx_kl"].item() == pytest.approx(kl, rel=1e-4)
    assert metrics["ratio"].item() == pytest.approx(ratios, rel=1e-5)


def test_item_29_kl_estimators():
    """Over a whole small vocabulary, where expectations and their gradients are sums."""
    theta = draw(7, seed=15).double().requires_grad_()
    logp, ref = log_softmax(theta, -1), log_softmax(draw(7, seed=16).double(), -1)
    p, q = logp.detach().exp(), ref.exp()
    forward = sum(p[i] * math.log(p[i] / q[i]) for i in range(7)).item()  # KL(p‖q)
    assert (p * kl_k1(logp, ref)).sum().item() == pytest.approx(forward)
    assert (p * kl_k3(logp, ref)).sum().item() == pytest.approx(forward)
    assert (p * kl_k2(logp, ref)).sum().item() == pytest.approx(forward, rel=0.5)
    assert (kl_k1(logp, ref) < 0).any()
    assert (kl_k3(logp, ref) >= 0).all()

    def gradient(value):
        return torch.autograd.grad(value, theta, retain_graph=True)[0]

    true = gradient((logp.exp() * (logp - ref)).sum())
    other = gradient((q * (ref - logp)).sum())
    torch.testing.assert_close(gradient((p * kl_k2(logp, ref)).sum()), true)
    torch.testing.assert_close(gradient((p * kl_k3(logp, ref)).sum()), other)
    torch.testing.assert_close(gradient((p * kl_k1(logp, ref)).sum()), torch.zeros_like(true))

    # Log-ratios are clamped before exp: nothing is infinite, in value or gradient.
    wild = torch.tensor([[-300.0, 300.0]], requires_grad=True)
    still = torch.zeros(1, 2)
    loss, metrics = policy_loss(
        wild, still, torch.tensor([[1.0, -1.0]]), torch.ones(1, 2), clip=0.2, global_tokens=2
    )
    total = loss + kl_k2(wild, still).sum() + kl_k3(wild, still).sum()
    total.backward()
    assert torch.isfinite(total)
    assert torch.isfinite(wild.grad).all()
    assert all(torch.isfinite(m) for m in metrics.values())


def test_item_31_value_clip_is_on_the_change():
    values, old, returns = draw(4, 6, seed=17), 5 + draw(4, 6, seed=18), 5 + draw(4, 6, seed=19)
    values = old + 0.3 * values
    mask = (draw(4, 6, seed=20) > 0).float()
    total, clipped, error = 0.0, 0, 0.0
    for b in range(4):
        for t in range(6):
            if mask[b, t]:
                v, o, r = values[b, t].item(), old[b, t].item(), returns[b, t].item()
                near = o + max(min(v - o, 0.2), -0.2)
                total += 0.5 * max((v - r) ** 2, (near - r) ** 2)
                clipped += (near - r) ** 2 > (v - r) ** 2
                error += (v - r) ** 2
    values[mask == 0] = math.nan
    loss, metrics = value_loss(values, old, returns, mask, clip=0.2, global_tokens=9)
    assert clipped > 0
    assert loss.item() == pytest.approx(total / 9, rel=1e-5)
    assert metrics["value_clipfrac"] == clipped
    assert metrics["value_error"].item() == pytest.approx(error, rel=1e-5)
    free, metrics = value_loss(values, old, returns, mask, clip=None, global_tokens=9)
    assert free.item() == pytest.approx(0.5 * error / 9, rel=1e-5) and free < loss
    assert metrics["value_clipfrac"] == 0
