"""The losses as pure functions: tensors in, a scalar and a dict of sums out.

Shapes: B rows, T tokens, V words of the vocabulary, D hidden numbers. A mask is 1 on the tokens that count (a
response's, its end included) and 0 elsewhere. Values where it is 0 have no influence, not even as NaN. A loss is a
sum over tokens divided by the number of tokens of the whole global batch, so that the gradient does not depend on how
the batch is split into micro-batches and ranks. Metrics are sums, so that micro-batches and ranks can add them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cai_ray.train.batches import before_counted

# Log-ratios are clamped to this before exp: e^20 is far outside any trust region, and finite in every dtype used.
MAX_LOG_RATIO = 20.0
# Logits in memory at once, in fp32: 2^26 numbers are 256 MiB.
CHUNK_NUMBERS = 1 << 26

Metrics = dict[str, Tensor]


class _Logprobs(torch.autograd.Function):
    """log softmax(logits / temperature)[target] by chunks of rows, where the logits are input @ weight.T + bias.

    The logits of a 128k vocabulary are larger than everything else that a micro-batch keeps: 2 GB for 8192 tokens in
    bf16, and as much again for their gradient. Here the logits of a chunk are computed twice, which costs one more
    product with the head. The gradient is (one_hot - softmax) / temperature, from the saved log-sum-exp. Without a
    weight the input is the logits, and what is saved is their copies in fp32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
    ) -> Tensor:
        wide = torch.promote_types(input.dtype, torch.float32)
        picked = torch.empty(targets.shape, dtype=wide, device=input.device)
        norms = torch.empty_like(picked)
        for rows in _chunks(input, weight):
            scaled = _logits(input[rows], weight, bias).to(wide) / temperature
            norms[rows] = torch.logsumexp(scaled, -1)
            picked[rows] = scaled.gather(-1, targets[rows, None]).squeeze(-1)
        ctx.save_for_backward(input, weight, bias, targets, norms)
        ctx.temperature = temperature
        return picked - norms

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias, targets, norms = ctx.saved_tensors
        grad_input = torch.empty_like(input)
        # Sums over chunks are in fp32, where small terms are not lost.
        grad_weight = torch.zeros_like(weight, dtype=norms.dtype) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias, dtype=norms.dtype) if ctx.needs_input_grad[2] else None
        for rows in _chunks(input, weight):
            upstream = grads[0][rows, None] / ctx.temperature
            scaled = _logits(input[rows], weight, bias).to(norms.dtype) / ctx.temperature
            grad = torch.exp(scaled - norms[rows, None]).mul_(-upstream)
            grad.scatter_add_(-1, targets[rows, None], upstream)
            narrow = grad.to(input.dtype)
            grad_input[rows] = narrow if weight is None else narrow @ weight
            if grad_weight is not None:
                grad_weight += narrow.T @ input[rows]
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        return (
            grad_input,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
        )


def _logits(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return input if weight is None else F.linear(input, weight, bias)


def _chunks(input: Tensor, weight: Tensor | None) -> list[slice]:
    words = input.shape[1] if weight is None else weight.shape[0]
    size = max(1, CHUNK_NUMBERS // words)
    return [slice(i, i + size) for i in range(0, input.shape[0], size)]


def token_logprobs(logits: Tensor, ids: Tensor, mask: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of each token that counts given those before it, computed from fp32 logits.

    Args:
        logits: (B, T, V), any float dtype; logits[:, t] predict token t + 1.
        ids: (B, T).
        mask: (B, T), not 0 on the tokens that count.
        temperature: the temperature that the tokens were sampled at.

    Returns:
        (B, T) float32: [:, t] is log p(ids[:, t] | ids[:, :t]). It is 0 where the mask is 0, and at position 0, which
        nothing predicts.
    """
    return head_logprobs(logits, None, None, ids, mask, temperature)


def head_logprobs(
    hidden: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    ids: Tensor,
    mask: Tensor,
    temperature: float = 1.0,
    before: Tensor | None = None,
) -> Tensor:
    """`token_logprobs` of the logits hidden @ weight.T + bias, which are never complete in memory.

    Only positions before a token that counts are multiplied with the head: prompts and padding cost nothing.

    Args:
        hidden: (B, T, D), the backbone's output; (B, T, V), the logits, if there is no weight.
        weight, bias: the head's, (V, D) and (V,).
        before: `batches.before_counted(mask)`, if it is known.

    Returns:
        (B, T) float32, as `token_logprobs`.
    """
    if before is None:
        before = before_counted(mask)
    targets = F.pad(ids[:, 1:], (0, 1)).flatten()[before]
    chosen = hidden.flatten(0, 1).index_select(0, before)
    logprobs: Tensor = _Logprobs.apply(chosen, weight, bias, targets, temperature)  # type: ignore[no-untyped-call]
    out = logprobs.new_zeros(ids.numel()).index_copy(0, before, logprobs).view(ids.shape)
    return F.pad(out[:, :-1], (1, 0))


def sft_loss(logprobs: Tensor, mask: Tensor, global_tokens: float) -> Tensor:
    """Negative log-likelihood over the masked tokens, (B, T), divided by the global batch's tokens."""
    return -masked(logprobs, mask).sum() / global_tokens


def soft_bradley_terry(r_a: Tensor, r_b: Tensor, p_a: Tensor) -> Tensor:
    """Preference loss for soft labels, per row: -p logsigmoid(d) - (1 - p) logsigmoid(-d), d = r_a - r_b.

    The cross-entropy between the label P(a preferred) = p_a and the Bradley-Terry model's sigmoid(d); Bai et
    al. 2022 (arXiv 2212.08073), section 4.1, train on such labels. All (B,).
    """
    d = r_a - r_b
    return -p_a * F.logsigmoid(d) - (1 - p_a) * F.logsigmoid(-d)


def preference_metrics(r_a: Tensor, r_b: Tensor, p_a: Tensor, human: Tensor) -> Metrics:
    """Sums over rows of n, loss, accuracy and margin, separate for AI (soft) and human (hard) labels: `ai/loss`, ….

    Accuracy counts the rows where the model prefers the label's side. A tie of the model or of the label counts one
    half.

    Args:
        r_a, r_b, p_a: (B,): rewards of both responses, and the label P(a preferred).
        human: (B,): whether a person gave the label.
    """
    d, losses = (r_a - r_b).detach(), soft_bradley_terry(r_a, r_b, p_a).detach()
    agreement = (torch.sign(d) * torch.sign(p_a - 0.5) + 1) / 2
    out: Metrics = {}
    for source, chosen in (("ai", ~human.bool()), ("human", human.bool())):
        out[f"{source}/n"] = chosen.sum().to(d.dtype)
        out[f"{source}/loss"] = masked(losses, chosen).sum()
        out[f"{source}/accuracy"] = masked(agreement, chosen).sum()
        out[f"{source}/margin"] = masked(d * torch.sign(p_a - 0.5), chosen).sum()
    return out


def direct_preference(
    r_a: Tensor, r_b: Tensor, p_a: Tensor, *, beta: float, smoothing: float, kind: str
) -> Tensor:
    """Loss of direct preference optimisation per row, on implicit rewards r = beta * (log p - log p_ref). All (B,).

    `sigmoid` (Rafailov et al. 2023, arXiv 2305.18290, equation 7) is `soft_bradley_terry`. `ipo` (Azar et al. 2023,
    arXiv 2310.12036, equation 17) is (h - 1 / (2 beta))² for a preferred response, h = (r_a - r_b) / beta; over a label
    p, in expectation and up to a constant, (h - (2p - 1) / (2 beta))².

    Args:
        smoothing: the share e of labels taken to be the wrong way round: p becomes p (1 - e) + (1 - p) e (Mitchell
            2023, "A note on DPO with noisy preferences").
        kind: `sigmoid` or `ipo`.
    """
    p = p_a * (1 - smoothing) + (1 - p_a) * smoothing
    if kind == "ipo":
        return ((r_a - r_b) / beta - (2 * p - 1) / (2 * beta)).square()
    return soft_bradley_terry(r_a, r_b, p)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: float,
    global_tokens: float,
    weights: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """PPO's clipped objective, -min(rho A, clip(rho, 1 - clip, 1 + clip) A), summed over tokens.

    Schulman et al. 2017 (arXiv 1707.06347), equation 7. All tensors (B, T).

    Args:
        old_logprobs: those of the policy that the update starts from, computed by the trainer.
        mask: the response mask.
        clip: the bound on |rho - 1|.
        global_tokens: tokens of the minibatch over all ranks.
        weights: importance weights of the trainer against the engine; they carry no gradient.

    Returns:
        The loss divided by `global_tokens`, and sums over tokens: tokens, ratio, clipfrac (where the clipped branch
        counts), approx_kl (k3 of old against new).
    """
    log_ratio = masked(logprobs - old_logprobs, mask).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    gains = masked(advantages, mask)
    unclipped, clipped = ratio * gains, ratio.clamp(1 - clip, 1 + clip) * gains
    per_token = -torch.minimum(unclipped, clipped)
    if weights is not None:
        per_token = per_token * weights.detach()
    loss = masked(per_token, mask).sum() / global_tokens
    with torch.no_grad():
        metrics = {
            "tokens": mask.sum().to(ratio.dtype),
            "ratio": masked(ratio, mask).sum(),
            "clipfrac": masked((clipped < unclipped).to(ratio.dtype), mask).sum(),
            "approx_kl": masked(ratio - 1 - log_ratio, mask).sum(),
        }
    return loss, metrics


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip: float | None,
    global_tokens: float,
) -> tuple[Tensor, Metrics]:
    """Half the squared error of the values, the larger of that of v and that of v_old + clip(v - v_old, ±clip), summed.

    The clip is on the change of the value, v - v_old (Huang et al. 2024, arXiv 2403.17031). Without one the loss is
    half the squared error of v. All tensors (B, T).

    Args:
        old_values: those that the advantages were computed with.
        clip: the bound on |v - v_old|; None for no bound.
        global_tokens: tokens of the minibatch over all ranks.

    Returns:
        The loss divided by `global_tokens`, and sums over tokens: value_clipfrac, value_error (squared, unclipped).
    """
    old = masked(old_values, mask)
    change = masked(values, mask) - old
    target = masked(returns, mask)
    unclipped = (old + change - target).square()
    limit = math.inf if clip is None else clip
    clipped = (old + change.clamp(-limit, limit) - target).square()
    loss = 0.5 * masked(torch.maximum(unclipped, clipped), mask).sum() / global_tokens
    with torch.no_grad():
        metrics = {
            "value_clipfrac": masked((clipped > unclipped).to(unclipped.dtype), mask).sum(),
            "value_error": masked(unclipped, mask).sum(),
        }
    return loss, metrics


def kl_k1(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """log p - log q per token, sampled from p: unbiased and signed. The reward uses it; as a loss its expected gradient
    is 0. The names k1, k2, k3 are Schulman's, "Approximating KL divergence" (2020)."""
    return logp - ref_logp


def kl_k2(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """(log p - log q)² / 2 per token: biased, but as a loss its expected gradient is that of KL(p‖q)."""
    return 0.5 * (logp - ref_logp).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).square()


def kl_k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """q/p - 1 - log(q/p) per token: unbiased and never negative, for reports. As a loss its expected gradient
    is that of KL(q‖p), the other direction."""
    log_ratio = (ref_logp - logp).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return log_ratio.exp() - 1 - log_ratio


def importance_weights(trainer_logprobs: Tensor, engine_logprobs: Tensor, cap: float) -> Tensor:
    """Truncated importance weights min(p_trainer / p_engine, cap), per token, without gradient."""
    log_ratio = (trainer_logprobs - engine_logprobs).detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return log_ratio.exp().clamp(max=cap)


def masked(values: Tensor, mask: Tensor) -> Tensor:
    """Values where the mask is set, 0 elsewhere: multiplying would let NaN and infinity through."""
    return values.masked_fill(mask == 0, 0.0)
