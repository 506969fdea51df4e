"""The heads of policy, reward model and value model."""

from __future__ import annotations

from torch import Tensor, nn

from cai_ray.train.losses import head_logprobs


class ScoreHead(nn.Linear):
    """A head that multiplies in fp32: differences of scores are small beside the scores."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return nn.functional.linear(input.float(), self.weight.float(), bias)


class LogprobHead(nn.Linear):
    """An output head that gives the log-probabilities of asked tokens (B, T) in place of the logits (B, T, V).

    Inside the model's own forward pass, where its weight is whole under ZeRO-3 too.
    """

    asked: tuple[Tensor, Tensor, float, Tensor] | None = None
    """Ids, mask, temperature and places (`losses.head_logprobs`), for one pass."""

    def forward(self, input: Tensor) -> Tensor:
        if self.asked is None:
            return super().forward(input)
        return head_logprobs(input, self.weight, self.bias, *self.asked)


class PerToken:
    """Makes a sequence classifier give one number per token: `forward` is (B, T) float32."""

    def forward(self, input_ids: Tensor, **inputs: Tensor) -> Tensor:
        backbone = getattr(self, self.base_model_prefix)  # type: ignore[attr-defined]
        out = backbone(input_ids=input_ids, use_cache=False, **inputs)
        return self.score(out.last_hidden_state).squeeze(-1).float()  # type: ignore[attr-defined]
