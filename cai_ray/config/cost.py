"""What a run may use and what that costs."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from cai_ray.config.section import Section


class CheckConfig(Section):
    """What `--check` cannot see from where it runs."""

    gpus: int | None = Field(default=None, gt=0)
    """GPUs of the cluster; by default those of this machine, where it has any."""
    gpu_gib: float | None = Field(default=None, gt=0)
    """Memory of one GPU as torch reports it (an 80 GB card has 79); by default that of this machine's."""
    model: dict[str, Any] | None = None
    """Fields of the model's config.json, for an id that is not in the cache of this machine."""


class EndpointPrices(Section):
    """Of the endpoints that models are asked at (engines of kind openai)."""

    input_per_million_tokens: float = Field(default=0.0, ge=0)
    cached_input_per_million_tokens: float | None = Field(default=None, ge=0)
    """Of input that the endpoint had in its cache; by default as other input."""
    output_per_million_tokens: float = Field(default=0.0, ge=0)


class PricesConfig(Section):
    """What the run's resources cost, for the report and `budget.money`. What has no price here costs nothing."""

    currency: str = "USD"
    gpu_hour: float | None = Field(default=None, ge=0)
    """Of one GPU."""
    generation_gpu_hour: float | None = Field(default=None, ge=0)
    """Of one GPU in the stages that generate, which mostly are on a spot market; by default `gpu_hour`."""
    cpu_hour: float | None = Field(default=None, ge=0)
    """Of one CPU that an engine or a training worker reserves (`cpus_per_actor`, `cpus_per_worker`)."""
    endpoint: EndpointPrices | None = None

    @model_validator(mode="after")
    def _some(self) -> PricesConfig:
        if all(p is None for p in (self.gpu_hour, self.generation_gpu_hour, self.cpu_hour, self.endpoint)):
            raise ValueError("no price is given; name gpu_hour, generation_gpu_hour, cpu_hour or endpoint")
        return self


class BudgetConfig(Section):
    """Limits of all that the run directory has seen, stages that were made again included. One that is reached stops
    the run with exit code 3: what was begun is finished and kept, and with a larger limit the same command goes on."""

    gpu_hours: float | None = Field(default=None, gt=0)
    cpu_hours: float | None = Field(default=None, gt=0)
    wall_hours: float | None = Field(default=None, gt=0)
    """While a stage runs."""
    money: float | None = Field(default=None, gt=0)
    """By `prices`, in their currency."""

    @property
    def given(self) -> bool:
        return any(
            limit is not None for limit in (self.gpu_hours, self.cpu_hours, self.wall_hours, self.money)
        )
