"""What a run has cost: seconds of CPUs and GPUs that were held for it, tokens of endpoints, and by prices money.

Every attempt at a stage leaves one record, RUN/spent/STAGE-*.json, which is written while it runs (meter.py), so that
one that is killed is counted, too. A stage that is completed has the sum of its attempts in its manifest. The records
stay: what a stage cost that was made again was spent all the same.
"""

from __future__ import annotations

from collections.abc import Iterable
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
    """What was held, and for how long: CPUs and GPUs are counted as they are reserved, in use or not."""

    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    gpu_seconds: float = 0.0
    start_seconds: float = 0.0
    """Of generating processes, until their engines answered. Together, as `work_seconds`."""
    work_seconds: float = 0.0
    """Of generating processes, from then on until their last row."""
    endpoint: Usage = Usage()
    """Tokens and calls that endpoints answered, those of rows that failed among them."""

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
    def of(cls, found: dict[str, Any]) -> Spent:
        """From `as_dict`, whatever else is beside it."""
        numbers = {name: float(found.get(name) or 0) for name in cls._fields if name != "endpoint"}
        return cls(**numbers, endpoint=Usage(**(found.get("endpoint") or {})))


class Attempt(NamedTuple):
    """At a stage. `made`: the id of the manifest that it led to; None while there is none."""

    name: str
    stage: str
    inputs: str
    """A hash of the stage's inputs."""
    started: str
    made: str | None
    spent: Spent

    def write(self, run: Run) -> None:
        about = {name: getattr(self, name) for name in ("stage", "inputs", "started", "made")}
        files.write_json(run.path(FOLDER, f"{self.name}.json"), {**about, **self.spent.as_dict()})


def attempts(run: Run, stage: str = "") -> list[Attempt]:
    """All that this directory has seen, by stage; or those at one stage.

    Raises:
        InputError: the record of one is damaged.
    """
    found = []
    for path in files.list_files(run.path(FOLDER), ".json"):
        name = path.rsplit("/", 1)[1].removesuffix(".json")
        if not name.startswith(stage and f"{stage}-"):
            continue
        remedy = "delete it; what that attempt cost is then not counted"
        said = files.read_object(run.path(FOLDER, f"{name}.json"), remedy)
        if said is None:
            continue
        about = {key: said[key] for key in ("stage", "inputs", "started", "made")}
        found.append(Attempt(name=name, **about, spent=Spent.of(said)))
    return found


def settle(run: Run, stage: str, inputs: str, made: str) -> None:
    """A manifest holds these attempts: later ones at the same stage are not added to them."""
    for attempt in attempts(run, stage):
        if attempt.inputs == inputs and attempt.made is None:
            attempt._replace(made=made).write(run)


def resources(run: Run, stage: str, inputs: str) -> dict[str, Any]:
    """For the manifest of a stage that is done: the sum of the attempts that led to it, and how many there were."""
    own = [a for a in attempts(run, stage) if a.inputs == inputs and a.made is None]
    return {"attempts": len(own), **total(own).as_dict()}


def total(found: Iterable[Attempt]) -> Spent:
    return sum((a.spent for a in found), Spent())


def money(spent: Spent, stage: str, prices: PricesConfig | None) -> float | None:
    """None without prices. What has no price costs nothing."""
    if prices is None:
        return None
    gpu = prices.gpu_hour
    if STAGES[stage].kind != "trains" and prices.generation_gpu_hour is not None:
        gpu = prices.generation_gpu_hour
    held = spent.gpu_seconds * (gpu or 0) + spent.cpu_seconds * (prices.cpu_hour or 0)
    return held / HOUR + _tokens(spent.endpoint, prices)


def _tokens(used: Usage, prices: PricesConfig) -> float:
    price = prices.endpoint
    if price is None:
        return 0.0
    fresh, cached = price.input_per_million_tokens, price.cached_input_per_million_tokens
    read = (used.prompt - used.cached) * fresh + used.cached * (fresh if cached is None else cached)
    return (read + used.generated * price.output_per_million_tokens) / 1e6


def by_stage(run: Run, names: Iterable[str]) -> dict[str, Spent]:
    """What each stage took that is done, by its manifest, or that is under way; others are left out."""
    found, open_ = {}, [a for a in attempts(run) if a.made is None]
    for name in names:
        manifest = run.manifest(name)
        if manifest and manifest.get("resources"):
            found[name] = Spent.of(manifest["resources"])
        elif manifest is None and (own := [a for a in open_ if a.stage == name]):
            found[name] = total(own)
    return found


def over_budget(config: RunConfig, found: Iterable[Attempt]) -> str | None:
    """Which limit these attempts have reached, and how to go on, in a line; None if none is."""
    found = list(found)
    whole = total(found)
    used = {
        "gpu_hours": whole.gpu_seconds / HOUR,
        "cpu_hours": whole.cpu_seconds / HOUR,
        "wall_hours": whole.wall_seconds / HOUR,
        "money": sum(money(a.spent, a.stage, config.prices) or 0.0 for a in found),
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
