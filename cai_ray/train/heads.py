"""The heads of policy, reward model and value model.

Reward and value model are a causal LM's backbone with a linear head that gives a number for every token, (B, T). The
reward is read at the last real token (`sequences.score_last`), whatever side the padding is on. The classes of
transformers find that token by comparing ids with the pad token, which loses an end token that is also the pad token.
The saved folders are the usual ones, which transformers and vLLM load.
"""

from __future__ import annotations

from torch import Tensor, nn

from cai_ray.train.losses import head_logprobs


class ScoreHead(nn.Linear):
    """A scoring head that multiplies in fp32: differences between scores are small compared with the scores."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return nn.functional.linear(input.float(), self.weight.float(), bias)


class LogprobHead(nn.Linear):
    """An output head that gives log-probabilities of given tokens (B, T) in place of the logits (B, T, V).

    It computes them inside the model's own forward pass, where its weight is whole under ZeRO-3 too.
    """

    targets: tuple[Tensor, Tensor, float, Tensor] | None = None
    """Ids, mask, temperature and places (`losses.head_logprobs`) for one pass; None for logits."""

    def forward(self, input: Tensor) -> Tensor:
        if self.targets is None:
            return super().forward(input)
        return head_logprobs(input, self.weight, self.bias, *self.targets)


class PerToken:
    """A base class for sequence classifiers, whose `forward` then gives one number per token, (B, T) float32."""

    def forward(self, input_ids: Tensor, **inputs: Tensor) -> Tensor:
        backbone = getattr(self, self.base_model_prefix)  # type: ignore[attr-defined]
        out = backbone(input_ids=input_ids, use_cache=False, **inputs)
        return self.score(out.last_hidden_state).squeeze(-1).float()  # type: ignore[attr-defined]
