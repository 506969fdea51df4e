"""The cluster that a run joins, and the engines that generate on it."""

from __future__ import annotations

import re
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from cai_ray.config.section import Section


class RayConfig(Section):
    address: str | None = None
    """A running cluster (`auto`, ray://…); by default one is started here, or the job's own is joined."""
    cpus: int | None = Field(default=None, gt=0)
    """Logical CPUs of a cluster started here; by default 16, since Ray's bookkeeping actors want one each."""
    training_nodes: str | None = None
    """A custom resource that marks the nodes which train, and sample for PPO (cluster.yaml: `training`); by default
    any node may."""
    generation_nodes: str | None = None
    """The same for the engines of the other stages (cluster.yaml: `generation`)."""
    autoscaling_config: str | None = None
    """The cluster's configuration, to know which nodes its autoscaler may add; by default where `ray up` puts it on
    the head, or the Kubernetes operator's."""


class EngineConfig(Section):
    kind: Literal["vllm", "openai", "scripted"] = "vllm"
    """`openai`: an endpoint with the OpenAI API, for judges (`label.judge.engine`) and `revise.critique_model`."""
    base_url: str | None = None
    """The endpoint's address, without a key in it; it mostly ends in /v1."""
    api_key_env: str | None = None
    """Environment variable with the endpoint's key, on every node; by default OPENAI_API_KEY for https and none for
    http. Empty: no key."""
    top_logprobs: int = Field(default=20, gt=1)
    """Likeliest first tokens that an endpoint is asked for, to find the options among them."""
    continues: bool = False
    """Whether the endpoint goes on with an answer that is begun for it (vLLM's does). Otherwise the beginning is left
    out."""
    timeout_s: float = Field(default=120, gt=0)
    """Of one request to an endpoint."""
    attempts: int = Field(default=10, gt=0)
    """At most so many, where an endpoint throttles, fails, does not answer or answers garbage."""
    give_up_s: float = Field(default=900, gt=0)
    """Time for all attempts of one call and the waiting between them."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "auto"
    max_model_len: int | None = Field(default=None, gt=0)
    """Context in tokens, prompt and answer; by default the model's own."""
    max_num_seqs: int = Field(default=64, gt=0)
    """Sequences the engine runs at once (an endpoint: requests); also bounds the rows in flight per actor."""
    min_actors: int = Field(default=1, gt=0)
    max_actors: int = Field(default=1, gt=0)
    tensor_parallel: int = Field(default=1, gt=0)
    """GPUs among which each layer is split."""
    pipeline_parallel: int = Field(default=1, gt=0)
    """Groups of layers, each on GPUs of its own. Not for PPO's rollouts, whose weights change."""
    quantization: str | None = None
    """How weights are quantised when they are loaded (`fp8`, `bitsandbytes`, …); by default as the checkpoint is. Not
    for PPO's rollouts, which have the trainer's precision."""
    cpus_per_actor: float = Field(default=1, gt=0)
    kv_cache_mb: int = Field(default=256, gt=0)
    """KV cache on CPU; on a GPU it is what the card has left."""
    block_size: int | None = Field(default=None, gt=0)
    """Tokens in a block of the prefix cache; short prompts want short blocks."""
    extra: dict[str, Any] = Field(default={})
    """Further arguments of vLLM's engine, as they are; of an endpoint, further fields of each request."""

    @field_validator("base_url")
    @classmethod
    def _plain_url(cls, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            url = urlsplit(value)
            fine = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
        except ValueError:  # brackets or a port that are none
            fine = False
        if not fine or "@" in url.netloc or url.query or url.fragment:
            # It is not repeated here, as it may hold a secret; nor may it do so, as it is written to run.json.
            raise ValueError(
                "give http(s)://host[:port]/path, without user, ? and #; a key goes to `api_key_env`"
            )
        return value.rstrip("/")

    @field_validator("api_key_env")
    @classmethod
    def _no_key(cls, value: str | None) -> str | None:
        if value and not re.fullmatch(
            r"[A-Z_][A-Z0-9_]*", value
        ):  # perhaps a key: it is not repeated here either
            raise ValueError(
                "the name of an environment variable in capitals is needed, never the key itself"
            )
        return value

    @property
    def answers_by(self) -> dict[str, Any]:
        """What changes a model's answers, beside the model: which endpoint, and how it is asked, or rounded weights."""
        if self.kind == "openai":
            return self.model_dump(mode="json", include={"base_url", "top_logprobs", "continues", "extra"})
        return {"quantization": self.quantization} if self.quantization else {}

    @property
    def span(self) -> int:
        """GPUs of one engine."""
        return self.tensor_parallel * self.pipeline_parallel

    @model_validator(mode="after")
    def _endpoint(self) -> EngineConfig:
        if self.kind == "openai" and not self.base_url:
            raise ValueError("kind=openai needs `base_url`, such as https://api.openai.com/v1")
        if self.kind != "openai" and self.base_url:
            raise ValueError(f"`base_url` is not for kind={self.kind}; set kind: openai, or leave it out")
        return self
