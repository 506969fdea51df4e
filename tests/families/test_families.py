"""The table of model families is what is found: `make test-families`, and with `WRITE=1` it is written anew.

Each family is tried in processes of its own, so that a crash or a hang is a finding and not the end.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cai_ray.config.engine import EngineConfig
from cai_ray.train.checks.families import number_in
from cai_ray.train.families.examine import Case, engine_of_a_copy, examine
from cai_ray.train.families.table import PLACE, STEPS, Family, StepResult, from_json, to_json
from tests.families import members

ENGINE_STEPS = ("engine", "ppo", "ppo_lora")


@pytest.mark.parametrize("name", members.MEMBERS, ids=lambda name: name.replace(" ", "-"))
def test_the_table_says_what_works(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    found = to_json(find(name, members.save(name, tmp_path)))
    print(json.dumps(found, indent=1))
    if request.config.getoption("--write-table"):
        write(name, found)
    row = json.loads(PLACE.read_text(encoding="utf-8")).get(name)
    assert row, f"{name} is not in the table; write it anew: make test-families WRITE=1"
    assert outcomes(row) == outcomes(found), (
        "what works has changed; write the table anew: make test-families WRITE=1"
    )


def find(name: str, folder: str) -> Family:
    """Takes a family through all steps; those of the engine, if they fail, with the other settings that it has."""
    member = members.MEMBERS[name]
    reasons = examine(case(folder, {}), STEPS, report)
    results = {
        step: StepResult("works") if why is None else refused(why, folder) for step, why in reasons.items()
    }
    for settings in member.otherwise:
        failed = [step for step in ENGINE_STEPS if results[step].status == "refused"]
        if not failed:
            break
        again = examine(
            case(folder, settings), [step for step in ENGINE_STEPS if step in {"engine", *failed}], report
        )
        for step in failed:
            why = again[step]
            first = results[step].why
            results[step] = StepResult("works", first, settings) if why is None else refused(why, folder)
    return Family(member.models, results)


def case(folder: str, settings: Mapping[str, Any]) -> Case:
    """A folder with settings of `engine`. A length may be the name of a field of config.json."""
    given = dict(settings)
    if isinstance(field := given.get("max_model_len"), str):
        given["max_model_len"] = number_in(json.loads((Path(folder) / "config.json").read_text()), field)
    dtype: Any = given.pop("dtype", "float32")
    return Case(folder, engine_of_a_copy(EngineConfig(**given)), dtype)


def report(step: str, why: str | None) -> None:
    print(f"{step}: {why or 'works'}", flush=True)


def refused(why: str, folder: str) -> StepResult:
    return StepResult("refused", why.replace(folder, "FOLDER"))


def outcomes(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row says without its reasons, which hold numbers that differ between machines."""
    results = from_json(row).results
    return {step: (results[step].status, dict(results[step].needs)) for step in STEPS}


def write(name: str, row: Mapping[str, Any]) -> None:
    """Puts a row into the table that ships; several processes may do so at once."""
    with PLACE.open("r+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        table = json.load(file) | {name: row}
        ordered = {known: table[known] for known in members.MEMBERS if known in table}
        file.seek(0)
        file.truncate()
        file.write(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n")
