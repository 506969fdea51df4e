"""What a run may use and what that costs."""

from __future__ import annotations

from typing import Any

from pydantic import model_validator

from cai_ray.config.section import Section, operational


class CheckConfig(Section):
    """What `--check` cannot find out on the machine where it runs. It changes no result."""

    gpus: int | None = operational(None, gt=0)
    """GPUs of the cluster. Defaults to those of this machine."""
    gpu_gib: float | None = operational(None, gt=0)
    """Memory of one GPU in GiB as torch reports it (79 for an 80 GB card). Defaults to that of this machine's GPU."""
    model: dict[str, Any] | None = operational(None)
    """Fields of the model's config.json. Needed for a hub id that is not in this machine's cache."""


class EndpointPrices(Section):
    """Prices of the endpoints that are asked (engines of kind `openai`)."""

    input_per_million_tokens: float = operational(0.0, ge=0)
    """Price per million input tokens."""
    cached_input_per_million_tokens: float | None = operational(None, ge=0)
    """Price per million cached input tokens. Defaults to the normal input price."""
    output_per_million_tokens: float = operational(0.0, ge=0)
    """Price per million generated tokens."""


class PricesConfig(Section):
    """Prices of what a run uses, for the report and for `budget.money`. What has no price here costs nothing."""

    currency: str = operational("USD")
    """The currency of all prices, as it is printed."""
    gpu_hour: float | None = operational(None, ge=0)
    """Price of one GPU for an hour."""
    generation_gpu_hour: float | None = operational(None, ge=0)
    """Price of one GPU for an hour in the stages that generate, which often run on spot machines. Defaults to
    `gpu_hour`."""
    cpu_hour: float | None = operational(None, ge=0)
    """Price of one CPU for an hour, as engines and training workers reserve them (`cpus_per_actor`,
    `cpus_per_worker`)."""
    endpoint: EndpointPrices | None = operational(None)
    """Prices of endpoints."""

    @model_validator(mode="after")
    def _some(self) -> PricesConfig:
        if all(p is None for p in (self.gpu_hour, self.generation_gpu_hour, self.cpu_hour, self.endpoint)):
            raise ValueError("no price is given; name gpu_hour, generation_gpu_hour, cpu_hour or endpoint")
        return self


class BudgetConfig(Section):
    """Limits on everything that was ever done in the run directory, including stages that were made again.

    A limit that is reached stops the run with exit code 3. Work under way is finished and kept, and the same command
    goes on with a larger limit."""

    gpu_hours: float | None = operational(None, gt=0)
    """Most GPU hours, counted while GPUs are reserved."""
    cpu_hours: float | None = operational(None, gt=0)
    """Most CPU hours, counted while CPUs are reserved."""
    wall_hours: float | None = operational(None, gt=0)
    """Most hours of running stages, by the clock."""
    money: float | None = operational(None, gt=0)
    """Most money, by `prices` and in their currency."""

    @property
    def given(self) -> bool:
        return any(
            limit is not None for limit in (self.gpu_hours, self.cpu_hours, self.wall_hours, self.money)
        )
