"""A run directory of artifacts, on any file system that pyarrow knows (plain paths, file://, s3://, gs://)."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import yaml

from cai_ray import constitution as constitutions
from cai_ray.config.judge import PromptedModel
from cai_ray.config.load import validate
from cai_ray.config.run import RunConfig
from cai_ray.constitution import Constitution
from cai_ray.errors import InputError
from cai_ray.stages import ROLES, maker_of
from cai_ray.storage.files import exists, join, read_bytes, read_object, write_bytes
from cai_ray.storage.models import ResolvedModel, local_model
from cai_ray.storage.tables import iter_tables, read_tables, write_table


@dataclass(frozen=True)
class StageRows:
    """Rows of `name`-*.parquet in a folder. Each iteration reads them anew."""

    uri: str
    columns: list[str] | None = None
    name: str = "part"

    def __iter__(self) -> Iterator[Any]:
        for table in iter_tables(self.uri, self.columns, self.name):
            yield from table.to_pylist()


class Run:
    """A run directory and its resolved configuration. Plain data: it can be sent to Ray workers."""

    def __init__(self, config: RunConfig):
        self.config = config
        out = config.out.replace("{name}", config.name)
        if not out.strip():
            raise InputError("out: is empty; name a run directory, for example --out runs/first")
        if "{" in out or "}" in out:
            raise InputError(
                f"out {config.out}: only {{name}} may stand in braces; choose another with --out"
            )
        self._today: str | None = None
        self.root = out if "://" in out else os.path.abspath(os.path.expanduser(out))

    def path(self, *parts: str) -> str:
        return join(self.root, *parts)

    def constitution(self) -> Constitution:
        """The constitution that the run was made with: the run's own copy, whatever became of the original."""
        copy = self.path("constitution.yaml")
        if exists(copy):
            return constitutions.parse(yaml.safe_load(read_bytes(copy)), copy)
        return self.config.document

    def manifest(self, stage: str) -> dict[str, Any] | None:
        """The stage's manifest, or None while the stage is not complete.

        Raises:
            InputError: the manifest is damaged.
        """
        folder = self.path(stage)
        return read_object(join(folder, "manifest.json"), f"delete {folder} and run the stage again")

    def facts(self, stage: str, name: str) -> dict[str, Any]:
        """A JSON file that a finished stage wrote beside its rows, such as `certificate.json`.

        Raises:
            InputError: the file is missing or damaged.
        """
        uri, remedy = self.path(stage, name), f"make it again with {_again(stage)}"
        facts = read_object(uri, remedy)
        if facts is None:
            raise InputError(f"{uri}: is missing; {remedy}")
        return facts

    def metrics(self, stage: str) -> list[dict[str, Any]]:
        """The rows of a stage's metrics.jsonl; none if there is no such file.

        Raises:
            InputError: the file is damaged.
        """
        uri, remedy = self.path(stage, "metrics.jsonl"), f"make it again with {_again(stage)}"
        try:
            rows = [json.loads(line) for line in read_bytes(uri).splitlines() if line.strip()]
        except FileNotFoundError:
            return []
        except ValueError as e:
            raise InputError(f"{uri}: is damaged ({e}); {remedy}") from e
        if not all(isinstance(row, dict) for row in rows):
            raise InputError(f"{uri}: an object is needed in each line; {remedy}")
        return rows

    def rows(self, stage: str, columns: list[str] | None = None, name: str = "part") -> list[Any]:
        """A stage's rows, in the order of their ids: dicts of the record that the stage writes.

        They are all in memory: where there may be many, use `each_row`.
        """
        return read_tables(self.path(stage), columns, name).to_pylist()

    def each_row(self, stage: str, columns: list[str] | None = None, name: str = "part") -> StageRows:
        """A stage's rows one by one, as often as one likes; few of them are in memory at a time.

        They come in the order of the stage's files: a stage that generates writes its rows in the order of their ids.
        """
        return StageRows(self.path(stage), columns, name)

    def rows_where(
        self, stage: str, column: str, values: Collection[str], name: str = "part"
    ) -> Iterator[Any]:
        """A stage's rows whose column has one of the values, in no particular order."""
        chosen = pa.array(sorted(values), pa.string())
        for table in iter_tables(self.path(stage), None, name):
            yield from table.filter(pc.is_in(table[column], chosen)).to_pylist()

    def write_rows(self, stage: str, table: pa.Table, part: int = 0) -> None:
        write_table(self.path(stage, f"part-{part:05d}.parquet"), table)

    def locate(self, which: str) -> str:
        """Path, URI or id of a model by its role (`base`, `sl`, `rm`, `rl`), or of a folder or id as it is."""
        stages = ROLES[which].stages if which in ROLES else ()
        maker = maker_of(which, self.config.method) or stages[0] if stages else None
        uri = self.path(maker, "model") if maker else self.config.model if which == "base" else which
        if uri == "town":  # the base model of the embedded world, which ships with the package
            return str(Path(__file__).parents[1] / "town" / "base")
        return uri

    def starts_from(self, role: str) -> str:
        """The role or folder whose architecture a model has: that of what its stage starts from, as long as that is
        made by a stage, too."""
        while stage := maker_of(role, self.config.method) if role in ROLES else None:
            role = getattr(getattr(self.config, stage), "init", "sl")
        return role

    def model(self, which: str) -> str:
        """The model's folder on this node, a copy if it is remote; see `locate`."""
        return local_model(self.locate(which))

    def resolve_model(self, model: PromptedModel | str) -> ResolvedModel:
        """A model that is prompted: what its settings leave out is taken from the run.

        Args:
            model: its settings; or a role, folder or id, which is prompted as the run's own models are.
        """
        config = self.config
        settings = PromptedModel(model=model) if isinstance(model, str) else model
        engine = settings.engine or config.engine
        if engine.kind == "openai":  # an endpoint knows its models by name alone
            location = config.model if settings.model == "base" else settings.model
        else:
            location = self.locate(settings.model)
        own = settings.model in ROLES or settings.model == config.model
        return ResolvedModel(
            settings.model,
            location,
            engine,
            settings.templates or config.templates,
            (config.template_args if own else {}) | settings.template_args,
            settings.chat_template or (config.chat_template if own else None),
            own or settings.templates is not None,
            config.thinking == "keep",
            self.today,
        )

    @property
    def today(self) -> str:
        """The day of the run's first start, as YYYY-MM-DD. It is what chat templates are told at every stage."""
        if self._today is None:
            uri = self.path("run.json")
            known = read_object(uri, "delete it, and start the run again") or {}
            self._today = str(known.get("today") or date.today().isoformat())
        return self._today

    def write_metrics(self, stage: str, rows: Iterable[dict[str, Any]]) -> None:
        """Replaces a stage's metrics.jsonl (object stores cannot append)."""
        text = "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows)
        write_bytes(self.path(stage, "metrics.jsonl"), text.encode())


def _again(stage: str) -> str:
    return f"`cai-ray {stage} CONFIG --overwrite`"


def open_run(uri: str) -> Run:
    """The run in a directory, as `run.json` describes it.

    Raises:
        InputError: the directory is not a run, or its run.json is damaged.
    """
    give = "give the directory that `cai-ray run` wrote"
    if not uri.strip():  # it would be the root of the file system
        raise InputError(f"the run directory is empty; {give}")
    path = join(uri, "run.json")
    remedy = f"delete it and run `cai-ray run CONFIG --out {uri}` again, which keeps what is done"
    try:
        value = read_object(path, remedy)
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e}); {give}") from e
    if value is None:
        raise InputError(f"{uri}: no run here (run.json is missing); {give}")
    if not isinstance(value.get("config"), dict):
        raise InputError(f"{path}: holds no configuration; {remedy}")
    try:
        config = validate(value["config"], path)
    except InputError as e:
        raise InputError(f"{e}; {remedy}") from e
    return Run(config.model_copy(update={"out": uri}))
