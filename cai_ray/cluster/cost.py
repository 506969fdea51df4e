"""Accounts for what a run has cost: seconds of CPUs and GPUs, tokens of endpoints, and their price in money.

Every attempt at a stage leaves one record, RUN/spent/STAGE-*.json. It is written while the stage runs (meter.py), so
that a killed attempt is counted, too. The manifest of a completed stage has the sum of its attempts. The records stay:
if a stage is made again, its earlier cost was spent all the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from cai_ray.cluster.usage import Usage
from cai_ray.config.cost import PricesConfig
from cai_ray.config.run import RunConfig
from cai_ray.stages import STAGES
from cai_ray.storage import files
from cai_ray.storage.run import Run

FOLDER = "spent"
HOUR = 3600.0
_UNITS = {"gpu_hours": "GPU hours", "cpu_hours": "CPU hours", "wall_hours": "hours"}


class Spent(NamedTuple):
    """Resources that were held, and for how long. Reserved CPUs and GPUs count, whether in use or not."""

    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    gpu_seconds: float = 0.0
    start_seconds: float = 0.0
    """Time of generating processes until their engines answered, added up over the processes."""
    work_seconds: float = 0.0
    """Time of generating processes from then on until their last row, added up likewise."""
    endpoint: Usage = Usage()
    """Tokens and calls that endpoints answered, including those of rows that failed."""

    def __add__(self, other: Spent) -> Spent:  # type: ignore[override]
        return Spent(
            self.wall_seconds + other.wall_seconds,
            self.cpu_seconds + other.cpu_seconds,
            self.gpu_seconds + other.gpu_seconds,
            self.start_seconds + other.start_seconds,
            self.work_seconds + other.work_seconds,
            self.endpoint + other.endpoint,
        )

    def as_dict(self) -> dict[str, Any]:
        numbers = {name: round(value, 2) for name, value in self._asdict().items() if name != "endpoint"}
        return {**numbers, "endpoint": self.endpoint._asdict()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Spent:
        """The reverse of `as_dict`. Further keys are ignored."""
        numbers = {name: float(data.get(name) or 0) for name in cls._fields if name != "endpoint"}
        return cls(**numbers, endpoint=Usage(**(data.get("endpoint") or {})))


class Attempt(NamedTuple):
    """One attempt at a stage."""

    name: str
    stage: str
    inputs: str
    """A hash of the stage's inputs."""
    started: str
    made: str | None
    """Id of the manifest that the attempt led to; None while there is none."""
    spent: Spent
    left_out: Mapping[str, Any] = {}
    """What endpoints were sent in place of fields that they refuse."""

    def write(self, run: Run) -> None:
        fields = {name: getattr(self, name) for name in ("stage", "inputs", "started", "made", "left_out")}
        files.write_json(run.path(FOLDER, f"{self.name}.json"), {**fields, **self.spent.as_dict()})


def attempts(run: Run, stage: str = "") -> list[Attempt]:
    """All attempts that the run directory records, in the order of their names; or only those at one stage.

    Raises:
        InputError: a record is damaged.
    """
    records = []
    for path in files.list_files(run.path(FOLDER), ".json"):
        name = path.rsplit("/", 1)[1].removesuffix(".json")
        if not name.startswith(stage and f"{stage}-"):
            continue
        remedy = "delete it; what that attempt cost is then not counted"
        data = files.read_object(run.path(FOLDER, f"{name}.json"), remedy)
        if data is None:
            continue
        fields = {key: data[key] for key in ("stage", "inputs", "started", "made")}
        left_out = data.get("left_out") or {}
        records.append(Attempt(name=name, **fields, spent=Spent.from_dict(data), left_out=left_out))
    return records


def settle(run: Run, stage: str, inputs: str, made: str) -> None:
    """Marks a stage's attempts as counted in a manifest, so that later attempts are not added to them."""
    for attempt in attempts(run, stage):
        if attempt.inputs == inputs and attempt.made is None:
            attempt._replace(made=made).write(run)


def resources(run: Run, stage: str, inputs: str) -> dict[str, Any]:
    """The sum of the attempts that led to a finished stage, and their number, for the stage's manifest."""
    own = [a for a in attempts(run, stage) if a.inputs == inputs and a.made is None]
    return {"attempts": len(own), **total(own).as_dict()}


def total(records: Iterable[Attempt]) -> Spent:
    return sum((a.spent for a in records), Spent())


def left_out(run: Run, stage: str, inputs: str) -> dict[str, Any]:
    """What endpoints were sent in place of fields that they refuse, in the attempts that led to a finished stage."""
    own = [a for a in attempts(run, stage) if a.inputs == inputs and a.made is None]
    return {key: sent for attempt in own for key, sent in attempt.left_out.items()}


def money(spent: Spent, stage: str, prices: PricesConfig | None) -> float | None:
    """The price of a stage's resources; None if the run has no prices. What has no price costs nothing."""
    if prices is None:
        return None
    gpu = prices.gpu_hour
    if STAGES[stage].kind != "trains" and prices.generation_gpu_hour is not None:
        gpu = prices.generation_gpu_hour
    held = spent.gpu_seconds * (gpu or 0) + spent.cpu_seconds * (prices.cpu_hour or 0)
    return held / HOUR + _token_price(spent.endpoint, prices)


def _token_price(used: Usage, prices: PricesConfig) -> float:
    price = prices.endpoint
    if price is None:
        return 0.0
    fresh, cached = price.input_per_million_tokens, price.cached_input_per_million_tokens
    read = (used.prompt - used.cached) * fresh + used.cached * (fresh if cached is None else cached)
    return (read + used.generated * price.output_per_million_tokens) / 1e6


def by_stage(run: Run, names: Iterable[str]) -> dict[str, Spent]:
    """What each stage took: a finished one by its manifest, one under way by its attempts. Others are left out."""
    stages, unfinished = {}, [a for a in attempts(run) if a.made is None]
    for name in names:
        manifest = run.manifest(name)
        if manifest and manifest.get("resources"):
            stages[name] = Spent.from_dict(manifest["resources"])
        elif manifest is None and (own := [a for a in unfinished if a.stage == name]):
            stages[name] = total(own)
    return stages


def over_budget(config: RunConfig, records: Iterable[Attempt]) -> str | None:
    """One line on the limit that these attempts have reached, and how to go on; None if none is reached."""
    records = list(records)
    whole = total(records)
    used = {
        "gpu_hours": whole.gpu_seconds / HOUR,
        "cpu_hours": whole.cpu_seconds / HOUR,
        "wall_hours": whole.wall_seconds / HOUR,
        "money": sum(money(a.spent, a.stage, config.prices) or 0.0 for a in records),
    }
    for name, amount in used.items():
        limit = getattr(config.budget, name)
        if limit is not None and amount >= limit:
            unit = config.prices.currency if name == "money" and config.prices else _UNITS.get(name, name)
            return (
                f"the budget is spent: {amount:.4g} of {limit:g} {unit} (budget.{name}); the same command goes on with "
                f"a larger one, such as --set budget.{name}={2 * max(limit, amount):.2g}"
            )
    return None
