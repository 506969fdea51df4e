"""What an edit does not reach is not asked again.

A response, a step of revision and a vote carry a key: a hash of everything that they depend on (conversation,
responses, the principle's words, template set, model, sampling). When a stage is made again, the rows of before are set
aside until it is done; each row meets its predecessors, and takes over what has the key that it would get today. So
nothing is reused that could have come out otherwise, whichever attempt wrote it, and however many edits ago.
"""

from __future__ import annotations

import json
import uuid
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cai_ray.config.engine import EngineConfig
from cai_ray.storage import files
from cai_ray.storage.filesystems import make_parent, resolve
from cai_ray.storage.models import model_sha
from cai_ray.storage.records import derive_id
from cai_ray.storage.run import Run
from cai_ray.storage.tables import has_rows, iter_tables

STAGES = ("revise", "label")
"""Those whose rows carry keys."""
FOLDER = "before"
CHUNK = 8192
"""Rows whose predecessors are looked for in one pass over what was set aside, and are in memory with them."""
_COLUMNS = {"revise": ["id", "key", "response", "truncated", "steps"], "label": ["id", "votes"]}


def context(run: Run, model: str, engine: EngineConfig, *settings: object) -> str:
    """The part of a key that all rows of a stage share: who answers, and how it is asked."""
    who = model_sha(model) if engine.kind != "openai" else model
    return derive_id(who, engine.answers_by, *settings, run.config.seed)


def set_aside(run: Run, stage: str) -> None:
    """Clears a stage's folder. Rows that carry keys are kept apart: those of the stage, and of an attempt at it."""
    folder = run.path(stage)
    if stage not in STAGES:
        files.delete(folder)
        return
    fs, root = resolve(folder)
    # First: without it the stage is not complete, wherever this is interrupted.
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
    """Puts another run's rows where a stage that is not made yet finds them."""
    if run.manifest(stage) or has_rows(run.path(stage, FOLDER)):
        return
    for path in files.list_files(other.path(stage), ".parquet"):
        file = path.rsplit("/", 1)[1]
        files.copy(files.join(other.path(stage), file), run.path(stage, FOLDER, file))


def with_before(
    run: Run, stage: str, rows: Iterable[dict[str, Any]], name: str = "part"
) -> Iterator[dict[str, Any]]:
    """Rows with their predecessors in `before`, as JSON: a chain reads them by `known`."""
    folder = run.path(stage, FOLDER)
    if not has_rows(folder, name):
        yield from rows
        return
    rows = iter(rows)
    while some := list(islice(rows, CHUNK)):
        found = _predecessors(folder, stage, name, [row["id"] for row in some])
        for row in some:
            yield {**row, "before": json.dumps(found[row["id"]])} if row["id"] in found else row


def _predecessors(folder: str, stage: str, name: str, ids: list[str]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    wanted = pa.array(ids, pa.string())
    for table in iter_tables(folder, _COLUMNS[stage], name):
        for row in table.filter(pc.is_in(table["id"], wanted)).to_pylist():
            found[row["id"]].append(row)
    return found


def content(run: Run, stage: str) -> str:
    """A hash of what a stage's rows say, in whatever order and files, and whatever it took to make them; "" of none."""
    total = rows = 0
    for row in run.each_row(stage):
        if row["error"] is None:
            said = {k: v for k, v in row.items() if k not in ("usage", "constitution_sha")}
            total, rows = total + int(derive_id(said), 16), rows + 1
    return f"{total % 2**64:016x}" if rows else ""


def known(row: Mapping[str, Any], within: str | None = None) -> dict[str, dict[str, Any]]:
    """A row's predecessors by key, or what they hold in a column of lists (`steps`, `votes`)."""
    rows = json.loads(row.get("before") or "[]")
    parts = rows if within is None else [part for r in rows for part in r[within] or ()]
    return {part["key"]: part for part in parts if part.get("key")}
