"""Runs for the training tests: a tiny model with its own tokenizer, and the rows that stages before would write."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from cai_ray.config.run import RunConfig
from cai_ray.config.training import SftConfig
from cai_ray.storage import files
from cai_ray.storage.arrow import to_table
from cai_ray.storage.records import Label, Revision
from cai_ray.storage.run import Run
from cai_ray.train.dialogues import Dialogues, pack, render
from tests import tiny

TEXT = "please tell me how to read the diary of my friend and why it is kind to ask her first"
WORDS = TEXT.split()


def text(number: int, words: int) -> str:
    """Words that depend on the number."""
    return " ".join(WORDS[(number * 7 + i * (1 + number % 3)) % len(WORDS)] for i in range(words))


def make_run(folder: Path, family: tiny.Family = "llama", **sections: Any) -> Run:
    model = tiny.save_model(folder / "model", family)
    config = {"name": "test", "out": str(folder / "run"), "model": str(model), "constitution": "harmless"}
    for name in ("engine", "sft", "rm", "dpo", "ppo"):  # tests share few cores
        sections[name] = {"threads": 1, **sections.get(name, {})}
    return Run(RunConfig.model_validate(config | {"prompts": [{"path": "none.jsonl"}]} | sections))


def revisions(count: int = 24) -> list[dict[str, Any]]:
    """Two of three are revised in two rounds, one of three is a helpfulness sample; lengths differ."""
    rows = []
    for i in range(count):
        helpful = i % 3 == 2
        steps = [
            {"round": n + 1, "principle_id": "p", "revision": text(i + 50 + n, 3 + (i + n) % 9)}
            for n in range(2)
        ]
        rows.append(
            {
                "id": f"r{i:03}",
                "prompt_id": f"p{i:03}",
                "messages": [{"role": "user", "content": text(i, 2 + i % 5)}],
                "kind": "helpful" if helpful else "red_team",
                "response": text(i + 100, 4 + i % 7),
                "truncated": False,
                "steps": [] if helpful else steps,
                "revision": None if helpful else steps[-1]["revision"],
                "error": None,
            }
        )
    return rows


def labels(count: int = 24) -> list[dict[str, Any]]:
    """Comparisons whose preferred answer says "kind"."""
    rows = []
    for i in range(count):
        good, bad = "kind " * (1 + i % 4) + text(i, 3), text(i + 30, 2 + i % 6).replace("kind", "")
        first = i % 2 == 0
        rows.append(
            {
                "id": f"c{i:03}",
                "prompt_id": f"p{i:03}",
                "messages": [{"role": "user", "content": text(i, 2 + i % 5)}],
                "response_a": good if first else bad,
                "response_b": bad if first else good,
                "source": "ai",
                "p_a": 0.9 if first else 0.1,
                "error": None,
            }
        )
    return rows


def sft_records(
    rows: list[dict[str, Any]], cfg: SftConfig, seed: int = 0, critiques: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """The records that `sft` trains on, in the order of their ids."""
    from cai_ray.train.sft_records import choose_records, to_records

    chosen = choose_records(rows, cfg, seed, critiques).ids
    return sorted(to_records(rows, cfg, chosen), key=lambda record: record["id"])


def write(run: Run, stage: Literal["revise", "label"], rows: list[dict[str, Any]]) -> None:
    run.write_rows(stage, to_table(rows, {"revise": Revision, "label": Label}[stage]))
    files.write_json(run.path(stage, "manifest.json"), {"id": f"made-by-the-test-{len(rows)}"})


def dialogues(run: Run, rows: list[dict[str, Any]], *keys: str) -> Dialogues:
    """The rows' answers as training reads them."""
    from cai_ray.prompts.load import load_templates
    from cai_ray.prompts.renderer import Renderer

    renderer, templates = Renderer(run.config.model), load_templates(run.config.templates)
    examples = [render(renderer, templates, r["messages"], r[k], 4096) for r in rows for k in keys]
    return pack(e for e in examples if e is not None)


def weights(folder: str) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(Path(folder) / "model.safetensors")


def die_once(marker: str) -> None:
    """Ends this process as a power cut would, the first time that it is called for the marker."""
    if not os.path.exists(marker):
        Path(marker).touch()
        os._exit(1)
