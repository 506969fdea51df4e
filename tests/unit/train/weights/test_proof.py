"""The bounds of the proof of a weight sync on log-probabilities, by dtype (docs/method.md, item 24)."""

import pytest
import torch

from cai_ray.train.weights.proof import TOLERANCE, SyncError, check_probes


def test_item_24_single_tokens_may_differ_in_half_precision() -> None:
    """As measured with a real model of 135 M parameters, with nothing wrong."""
    now = torch.full((200,), -2.0, dtype=torch.float64)
    gaps = torch.linspace(0, 0.1, 200, dtype=torch.float64)
    gaps[::50] = 0.5
    for sign in (1, -1):
        found = check_probes(now + sign * gaps, now, None, TOLERANCE["bfloat16"], "engine")
        assert torch.allclose(found, gaps)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_item_24_half_precision_is_bounded_in_the_mean(dtype: str) -> None:
    now = torch.zeros(100, dtype=torch.float64)
    bound = TOLERANCE[dtype].mean
    check_probes(now + 0.99 * bound, now, None, TOLERANCE[dtype], "engine")
    with pytest.raises(SyncError, match="in the mean"):
        check_probes(now + 1.01 * bound, now, None, TOLERANCE[dtype], "engine")


def test_item_24_one_token_is_enough_in_float32() -> None:
    now = torch.zeros(1000, dtype=torch.float64)
    got = now.clone()
    got[123] = 6e-5
    with pytest.raises(SyncError, match="by up to 6e-05"):
        check_probes(got, now, None, TOLERANCE["float32"], "engine")


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_item_24_what_is_not_a_number_fails(dtype: str, value: float) -> None:
    now = torch.zeros(10, dtype=torch.float64)
    got = now.clone()
    got[3] = value
    with pytest.raises(SyncError):
        check_probes(got, now, None, TOLERANCE[dtype], "engine")
