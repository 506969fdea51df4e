"""The data of a first run: prompts of the user's files, and their split into training, development and held out.

Nearly equal prompts are left out before the split, and conversations that begin alike stay on one side of it, so that
nothing is evaluated that is nearly trained on.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from cai_ray.config.sources import PromptSource
from cai_ray.data.conversations import to_messages
from cai_ray.data.left_out import LeftOut, OddRow
from cai_ray.data.overlap import normalised
from cai_ray.data.sources import iter_source_rows, read_prompts
from cai_ray.errors import InputError
from cai_ray.storage import files, hub
from cai_ray.storage.records import Prompt, derive_id

Kind = Literal["red_team", "helpful"]
Ask = Callable[[str], str]
"""Asks the user a question, and returns the answer."""

NEAR = 0.8
"""Prompts that share more of their character 5-grams than this count as one."""
MIN_RED_TEAM = 8
"""Red-team prompts that a run needs at least: some to train on, some to watch, some to evaluate on."""
_SHARES = {"held_out": (0.1, 256), "development": (0.05, 128)}
"""Share of the prompts of a kind, and most of them."""
_LOOKED_AT = 500


class Data(NamedTuple):
    """Prompts, and what was seen on the way."""

    prompts: list[Prompt]
    answers: list[str]
    """Some answers in the data, whose length says how long answers should be."""
    left_out: LeftOut
    """Rows that repeat (`same`) or nearly repeat (`near`) an earlier one, and odd ones."""


def read_data(given: Iterable[tuple[str, Kind | None]], ask: Ask | None) -> Data:
    """Reads the user's data.

    Args:
        given: files, folders, patterns and datasets of the hub, each with its kind if the user has said it.
        ask: asks for a kind that neither the rows nor the name tell; None where nobody can be asked.

    Raises:
        InputError: data is missing or cannot be read, its kind is not known, or it is too little.
    """
    sources = []
    for text, kind in given:
        path = locate(text)
        sources.append(PromptSource(path=path, kind=kind or _kind(path, text, ask), near_duplicates=NEAR))
    left_out = LeftOut()
    prompts = read_prompts(sources, 0, left_out)
    count = sum(prompt["kind"] == "red_team" for prompt in prompts)
    if count < MIN_RED_TEAM:
        raise InputError(
            f"{count} red-team prompts that differ are too few to train on, to watch and to evaluate on; give "
            f"{MIN_RED_TEAM} or more with --red-team (some hundred are a beginning)"
        )
    return Data(prompts, [a for source in sources for a in _answers(source.path)], left_out)


def locate(text: str) -> str:
    """The path or URI of data. `org/name` that is no folder here is a dataset of the hub, at its current commit.

    Raises:
        InputError: there is no such data.
    """
    if "://" in text or text.startswith("town:") or "*" in text or files.exists(text):
        if not text.startswith(hub.DATASETS):
            return text
    else:
        text = hub.DATASETS + text
    try:
        repo = hub.pin(hub.parse_dataset(text))
    except InputError as e:
        raise InputError(f"{text.removeprefix(hub.DATASETS)}: no such file or folder here; {e}") from e
    rows = [name for name in hub.files_of(repo) if name.endswith(hub.ROWS)]
    folders = sorted({name.rpartition("/")[0] for name in rows})
    if not repo.inside and len(folders) == 1:
        repo = repo._replace(inside=folders[0])
    return str(repo)


def split(prompts: Sequence[Prompt]) -> dict[str, list[Prompt]]:
    """The prompts by part: `train`, `development`, `held_out`, each in the order of their hashes.

    Rows whose data says a split keep it. Otherwise each kind is split by hashes of how its conversations begin.
    """
    parts: dict[str, list[Prompt]] = {"train": [], "development": [], "held_out": []}
    given = {"dev": "development", "held": "held_out"}
    keeps = any(prompt["split"] in given for prompt in prompts)
    groups: dict[tuple[str, str], list[Prompt]] = defaultdict(list)
    kinds: dict[str, str] = {}
    for prompt in prompts:
        if keeps:
            parts[given.get(prompt["split"], "train")].append(prompt)
        else:
            first = next(m for m in prompt["messages"] if m["role"] == "user")
            begins = derive_id(normalised([first]))
            groups[kinds.setdefault(begins, prompt["kind"]), begins].append(prompt)
    for kind in sorted({kind for kind, _ in groups}):
        of_kind = [rows for (k, _), rows in sorted(groups.items()) if k == kind]
        total, place = sum(map(len, of_kind)), 0
        for part, (share, most) in _SHARES.items():
            wanted, taken = min(max(round(share * total), min(2, total // 4)), most), 0
            while taken < wanted:
                parts[part] += of_kind[place]
                taken, place = taken + len(of_kind[place]), place + 1
        parts["train"] += [prompt for rows in of_kind[place:] for prompt in rows]
    # Kinds are mixed, so that the first rows of a file are a sample of it.
    return {part: sorted(rows, key=lambda prompt: prompt["id"]) for part, rows in parts.items()}


def write(folder: Path, parts: dict[str, list[Prompt]]) -> None:
    """Writes each part as JSON lines of the same name."""
    for part, rows in parts.items():
        text = "".join(
            json.dumps(
                {"messages": row["messages"], "kind": row["kind"], "source": row["source"]},
                ensure_ascii=False,
            )
            + "\n"
            for row in rows
        )
        files.write_bytes(folder / f"{part}.jsonl", text.encode())


def _kind(path: str, text: str, ask: Ask | None) -> Kind | None:
    """The kind of a source's prompts: by its rows (None), by its name, or as the user says.

    Raises:
        InputError: nobody tells.
    """
    if next(_readable(path), {}).get("kind") is not None:
        return None
    name = text.lower()
    if any(word in name for word in ("harmless", "red_team", "red-team", "redteam")):
        return "red_team"
    if any(word in name for word in ("helpful", "benign")):
        return "helpful"
    if ask is None:
        raise InputError(
            f"--data {text}: its rows have no `kind`, and its name does not tell it; give it as --red-team or --helpful"
        )
    answer = ""
    while answer not in ("red_team", "helpful"):
        answer = ask(f"{text}: are its prompts red_team or helpful?").strip().replace("-", "_")
    return cast(Kind, answer)


def _answers(path: str) -> list[str]:
    """The assistant's last turns in the first rows of a source."""
    answers: list[str] = []
    for row in islice(_readable(path), _LOOKED_AT):
        value = row.get("chosen") or row.get("messages") or row.get("text")
        with suppress(OddRow):
            last = to_messages(value)[-1]
            if last["role"] == "assistant":
                answers.append(last["content"])
            elif isinstance(row.get("chosen"), str) and row.get("prompt"):
                answers.append(row["chosen"])
    return [answer for answer in answers if answer.strip()]


def _readable(path: str) -> Iterator[Mapping[str, Any]]:
    """The rows of a source without those that cannot be read, which are counted elsewhere."""
    return (row.values for row in iter_source_rows(path) if not isinstance(row.values, OddRow))
