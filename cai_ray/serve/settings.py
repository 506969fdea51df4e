"""The settings of a server: the arguments of its application in a Serve config file, and of `cai-ray serve`."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from cai_ray.config.judge import JudgeConfig
from cai_ray.config.load import set_value, validate_as
from cai_ray.config.run import RunConfig
from cai_ray.config.section import Section
from cai_ray.serve.keys import Key
from cai_ray.stages import POLICIES, Policy


class Replicas(Section):
    """How many copies of a deployment run. Serve follows the load between the bounds."""

    min: int = Field(default=1, ge=1)
    max: int = Field(default=1, ge=1)
    target_ongoing: int = Field(default=32, ge=1)
    """Requests in flight that each replica should have, if `max` is above `min`."""

    @model_validator(mode="after")
    def _ordered(self) -> Replicas:
        if self.max < self.min:
            raise ValueError(f"max={self.max} is below min={self.min}; raise it")
        return self

    def options(self) -> dict[str, Any]:
        """The options of a Serve deployment."""
        if self.min == self.max:
            return {"num_replicas": self.min}
        bounds = {"min_replicas": self.min, "max_replicas": self.max, "initial_replicas": self.min}
        return {"autoscaling_config": {**bounds, "target_ongoing_requests": self.target_ongoing}}


class ServeSettings(Section):
    run: str
    """The run's directory, any URI."""
    models: tuple[Policy, ...] = ()
    """Policies to serve, by these names, each with its own engine. By default the one furthest in training."""
    adapters: dict[str, str] = Field(default={})
    """LoRA adapters on the first model: names for clients, and folders as PEFT saves them (any URI)."""
    keys: tuple[Key, ...] = ()
    """Keys whose requests are answered, beside those in `token_file`."""
    token_file: str | None = None
    """A file of keys, read on the node that builds the application (`cai-ray serve --add-token` writes it)."""
    no_auth: bool = False
    """Answers everybody. For loopback addresses only."""
    max_body: int = Field(default=4 << 20, gt=0)
    """The largest body of a request, in bytes."""
    max_tokens: int = Field(default=4096, gt=0)
    """The most tokens of one answer. Also the limit if a request does not set one."""
    timeout_s: float = Field(default=600, gt=0)
    """Seconds for a whole request."""
    requests_per_minute: int | None = Field(default=None, gt=0)
    """The limit for each key, at each replica of the ingress."""
    cors_origins: tuple[str, ...] = ()
    """Origins of other web pages that may call the API from a browser."""
    log_prompts: bool = False
    """Whether texts of requests are logged."""
    judge: JudgeConfig | None = None
    """The critic's model and how it is asked; by default the run's `label.judge`. Requests bring their constitution."""
    policy: Replicas = Replicas()
    critic: Replicas = Replicas()
    ingress: Replicas = Replicas()
    drain_s: float = Field(default=30, ge=0)
    """Seconds that a stopping replica has for the requests that it has begun."""

    @model_validator(mode="after")
    def _names_differ(self) -> ServeSettings:
        if twice := next((m for m in self.models if self.models.count(m) > 1), None):
            raise ValueError(f"models names {twice!r} twice; name each once")
        if taken := next((a for a in self.adapters if a in POLICIES or ":" in a or not a), None):
            raise ValueError(
                f"adapters: {taken!r} cannot name an adapter; choose another name, without colons"
            )
        return self

    @model_validator(mode="after")
    def _judge_can_be_asked(self) -> ServeSettings:
        if self.judge and self.judge.model == "rm":
            raise ValueError("judge.model=rm: a reward model answers no question; use a language model")
        if self.judge and self.judge.constitution:
            raise ValueError(
                "judge.constitution: the critic judges by the server's constitution; leave it out, and change that "
                "one with `cai-ray serve --update-constitution`"
            )
        return self

    def judge_of(self, config: RunConfig) -> JudgeConfig:
        """The judge that answers as the critic of a run."""
        return self.judge or config.label.judge


def load(data: dict[str, Any], overrides: list[str] | None = None) -> ServeSettings:
    """Settings from plain data, and `a.b=value` items over them.

    Raises:
        InputError: a key is unknown or a value out of range.
    """
    for item in overrides or []:
        set_value(data, item)
    return validate_as(ServeSettings, data, "serve")
