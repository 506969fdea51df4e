"""Reuse: what an edit does not reach is not generated again.

A response, a step of revision and a vote carry a key: a hash of everything that they depend on (conversation,
responses, the principle's words, template set, model, sampling). When a stage is run again, its earlier rows are set
aside until it is done; each new row is given the earlier rows of its id, and takes over what has the key that it would
get today. So nothing is reused that could have come out differently, whichever attempt wrote it, and however many
edits ago.
"""

from __future__ import annotations

import uuid
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from operator import itemgetter
from typing import Any, NamedTuple, NotRequired, TypedDict, TypeVar, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs

from cai_ray.storage import files
from cai_ray.storage.arrow import schema_of
from cai_ray.storage.filesystems import make_parent, resolve
from cai_ray.storage.models import ResolvedModel
from cai_ray.storage.records import Step, Vote, derive_id
from cai_ray.storage.run import Run
from cai_ray.storage.tables import has_rows, iter_file, list_rows


class EarlierRevision(TypedDict):
    """What a revision can take over from an earlier one of its id."""

    id: str
    key: NotRequired[str | None]
    response: str | None
    truncated: bool | None
    tokens: NotRequired[int | None]
    steps: list[Step] | None


class EarlierLabel(TypedDict):
    """What a label can take over from an earlier one of its id."""

    id: str
    votes: list[Vote] | None


STAGES: dict[str, type] = {"revise": EarlierRevision, "label": EarlierLabel}
"""The stages whose rows carry keys, and what is read of their earlier rows."""
FOLDER = "before"
CHUNK = 8192
"""New rows whose earlier rows are looked up together; both are in memory."""

Task = TypeVar("Task", bound=Mapping[str, Any])
Keyed = TypeVar("Keyed", EarlierRevision, Step, Vote)


def context(run: Run, model: ResolvedModel, *settings: object) -> str:
    """The part of a key that all rows of a stage share: who answers, and how it is asked."""
    who = model.location if model.is_served else model.sha
    asked = [how for how in (model.template_args, model.chat_template) if how]
    return derive_id(who, model.engine.answers_by, *asked, *settings, run.config.seed)


def set_aside(run: Run, stage: str) -> None:
    """Clears a stage's folder. If its rows carry keys, they are moved to `before`, also those of an unfinished
    attempt."""
    folder = run.path(stage)
    if stage not in STAGES:
        files.delete(folder)
        return
    fs, root = resolve(folder)
    # First: without a manifest the stage is not complete, wherever this is interrupted.
    files.delete(files.join(folder, "manifest.json"))
    rows = {path: path.rsplit("/", 1)[1].split("-")[0] for path in files.list_files(folder, ".parquet")}
    for path in files.list_files(files.join(folder, "journal"), ".parquet", recursive=True):
        name, file = path.split("/")[-2:]
        if file.startswith("done-"):
            rows[path] = name
    for path, name in rows.items():
        target = f"{root}/{FOLDER}/{name}-{uuid.uuid4().hex[:12]}.parquet"
        make_parent(fs, target)
        fs.move(path, target)
    files.delete(files.join(folder, "journal"))
    for path in files.list_files(folder):
        fs.delete_file(path)


def borrow(run: Run, other: Run, stage: str) -> None:
    """Copies another run's rows to where a stage that was not run yet finds them as earlier rows."""
    if run.manifest(stage) or has_rows(run.path(stage, FOLDER)):
        return
    for path in files.list_files(other.path(stage), ".parquet"):
        file = path.rsplit("/", 1)[1]
        files.copy(files.join(other.path(stage), file), run.path(stage, FOLDER, file))


def with_earlier(run: Run, stage: str, tasks: Iterable[Task], name: str = "part") -> Iterator[Task]:
    """Tasks with the earlier rows of their id in the column `earlier`, where there are any.

    A list of tasks is put in the order of ids. In that order, as rows of a completed stage are, each file of earlier
    rows is read for the few tasks that its ids lie among, and not for all.
    """
    folder = run.path(stage, FOLDER)
    if not has_rows(folder, name):
        yield from tasks
        return
    earlier_files = [_EarlierFile.of(path, resolve(folder)[0]) for path in list_rows(folder, name)]
    ordered = iter(sorted(tasks, key=itemgetter("id")) if isinstance(tasks, list) else tasks)
    while some := list(islice(ordered, CHUNK)):
        earlier = _earlier(earlier_files, stage, [task["id"] for task in some])
        for task in some:
            yield cast(Task, {**task, "earlier": earlier[task["id"]]}) if task["id"] in earlier else task


def _earlier(
    earlier_files: Iterable[_EarlierFile], stage: str, ids: list[str]
) -> dict[str, list[dict[str, Any]]]:
    """Rows that were set aside, by id."""
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    chosen, first, last = pa.array(ids, pa.string()), min(ids), max(ids)
    for file in earlier_files:
        if file.last < first or last < file.first:
            continue
        for table in iter_file(file.fs, file.path, schema_of(STAGES[stage]).names):
            for row in table.filter(pc.is_in(table["id"], chosen)).to_pylist():
                rows[row["id"]].append(row)
    return rows


class _EarlierFile(NamedTuple):
    """A file of earlier rows, and the ids that they lie between."""

    fs: pafs.FileSystem
    path: str
    first: str
    last: str

    @classmethod
    def of(cls, path: str, fs: pafs.FileSystem) -> _EarlierFile:
        ends = [pc.min_max(table["id"]).as_py() for table in iter_file(fs, path, ["id"]) if table.num_rows]
        return cls(
            fs, path, min((e["min"] for e in ends), default=""), max((e["max"] for e in ends), default="")
        )


def content(run: Run, stage: str) -> str:
    """A hash of what a stage's rows say, whatever their order, their files and the cost of making them; "" without
    rows."""
    total = rows = 0
    for row in run.each_row(stage):
        if row["error"] is None:
            facts = {k: v for k, v in row.items() if k not in ("usage", "constitution_sha")}
            total, rows = total + int(derive_id(facts), 16), rows + 1
    return f"{total % 2**64:016x}" if rows else ""


def by_key(parts: Iterable[Keyed]) -> dict[str, Keyed]:
    """Earlier responses, steps or votes by their key; those without one are left out."""
    return {key: part for part in parts if (key := part.get("key"))}
