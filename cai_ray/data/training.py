"""What a run is trained on: its prompts and human comparisons, without those that are held out if it says so."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from cai_ray.config.run import RunConfig
from cai_ray.config.section import Section
from cai_ray.config.sources import Comparisons, PromptSource
from cai_ray.data import set_formats
from cai_ray.data.left_out import LeftOut
from cai_ray.data.overlap import text_key, text_keys
from cai_ray.data.sources import HumanComparison, read_comparisons, read_prompts
from cai_ray.errors import InputError
from cai_ray.storage.records import Prompt

Row = TypeVar("Row", bound=Mapping[str, Any])


def training_prompts(
    config: RunConfig, sources: Iterable[PromptSource] = (), left_out: LeftOut | None = None
) -> list[Prompt]:
    """The prompts of split `train`; with `evaluate.overlap: drop`, without those that are held out as well.

    Args:
        sources: those of one stage. Defaults to the run's prompts.
        left_out: counts what is left out, as `read_prompts` does, and `held_out`.

    Raises:
        InputError: a file is at fault (`read_prompts`), or all rows are held out.
    """
    left_out = LeftOut(config.max_error_rate) if left_out is None else left_out
    rows = read_prompts(list(sources) or config.prompts, config.seed, left_out)
    return without_held_out(config, [row for row in rows if row["split"] == "train"], left_out)


def training_comparisons(
    config: RunConfig, source: Comparisons, left_out: LeftOut | None = None
) -> list[HumanComparison]:
    """The human comparisons of a source. Args and errors as of `training_prompts`."""
    left_out = LeftOut(config.max_error_rate) if left_out is None else left_out
    return without_held_out(config, read_comparisons(source, config.seed, left_out), left_out)


def without_held_out(config: RunConfig, rows: list[Row], left_out: LeftOut) -> list[Row]:
    """The rows, with `evaluate.overlap: drop` without those whose `messages` are held out.

    Raises:
        InputError: all of them are.
    """
    if config.evaluate.overlap == "stop" or not rows:
        return rows
    held_out = held_out_keys(config)
    kept = [row for row in rows if text_key(row) not in held_out]
    if not kept:
        raise InputError(
            f"evaluate.overlap=drop leaves out all {len(rows)} rows of a source, since all are held out; give others"
        )
    if len(kept) < len(rows):
        left_out["held_out"] += len(rows) - len(kept)
    return kept


def held_out_keys(config: RunConfig) -> set[bytes]:
    """Keys (`overlap.text_key`) of everything that the run is evaluated or watched on.

    Raises:
        InputError: a file is at fault.
    """
    evaluate, watch = config.evaluate, config.ppo.watch
    prompts = [*evaluate.prompts, *(watch.prompts if config.watched else ())]
    keys = text_keys(read_prompts(prompts, config.seed, LeftOut(config.max_error_rate)))
    for eval_set in evaluate.sets:
        keys |= text_keys(set_formats.read(eval_set, config.seed, LeftOut(config.max_error_rate)))
    return keys


def held_out_sources(config: RunConfig) -> list[Section]:
    """The sections of the configuration that decide what `evaluate.overlap` leaves out of training; none for `stop`."""
    if config.evaluate.overlap == "stop":
        return []
    watched = config.ppo.watch.prompts if config.watched else ()
    return [*config.evaluate.prompts, *config.evaluate.sets, *watched]
