"""A run as the Hugging Face world expects it: model folders and datasets with their cards.

    DIR/README.md, constitution.yaml
    DIR/models/{sl,rm,rl}/          the model folders as they are, each with a README.md
    DIR/datasets/README.md          what `datasets.load_dataset` reads
    DIR/datasets/data/{revisions,sft,preferences}/*.parquet

What the run has not made, or made before its inputs were made again, is left out and named.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.fs as pafs
import yaml

from cai_ray import constitution as constitutions
from cai_ray.errors import InputError
from cai_ray.export import cards
from cai_ray.export.card_facts import RunFacts
from cai_ray.export.datasets import DATASETS, SCHEMAS
from cai_ray.prompts.load import load_templates
from cai_ray.prompts.messages import plain_messages
from cai_ray.prompts.models import run_renderer
from cai_ray.prompts.renderer import Renderer
from cai_ray.prompts.templates import TemplateSet
from cai_ray.stages import models_of, needs_of, stages_of
from cai_ray.storage import files
from cai_ray.storage.arrow import to_tables
from cai_ray.storage.filesystems import resolve
from cai_ray.storage.run import Run
from cai_ray.storage.tables import write_tables


class Exported(NamedTuple):
    """The places of an export: those that were written, and those that are missing, with the reason."""

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
    document, templates = _constitution(run), load_templates(run.config.templates)
    facts = _facts(run, manifests, document, templates)
    files.write_bytes(files.join(out, "constitution.yaml"), document)
    exported = Exported(["constitution.yaml"], [])
    for role, stage in models_of(run.config.method).items():
        if _listed(run, facts, f"models/{role}", stage, exported):
            _write_model(run, facts, role, templates, files.join(out, "models", role))
    _write_datasets(run, facts, files.join(out, "datasets"), exported)
    if facts.report is None:
        exported.missing.append(f"results: {_why_missing(run, 'report')}")
    card = cards.run_card(facts, exported.written, exported.missing)
    files.write_bytes(files.join(out, "README.md"), card.encode())
    return exported


def _constitution(run: Run) -> bytes:
    """The run's copy of its constitution."""
    path = run.path("constitution.yaml")
    if not files.exists(path):
        raise InputError(
            f"{path}: is missing; run `cai-ray run CONFIG --out {run.root}` again, which writes it"
        )
    return files.read_bytes(path)


def _facts(
    run: Run, manifests: dict[str, dict[str, Any]], document: bytes, templates: TemplateSet
) -> RunFacts:
    return RunFacts(
        run.config,
        constitutions.parse(yaml.safe_load(document), run.path("constitution.yaml")),
        manifests,
        report=run.facts("report", "report.json") if "report" in manifests else None,
        certificate=run.facts("label", "certificate.json") if "label" in manifests else None,
        example=plain_messages(templates.answer_messages([{"role": "user", "content": "…"}])),
    )


def _listed(run: Run, facts: RunFacts, place: str, stage: str, exported: Exported) -> bool:
    """Lists a place as written or missing; tells whether its stage is there to export."""
    if stage in facts.manifests:
        exported.written.append(place)
        return True
    exported.missing.append(f"{place}: {_why_missing(run, stage)}")
    return False


def _why_missing(run: Run, stage: str) -> str:
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


def _write_model(run: Run, facts: RunFacts, role: str, templates: TemplateSet, out: str) -> None:
    source = run.path(models_of(run.config.method)[role], "model")
    files.upload_folder(source, out)
    renderer = _renderer(run, role, source)
    if templates.chat_template:
        _write_chat_template(out, templates.chat_template)
    end, scale = "", None
    if role == "rm":
        end = renderer.tokenizer.convert_ids_to_tokens(renderer.end_id)
        scale = run.facts("rm", "model/reward_head.json")
    else:
        _end_at_turns(out, renderer.end_id)
    card = cards.model_card(role, facts, end, scale)
    files.write_bytes(files.join(out, "README.md"), card.encode())


def _write_datasets(run: Run, facts: RunFacts, out: str, exported: Exported) -> None:
    """Writes every dataset whose stage is there, and their card if there is any."""
    rows: dict[str, int] = {}
    left_out: Counter[str] = Counter()
    for name, (stage, convert) in DATASETS.items():
        if _listed(run, facts, f"datasets: {name}", stage, exported):
            converted = (new for row in run.each_row(stage) if (new := convert(row, left_out)))
            place = files.join(out, "data", name, "train-00000-of-00001.parquet")
            rows[name] = sum(write_tables(place, to_tables(converted, SCHEMAS[name]), SCHEMAS[name]))
    if rows:
        card = cards.dataset_card(facts, rows, dict(left_out))
        files.write_bytes(files.join(out, "README.md"), card.encode())


def _write_chat_template(out: str, template: str) -> None:
    """Puts the run's chat template in the place of the model's own, in both files that programs look at."""
    files.write_bytes(files.join(out, "chat_template.jinja"), template.encode())
    place = files.join(out, "tokenizer_config.json")
    config = files.read_object(place, "make the stage again") or {}
    files.write_json(place, {**config, "chat_template": template})


def _end_at_turns(out: str, end_id: int) -> None:
    """Adds the token that ends a turn to those at which programs stop: a base model's folder names only its own."""
    place, again = files.join(out, "generation_config.json"), "make the stage again"
    generation = files.read_object(place, again) or {}
    given = generation.get("eos_token_id")
    if given is None:
        given = (files.read_object(files.join(out, "config.json"), again) or {}).get("eos_token_id")
    ends = given if isinstance(given, list) else [] if given is None else [given]
    if end_id not in ends:
        files.write_json(place, {**generation, "eos_token_id": [end_id, *ends]})


def _renderer(run: Run, role: str, model: str) -> Renderer:
    """Renders as the run does, from a model's folder without its weights."""
    with tempfile.TemporaryDirectory() as folder:
        for path in files.list_files(model):
            if not path.endswith(".safetensors"):
                name = Path(path).name
                files.copy(files.join(model, name), Path(folder) / name)
        return run_renderer(run, role, folder)
