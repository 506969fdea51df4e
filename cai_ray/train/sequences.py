"""Log-probabilities, values and scores of padded token sequences by one forward pass of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from cai_ray.train.advantages import last_index
from cai_ray.train.heads import LogprobHead
from cai_ray.train.losses import head_logprobs
from cai_ray.train.models import base_model

INPUTS = ("input_ids", "position_ids")


def score_last(values: Tensor, attention_mask: Tensor) -> Tensor:
    """(B,): the number (B, T) at each row's last real token."""
    return values.gather(1, last_index(attention_mask)[:, None]).squeeze(1)


def sequence_values(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """(B, T) float32: the number after each token. `advantages.before_tokens` aligns values with actions."""
    return model(**_inputs(batch))


def sequence_logprobs(model: Any, batch: Mapping[str, Tensor], temperature: float = 1.0) -> Tensor:
    """(B, T) float32: log p of each token in `loss_mask` given those before it (`losses.token_logprobs`); 0 elsewhere.

    Args:
        model: a causal LM (`load_policy`), as it is or under DeepSpeed.
    """
    inputs = _inputs(batch)
    targets = (batch["input_ids"], batch["loss_mask"], temperature, batch["before"])
    head = base_model(getattr(model, "module", model)).get_output_embeddings()
    if not isinstance(head, LogprobHead):
        return head_logprobs(model(**inputs, use_cache=False).logits, None, None, *targets)
    head.targets = targets
    try:
        return model(**inputs, use_cache=False).logits  # type: ignore[no-any-return]
    finally:
        head.targets = None


def _inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's inputs, without a padding mask, which makes attention faster.

    No token attends to padding at its right. Padding at the left has positions that do not rise, so transformers
    separates it like a packed sequence. To look for such positions transformers waits for the GPU; for padding at the
    right it is given none.
    """
    return {k: batch[k] for k in INPUTS if k in batch}
