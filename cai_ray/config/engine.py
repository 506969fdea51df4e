"""The cluster that a run joins, and the engines that generate on it."""

from __future__ import annotations

import re
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from cai_ray.config.section import Section, Threads, operational


class RayConfig(Section):
    """The Ray cluster that the run uses."""

    address: str | None = operational(None)
    """Address of a running cluster (`auto` or ray://…). By default a cluster is started on this machine; inside a Ray
    job the job's own cluster is used."""
    cpus: int | None = operational(None, gt=0)
    """Logical CPUs of a cluster that is started here. Defaults to 16, because each of Ray's bookkeeping actors wants
    one."""
    training_nodes: str | None = operational(None)
    """A custom resource that marks the nodes for training and for PPO's sampling (cluster.yaml: `training`). By default
    any node is used."""
    generation_nodes: str | None = operational(None)
    """A custom resource that marks the nodes for the engines of the other stages (cluster.yaml: `generation`)."""
    autoscaling_config: str | None = operational(None)
    """The cluster's configuration file, which says what nodes the autoscaler may add. By default it is looked for where
    `ray up` or the Kubernetes operator puts it."""


class EngineConfig(Section):
    """An engine that generates: vLLM on this cluster, or an endpoint."""

    kind: Literal["vllm", "openai", "scripted"] = "vllm"
    """`vllm`: vLLM on the cluster. `openai`: an endpoint with the OpenAI API, for models that are not trained here.
    `scripted`: for tests."""
    base_url: str | None = None
    """The endpoint's address, which usually ends in /v1. It must not contain a key."""
    api_key_env: str | None = operational(None)
    """The environment variable that holds the endpoint's key, on every node. Defaults to OPENAI_API_KEY for https and
    to no key for http. Empty: no key."""
    top_logprobs: int = Field(default=20, gt=1)
    """How many of the likeliest first tokens to request from an endpoint. The options are looked for among them."""
    continues: bool = False
    """The endpoint can continue an answer that is begun for it, as vLLM's can. If not, the beginning is left out."""
    timeout_s: float = operational(120, gt=0)
    """Time limit of one request to an endpoint, in seconds."""
    attempts: int = operational(10, gt=0)
    """Most attempts at one call if an endpoint throttles, fails, times out or sends an invalid answer."""
    give_up_s: float = operational(900, gt=0)
    """Time limit of all attempts at one call together, in seconds, including the pauses between them."""
    device: Literal["auto", "cpu", "gpu"] = operational("auto")
    """Where engines and training run. `auto`: on GPUs if there are any."""
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "auto"
    """Precision of the engine. `auto`: on a GPU the checkpoint's own; on a CPU bfloat16 if the processor has units for
    it, otherwise float32. It is decided at a run's first start. PPO's rollouts use `ppo.dtype`."""
    max_model_len: int | None = Field(default=None, gt=0)
    """Context length in tokens, prompt and answer together. Defaults to the model's own. It decides which prompts fit
    and where answers are cut."""
    max_num_seqs: int = operational(64, gt=0)
    """Most sequences that one engine runs at once, or most requests to an endpoint."""
    min_actors: int = operational(1, gt=0)
    """Engines that a stage starts with."""
    max_actors: int = operational(1, gt=0)
    """Most engines of a stage, if the cluster has room for them."""
    tensor_parallel: int = operational(1, gt=0)
    """GPUs that each layer is split over."""
    pipeline_parallel: int = operational(1, gt=0)
    """Groups of layers, each on its own GPUs. PPO's rollouts cannot use it."""
    quantization: str | None = None
    """How weights are quantised when they are loaded (`fp8`, `bitsandbytes`, …). Defaults to the checkpoint's own
    format. PPO's rollouts keep the trainer's precision."""
    cpus_per_actor: float = operational(1, gt=0)
    """CPUs that each engine reserves."""
    threads: Threads = operational("auto")
    """Threads of an engine. `auto`: on a CPU the node's cores divided by the engines and training workers on it; on a
    GPU 1."""
    kv_cache_mb: int = operational(256, gt=0)
    """Size of the KV cache on CPU, in MB. On a GPU the cache takes the memory that is left."""
    block_size: int | None = operational(None, gt=0)
    """Tokens in a block of the prefix cache. Short prompts are cached better in short blocks."""
    extra: dict[str, Any] = Field(default={})
    """Further arguments of vLLM's engine, or further fields of each request to an endpoint. There, a field with null is
    not sent."""
    leave_out: tuple[str, ...] = ()
    """Fields that an endpoint is never sent, such as [seed, temperature] or [top_k, min_p, repetition_penalty]; it then
    does as its own default says. Fields that it refuses are left out from the first refusal on in any case."""

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

    @field_validator("leave_out")
    @classmethod
    def _can_be_left_out(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if needed := {"model", "messages"} & set(value):
            raise ValueError(f"{min(needed)}: no request is one without it; take it out of the list")
        return value

    @property
    def answers_by(self) -> dict[str, Any]:
        """What changes the text of a model's answers, beside the model: the endpoint and how it is prompted, or the
        precision of the weights. Rows are reused only if it is the same."""
        served = {"base_url", "top_logprobs", "continues", "extra", "leave_out"}
        names = served if self.kind == "openai" else {"quantization", "dtype", "extra"}
        return self.model_dump(mode="json", include=names, exclude_defaults=True)

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
        if self.kind != "openai" and self.leave_out:
            raise ValueError(f"`leave_out` is not for kind={self.kind}; set kind: openai, or take it away")
        return self
