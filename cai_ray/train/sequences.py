"""What a model says of whole token sequences: log-probabilities, values, scores."""

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
    """(B, T) float32: of each token in `loss_mask` given those before it (`losses.token_logprobs`); 0 elsewhere.

    Args:
        model: a causal LM (`load_policy`), as it is or under DeepSpeed.
    """
    inputs = _inputs(batch)
    asked = (batch["input_ids"], batch["loss_mask"], temperature, batch["before"])
    head = base_model(getattr(model, "module", model)).get_output_embeddings()
    if not isinstance(head, LogprobHead):
        return head_logprobs(model(**inputs, use_cache=False).logits, None, None, *asked)
    head.asked = asked
    try:
        return model(**inputs, use_cache=False).logits  # type: ignore[no-any-return]
    finally:
        head.asked = None


def _inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without a padding mask: what stands at the right is never attended to, and attention is faster so.

    Padding at the left has positions that do not rise, by which transformers keeps it apart like a packed sequence. To
    look for such it waits for the GPU, and is given none for padding at the right.
    """
    return {k: batch[k] for k in INPUTS if k in batch}
