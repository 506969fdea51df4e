"""The table of model families as docs/models.md shows it."""

from __future__ import annotations

import json

from cai_ray.train.families.table import UNTESTED, Family, StepResult, families

_INTRODUCTION = """# Models

Any causal language model of Hugging Face can be tried. This table says which families are known to
work, step by step. Each row is a random model of that architecture with two layers, which
`make test-families` takes through the steps with the pinned versions of transformers and vLLM, on
CPUs:

- *engine*: vLLM generates with it.
- *SFT*, *reward model*, *DPO*: one update, then save, and load again in transformers.
- *PPO*: an engine and a trainer in two processes, two sends of the weights that are proved, and an
  update of the policy and the value model between them.

*all* means that all weights are trained, *LoRA* that an adapter is. A number refers to the reasons
below the table.

`--check` reads the table. What is refused is one line that says why and what to change. A family
that is not in it is a warning. Then `cai-ray run my.yaml --check --probe` makes a small random copy
of your model, takes it through the same steps in a minute or two, and says what fails.

On GPUs, engines that are refused here are a warning, since only CPUs were tried. Models whose
weights are quantised can generate and judge, and cannot be trained.
"""
_COLUMNS = {"engine": "engine", "sft": "SFT", "rm": "reward model", "dpo": "DPO", "ppo": "PPO"}
_FOOT = "This page is written by `cai-ray config models > docs/models.md`."


def markdown() -> str:
    """The text of docs/models.md."""
    reasons: list[str] = []
    lines = [
        f"| architecture | models | {' | '.join(_COLUMNS.values())} |",
        "| --- | --- |" + " --- |" * len(_COLUMNS),
    ]
    for name, family in families().items():
        cells = [_cell(family, step, reasons) for step in _COLUMNS]
        lines.append(f"| `{name}` | {family.models} | {' | '.join(cells)} |")
    numbered = [f"| {number} | {reason} |" for number, reason in enumerate(reasons, 1)]
    parts = [_INTRODUCTION, "## The table", "", *lines, ""]
    if numbered:
        parts += ["## Reasons", "", "| | |", "| --- | --- |", *numbered, ""]
    return "\n".join([*parts, _FOOT, ""])


def _cell(family: Family, step: str, reasons: list[str]) -> str:
    kinds = {"": ""} if step == "engine" else {"": "all", "_lora": "LoRA"}
    said = {}
    for suffix, kind in kinds.items():
        found = family.results.get(step + suffix, UNTESTED)
        note = ""
        if found.why:
            reason = _reason(found)
            if reason not in reasons:
                reasons.append(reason)
            note = f" ({reasons.index(reason) + 1})"
        word = {"works": "yes" if not found.needs else "with settings", "refused": "no"}.get(
            found.status, "untested"
        )
        said[kind] = f"{word}{note}"
    if len(set(said.values())) == 1:
        return next(iter(said.values()))
    return ", ".join(f"{kind}: {text}" for kind, text in said.items())


def _reason(found: StepResult) -> str:
    text = " ".join(found.why.split()).replace("|", "\\|").replace("<", "&lt;")
    if not found.needs:
        return text
    settings = ", ".join(
        f"`engine.{key}: {value if isinstance(value, str) else json.dumps(value)}`"
        for key, value in found.needs.items()
    )
    return f"It works with {settings}. Otherwise: {text}"
