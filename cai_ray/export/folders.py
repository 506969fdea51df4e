"""A run as the Hugging Face world expects it: model folders and datasets with their cards.

    DIR/README.md, constitution.yaml
    DIR/models/{sl,rm,rl}/          the model folders as they are, each with a README.md
    DIR/datasets/README.md          what `datasets.load_dataset` reads
    DIR/datasets/data/{revisions,sft,preferences}/*.parquet

Columns are those of TRL's conversational formats, with more beside them. What the run has not made, or made before
what it rests on was made again, is left out and named.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.fs as pafs
import yaml

from cai_ray import constitution as constitutions
from cai_ray.errors import InputError
from cai_ray.export import cards
from cai_ray.prompts.load import load_templates
from cai_ray.prompts.messages import plain_messages
from cai_ray.prompts.renderer import Renderer
from cai_ray.prompts.templates import TemplateSet
from cai_ray.stages import models_of, needs_of, stages_of
from cai_ray.storage import files
from cai_ray.storage.arrow import arrow_type, schema_of
from cai_ray.storage.filesystems import resolve
from cai_ray.storage.records import SftRow, Turn
from cai_ray.storage.run import Run
from cai_ray.storage.tables import write_table

_text, _float = pa.string(), pa.float64()
MESSAGES = arrow_type(list[Turn])
SCHEMAS = {
    "revisions": pa.schema(
        [
            ("id", _text),
            ("prompt", MESSAGES),
            ("completion", MESSAGES),
            ("kind", _text),
            ("family", _text),
            ("response", _text),
            (
                "steps",
                pa.list_(pa.struct([(n, _text) for n in ("principle_id", "critique", "revision")])),
            ),
            ("truncated", pa.bool_()),
            ("constitution_sha", _text),
        ]
    ),
    "sft": schema_of(SftRow),
    "preferences": pa.schema(
        [
            ("id", _text),
            ("prompt", MESSAGES),
            ("chosen", MESSAGES),
            ("rejected", MESSAGES),
            ("p_chosen", _float),
            ("p_chosen_raw", _float),
            (
                "votes",
                pa.list_(pa.struct([("principle_id", _text), ("p_chosen", _float), ("abstained", _text)])),
            ),
            ("truncated_chosen", pa.bool_()),
            ("truncated_rejected", pa.bool_()),
            ("kind", _text),
            ("family", _text),
            ("feedback_model", _text),
            ("constitution_sha", _text),
        ]
    ),
}


class Exported(NamedTuple):
    written: list[str]
    missing: list[str]


def export(run: Run, out: str) -> Exported:
    """Writes the export of a run to a folder (any URI) that is empty or not there.

    Raises:
        InputError: the folder holds something, or the run has nothing to export yet.
    """
    _check_empty(out)
    manifests = {name: m for name in stages_of(run.config.method) if (m := _current(run, name))}
    if not manifests:
        raise InputError(f"{run.root}: nothing to export yet; finish a stage with `cai-ray run` first")
    path = run.path("constitution.yaml")
    if not files.exists(path):
        raise InputError(
            f"{path}: is missing; run `cai-ray run CONFIG --out {run.root}` again, which writes it"
        )
    document, templates = files.read_bytes(path), load_templates(run.config.templates)
    facts = cards.Facts(
        run.config,
        constitutions.parse(yaml.safe_load(document), path),
        manifests,
        report=run.facts("report", "report.json") if "report" in manifests else None,
        certificate=run.facts("label", "certificate.json") if "label" in manifests else None,
        example=plain_messages(templates.answer_messages([{"role": "user", "content": "…"}])),
    )
    files.write_bytes(files.join(out, "constitution.yaml"), document)
    done = Exported(["constitution.yaml"], [])
    for role, stage in models_of(run.config.method).items():
        if _present(run, facts, f"models/{role}", stage, done):
            _model(run, facts, role, templates, files.join(out, "models", role))
    rows: dict[str, int] = {}
    left_out: Counter[str] = Counter()
    for name, (stage, convert) in _DATASETS.items():
        if _present(run, facts, f"datasets: {name}", stage, done):
            converted = [new for row in run.rows(stage) if (new := convert(row, left_out))]
            table = pa.Table.from_pylist(converted, schema=SCHEMAS[name])
            place = files.join(out, "datasets", "data", name, "train-00000-of-00001.parquet")
            write_table(place, table, row_group_rows=10_000)
            rows[name] = len(converted)
    if rows:
        card = cards.dataset_card(facts, rows, dict(left_out))
        files.write_bytes(files.join(out, "datasets", "README.md"), card.encode())
    if facts.report is None:
        done.missing.append(f"results: {_why(run, 'report')}")
    card = cards.folder_card(facts, done.written, done.missing)
    files.write_bytes(files.join(out, "README.md"), card.encode())
    return done


def _present(run: Run, facts: cards.Facts, place: str, stage: str, done: Exported) -> bool:
    if stage in facts.manifests:
        done.written.append(place)
        return True
    done.missing.append(f"{place}: {_why(run, stage)}")
    return False


def _why(run: Run, stage: str) -> str:
    if run.manifest(stage) is None:
        return f"stage {stage} is not complete"
    return f"stage {stage} was made before what it reads was made again"


def _current(run: Run, name: str) -> dict[str, Any] | None:
    """The manifest of a stage that is complete and rests on the upstream stages as they are now."""
    manifest = run.manifest(name)
    if manifest is None:
        return None
    for upstream in needs_of(name, run.config.method):
        before = _current(run, upstream)
        if before is None or before["id"] != manifest["inputs"].get(upstream):
            return None
    return manifest


def _check_empty(out: str) -> None:
    if not out.strip():
        raise InputError("--out is empty; name a folder for the export")
    fs, path = resolve(out)
    kind = fs.get_file_info(path).type
    if kind == pafs.FileType.File or (
        kind == pafs.FileType.Directory and fs.get_file_info(pafs.FileSelector(path))
    ):
        raise InputError(f"{out}: holds something already; name another folder with --out, or delete it")


def _model(run: Run, facts: cards.Facts, role: str, templates: TemplateSet, out: str) -> None:
    source = run.path(models_of(run.config.method)[role], "model")
    files.upload_folder(source, out)
    if templates.chat_template:  # the run's, in the place of the model's own
        files.write_bytes(files.join(out, "chat_template.jinja"), templates.chat_template.encode())
    end, scale = "", None
    if role == "rm":
        end = _end_token(source, templates)
        scale = run.facts("rm", "model/reward_head.json")
    card = cards.model_card(role, facts, end, scale)
    files.write_bytes(files.join(out, "README.md"), card.encode())


def _end_token(model: str, templates: TemplateSet) -> str:
    """The token that ends an answer, from a model's folder without its weights."""
    with tempfile.TemporaryDirectory() as folder:
        for path in files.list_files(model):
            if not path.endswith(".safetensors"):
                name = Path(path).name
                files.copy(files.join(model, name), Path(folder) / name)
        renderer = Renderer(folder, templates.chat_template)
        return renderer.tokenizer.convert_ids_to_tokens(renderer.end_id)


def _revision(row: dict[str, Any], left_out: Counter[str]) -> dict[str, Any] | None:
    if row["error"]:
        return None
    steps = row["steps"] or []
    answer = row["response"] if row["revision"] is None else row["revision"]
    return {
        **{k: row[k] for k in ("id", "kind", "family", "response", "constitution_sha")},
        "prompt": row["messages"],
        "completion": _said(answer),
        "steps": [{k: step[k] for k in ("principle_id", "critique", "revision")} for step in steps],
        "truncated": bool(row["truncated"]) and not steps,
    }


def _sft(row: dict[str, Any], left_out: Counter[str]) -> dict[str, Any]:
    return row


def _preference(row: dict[str, Any], left_out: Counter[str]) -> dict[str, Any] | None:
    if row["error"] or row["p_a"] is None:
        left_out["with an error"] += 1
        return None
    if row["response_a"] == row["response_b"]:
        left_out["of two responses that are the same"] += 1
        return None
    chosen, rejected = ("a", "b") if row["p_a"] >= 0.5 else ("b", "a")

    def toward(p_a: float | None) -> float | None:
        """The probability of what was chosen, from that of a."""
        return p_a if p_a is None or chosen == "a" else 1 - p_a

    return {
        **{k: row[k] for k in ("id", "kind", "family", "feedback_model", "constitution_sha")},
        "prompt": row["messages"],
        "chosen": _said(row[f"response_{chosen}"]),
        "rejected": _said(row[f"response_{rejected}"]),
        "truncated_chosen": bool(row[f"truncated_{chosen}"]),
        "truncated_rejected": bool(row[f"truncated_{rejected}"]),
        "p_chosen": toward(row["p_a"]),
        "p_chosen_raw": toward(row["p_a_raw"]),
        "votes": [
            {
                "principle_id": vote["principle_id"],
                "p_chosen": toward(vote["p_a"]),
                "abstained": vote["abstained"],
            }
            for vote in row["votes"] or []
        ],
    }


def _said(content: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": content}]


_DATASETS: dict[str, tuple[str, Callable[[dict[str, Any], Counter[str]], dict[str, Any] | None]]] = {
    "revisions": ("revise", _revision),
    "sft": ("sft", _sft),
    "preferences": ("label", _preference),
}
