"""What `cai-ray init` does: looks at a model, data and machine, and writes the data's parts and a configuration."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from cai_ray import constitution
from cai_ray.begin.data import Ask, Data, Kind, read_data, split, write
from cai_ray.begin.lengths import Lengths, choose_lengths, prompt_lengths
from cai_ray.begin.machine import GIB, Machine, this_machine
from cai_ray.begin.model import TEMPLATES, ModelFacts, look_at
from cai_ray.begin.plan import SAVINGS, Setting, choose_amounts, plan
from cai_ray.begin.write import nested, to_yaml
from cai_ray.config.load import validate
from cai_ray.config.run import RunConfig
from cai_ray.errors import InputError
from cai_ray.storage import files
from cai_ray.storage.records import Prompt

CONSTITUTION = "harmless"
_MEMORY_SHARE = 0.8
"""Share of the machine's memory that a run without GPUs may take."""
_LONG_HOURS = 4

Say = Callable[[str], None]


class Written(NamedTuple):
    """The files that were written."""

    config: Path
    data: Path
    """The folder of train.jsonl, development.jsonl and held_out.jsonl."""


def begin(
    model_name: str,
    sources: Sequence[tuple[str, Kind | None]],
    out: str,
    *,
    overwrite: bool = False,
    ask: Ask | None = None,
    say: Say = lambda text: None,
) -> Written:
    """Writes a configuration for a first run, and its data beside it.

    Args:
        sources: data, each with its kind if the user has said it.
        out: the configuration's file. The data go to a folder of the same name that ends in `-data`.
        ask: asks the user; None where nobody can be asked.

    Raises:
        InputError: model or data cannot be used, or the files exist and `overwrite` is not given.
    """
    written = _places(out, overwrite)
    machine = this_machine()
    model, steps = look_at(model_name, constitution.load(CONSTITUTION))
    say(
        f"model: {model.shape.params / 1e9:.3g} B parameters, context {model.shape.context}"
        + _template_note(model)
    )
    say(f"machine: {machine}")
    data = read_data(sources, ask)
    needed = prompt_lengths(model, data.prompts)
    lengths = choose_lengths(model, steps, needed, data.answers, machine)
    kept = [
        prompt
        for prompt in data.prompts
        if prompt["id"] in needed and steps.needed(needed[prompt["id"]], lengths.answer) <= lengths.context
    ]
    parts = split(kept)
    for line in _data_lines(data, len(needed), kept, parts):
        say(line)
    _check_parts(parts)
    settings = _choose(model, lengths, machine, parts, written)
    hours = choose_amounts(model.shape.params, lengths, machine, len(parts["train"])).seconds / 3600
    if hours > _LONG_HOURS:
        say(
            f"note: even this first run takes some {hours:.0f} hours here; a smaller model or a GPU would help"
        )
    write(written.data, parts)
    head = (
        f"Written by `cai-ray init` for {model_name} on {machine}.",
        "Check it with `cai-ray run CONFIG --check`, and run it with `cai-ray run CONFIG`.",
        "The first run is small: see that all is well, then raise what its comment says.",
    )
    files.write_bytes(written.config, to_yaml(head, settings).encode())
    return written


def _places(out: str, overwrite: bool) -> Written:
    """The files to write; raises InputError if they exist."""
    config = Path(out).expanduser()
    if config.suffix not in (".yaml", ".yml"):
        raise InputError(f"--out {out}: name a file that ends in .yaml")
    written = Written(config, config.with_name(f"{config.stem}-data"))
    for path in (written.config, written.data):
        if path.exists() and not overwrite:
            raise InputError(f"{path}: exists; choose another --out, or replace it with --overwrite")
    return written


def _choose(
    model: ModelFacts, lengths: Lengths, machine: Machine, parts: dict[str, list[Prompt]], written: Written
) -> list[Setting]:
    """All settings: the first of SAVINGS with which every stage fits into the memory."""
    from cai_ray.estimate.fit import memory_lines

    counts = {part: len(rows) for part, rows in parts.items()}
    for saving in SAVINGS:
        settings = _all_settings(model, plan(model, lengths, machine, counts, saving), counts, written)
        config = validate(nested(settings), str(written.config))
        if _fits(config, machine):
            return settings
    memory_lines(config)  # raises what does not fit, where it is sure
    return settings


def _fits(config: RunConfig, machine: Machine) -> bool:
    from functools import partial

    from cai_ray.estimate.fit import misfits
    from cai_ray.estimate.memory import memory_needs
    from cai_ray.estimate.shape import shape_of

    needs = memory_needs(config, partial(shape_of, config), bool(machine.gpus))
    if machine.gpus:
        return not misfits(needs, machine.gpus, machine.gpu_gib)
    room = _MEMORY_SHARE * machine.memory_gib * GIB
    return all(
        sum(need.processes * need.total for need in needs if need.stage == stage) <= room
        for stage in {need.stage for need in needs}
    )


def _all_settings(
    model: ModelFacts, planned: list[Setting], counts: dict[str, int], written: Written
) -> list[Setting]:
    name = re.sub(r"^[^A-Za-z0-9]+|[^A-Za-z0-9_.-]", "", written.config.stem) or "mine"

    def source(part: str) -> list[dict[str, str]]:
        return [{"path": str(written.data / f"{part}.jsonl")}]

    settings = [
        Setting("name", name, "the run's directory is runs/NAME"),
        Setting("model", model.name, "the model to train"),
        Setting("constitution", CONSTITUTION, "ships with cai_ray; or the path of your own"),
        Setting("prompts", source("train"), f"{counts['train']} prompts; each row has its kind"),
        *planned,
        Setting(
            "evaluate.prompts", source("held_out"), f"{counts['held_out']} prompts that are not trained on"
        ),
    ]
    if model.templates_name != TEMPLATES:
        why = "the tokenizer has no chat template; this set brings one"
        settings.insert(3, Setting("templates", model.templates_name, why))
    if any(setting.key == "ppo.watch.every" for setting in planned):
        why = f"{counts['development']} prompts for watching alone"
        settings.append(Setting("ppo.watch.prompts", source("development"), why))
    return settings


def _template_note(model: ModelFacts) -> str:
    if model.has_template:
        return ", a chat template of its own"
    return f", no chat template: template set {model.templates_name} brings one"


def _data_lines(data: Data, readable: int, kept: list[Prompt], parts: dict[str, list[Prompt]]) -> list[str]:
    """What was read, what was left out and why, and the parts."""
    counts = {
        "repeat another": data.left_out["same"],
        "nearly repeat another": data.left_out["near"],
        "cannot be read with the chat template": len(data.prompts) - readable,
        "are longer than the context allows": readable - len(kept),
    }
    left_out = "; ".join(f"{count} {why}" for why, count in counts.items() if count)
    kinds = {kind: sum(prompt["kind"] == kind for prompt in kept) for kind in ("red_team", "helpful")}
    line = f"prompts: {kinds['red_team']} red-team, {kinds['helpful']} helpful"
    lines = [f"{line} (left out: {left_out})" if left_out else line]
    if not kinds["helpful"]:
        lines.append(
            "note: without helpful prompts the policy may become less helpful; give some with --helpful"
        )
    named = {part.replace("_", " "): len(rows) for part, rows in parts.items()}
    return [*lines, "split: " + ", ".join(f"{count} {part}" for part, count in named.items())]


def _check_parts(parts: dict[str, list[Prompt]]) -> None:
    """Raises InputError if a part that a run needs is empty."""
    if not any(prompt["kind"] == "red_team" for prompt in parts["train"]) or not parts["held_out"]:
        raise InputError(
            "too few prompts are left to train and to evaluate on; give more with --red-team, or shorter ones"
        )
