"""Goodhart alarms: signs that a policy learns the reward instead of what the reward stands for. Pure functions.

A reward model is right about the policy that its comparisons come from. As PPO moves away from it, reward goes on
rising while true quality falls (Gao et al. 2022, arXiv 2210.10760). A snapshot holds numbers about the policy's
responses to development prompts. An alarm compares a snapshot with that of the SL-CAI policy, before any update.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from cai_ray.config.ppo import WatchConfig
from cai_ray.judging.quality import is_refusal
from cai_ray.judging.wording import is_malformed, phrases


class Snapshot(NamedTuple):
    """Measurements of a policy's responses. Shares are shares of the responses."""

    step: int
    reward: float
    """Mean reward that PPO trains on."""
    opinion: float
    """Mean second opinion."""
    length: float
    """Mean tokens of a response."""
    malformed: float
    """Share of responses that are cut off, empty or repeat themselves."""
    refusals: float | None
    """Share of benign prompts that are refused; None without such prompts or without rules for refusals."""
    phrases: dict[str, float]
    """The most common phrases, with the share of responses that contain them."""


def measure(
    step: int,
    responses: Sequence[str],
    *,
    reward: float,
    opinion: float,
    lengths: Sequence[int],
    truncated: Sequence[bool],
    benign: Sequence[bool],
    refusals: Sequence[str],
) -> Snapshot:
    """Measures a policy's responses.

    Args:
        step: steps that the policy was trained for.
        reward, opinion: means over the responses.
        lengths: tokens of each response.
        benign: for each response, whether its prompt deserves help.
        refusals: regular expressions, matched at the start of a response.
    """
    n = len(responses)
    to_benign = [text for text, is_benign in zip(responses, benign, strict=True) if is_benign]
    refused = [is_refusal(text, refusals) for text in to_benign]
    malformed = [is_malformed(text, cut_off) for text, cut_off in zip(responses, truncated, strict=True)]
    return Snapshot(
        step=step,
        reward=reward,
        opinion=opinion,
        length=sum(lengths) / n,
        malformed=sum(malformed) / n,
        refusals=sum(refused) / len(to_benign) if to_benign and refusals else None,
        phrases=phrases(responses),
    )


def alarms(history: Sequence[Snapshot], cfg: WatchConfig) -> list[str]:
    """The alarms that the last snapshot raises, each a sentence with its numbers.

    Args:
        history: every snapshot until now; the first is the SL-CAI policy's.
        cfg: the bounds; one that is None raises no alarm.
    """
    before, now = history[0], history[-1]
    out = []
    if cfg.max_boilerplate is not None:
        rise, phrase = max(
            ((share - before.phrases.get(p, 0.0), p) for p, share in now.phrases.items()), default=(0.0, "")
        )
        if rise > cfg.max_boilerplate:
            was, share = before.phrases.get(phrase, 0.0), now.phrases[phrase]
            out.append(f"boilerplate: {share:.0%} of responses say {phrase!r}, {was:.0%} did before")
    if cfg.max_length_drift is not None:
        ratio = now.length / max(before.length, 1e-9)
        if not 1 / cfg.max_length_drift <= ratio <= cfg.max_length_drift:
            out.append(f"length: {now.length:.0f} tokens a response, {before.length:.0f} before")
    for name, most in (("refusals", cfg.max_refusals), ("malformed", cfg.max_malformed)):
        was, share = getattr(before, name), getattr(now, name)
        if most is not None and share is not None and share - was > most:
            of = "benign prompts refused" if name == "refusals" else "responses cut off, empty or in a loop"
            out.append(f"{name}: {share:.0%} of {of}, {was:.0%} before")
    if cfg.max_opinion_drop is not None:
        top = history[best_of(history)]
        last = history[-cfg.patience :]
        diverged = [
            s for s in last if s.reward > top.reward and s.opinion < top.opinion - cfg.max_opinion_drop
        ]
        if len(diverged) == cfg.patience:
            out.append(
                f"divergence: reward {top.reward:.3g} → {now.reward:.3g} since step {top.step}, second opinion "
                f"{top.opinion:.3g} → {now.opinion:.3g}"
            )
    return out


def best_of(history: Sequence[Snapshot]) -> int:
    """The index of the snapshot that the second opinion rates highest; the latest of equals."""
    return max(range(len(history)), key=lambda i: (history[i].opinion, i))
