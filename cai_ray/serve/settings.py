"""What a server is told: the arguments of its application in a Serve config file, and of `cai-ray serve`."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from cai_ray.config.load import set_value, validate_as
from cai_ray.config.section import Section
from cai_ray.serve.keys import Key
from cai_ray.stages import POLICIES, Policy


class Replicas(Section):
    """How many copies of a deployment run. Between the bounds Serve follows the load."""

    min: int = Field(default=1, ge=1)
    max: int = Field(default=1, ge=1)
    target_ongoing: int = Field(default=32, ge=1)
    """Requests in flight that one replica is meant to have, where `max` is above `min`."""

    @model_validator(mode="after")
    def _ordered(self) -> Replicas:
        if self.max < self.min:
            raise ValueError(f"max={self.max} is below min={self.min}; raise it")
        return self

    def options(self) -> dict[str, Any]:
        """As Serve's deployment options."""
        if self.min == self.max:
            return {"num_replicas": self.min}
        bounds = {"min_replicas": self.min, "max_replicas": self.max, "initial_replicas": self.min}
        return {"autoscaling_config": {**bounds, "target_ongoing_requests": self.target_ongoing}}


class ServeSettings(Section):
    run: str
    """The run's directory, any URI."""
    models: tuple[Policy, ...] = ()
    """Policies to serve, each by this name and with an engine of its own; by default the one furthest in training."""
    adapters: dict[str, str] = Field(default={})
    """LoRA adapters on the first of the models, by the name that clients ask for: folders as PEFT saves them, any
    URI."""
    keys: tuple[Key, ...] = ()
    """Whose requests are answered, beside those of `token_file`."""
    token_file: str | None = None
    """A file of keys, read where the application is built (`cai-ray serve --add-token` writes it)."""
    no_auth: bool = False
    """Everybody is answered: for loopback alone."""
    max_body: int = Field(default=4 << 20, gt=0)
    """Largest body of a request, in bytes."""
    max_tokens: int = Field(default=4096, gt=0)
    """Most tokens that one answer may have; also what it may have where a request does not say."""
    timeout_s: float = Field(default=600, gt=0)
    """For a whole request."""
    requests_per_minute: int | None = Field(default=None, gt=0)
    """For each key, at each replica of the ingress."""
    cors_origins: tuple[str, ...] = ()
    """Web pages that may call the API from a browser, beside the server's own."""
    log_prompts: bool = False
    """Whether texts of requests go to the log."""
    policy: Replicas = Replicas()
    critic: Replicas = Replicas()
    ingress: Replicas = Replicas()
    drain_s: float = Field(default=30, ge=0)
    """How long a replica that is to stop may take for what it has begun."""

    @model_validator(mode="after")
    def _names_differ(self) -> ServeSettings:
        if twice := next((m for m in self.models if self.models.count(m) > 1), None):
            raise ValueError(f"models names {twice!r} twice; name each once")
        if taken := next((a for a in self.adapters if a in POLICIES or ":" in a or not a), None):
            raise ValueError(f"adapters: {taken!r} is no name for one; choose another, without colons")
        return self


def load(data: dict[str, Any], overrides: list[str] | None = None) -> ServeSettings:
    """Settings from plain data, and `a.b=value` items over them.

    Raises:
        InputError: a key is unknown or a value out of range.
    """
    for item in overrides or []:
        set_value(data, item)
    return validate_as(ServeSettings, data, "serve")
