"""What generation costs beside the engine: rows a second, memory, and the time to go on after a kill.

    python benchmarks/overhead.py [--rows N] [--actors N]

No model is run: a scripted engine answers at once. Prompts are rendered and tokenised as for vLLM, by the chains of
`revise` (four rounds: nine calls a row) and `label` (sixteen principles, both orders: 32 calls a row). `passthrough` is
a chain that does nothing. Each measurement is a process of its own, a Ray cluster included, and its memory is that
of all its processes (watch.py). Seconds are those of `map_rows`, which start actors, write and publish.

The last line is JSON. `growth` is the peak memory of ten times the rows over that of the rows; `resume_seconds` is what
a pass over rows of which half were finished takes, beside `whole_seconds` without any.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.watch import measure
from cai_ray import constitution as constitutions
from cai_ray.cluster.connect import connect
from cai_ray.config.run import RunConfig
from cai_ray.engine.scripted import ScriptedEngine
from cai_ray.generate.chain import Chain
from cai_ray.generate.journal import Journal
from cai_ray.generate.label import LabelChain, LabelTask
from cai_ray.generate.revise import ReviseChain, RevisionTask
from cai_ray.generate.rows import map_rows
from cai_ray.prompts.load import load_templates
from cai_ray.prompts.messages import Messages
from cai_ray.prompts.renderer import Renderer
from cai_ray.provenance.versions import versions
from cai_ray.storage.records import Label, Revision
from cai_ray.storage.run import Run

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "nobody",
    "looks",
    "at",
    "it",
]
# An engine that answers at once is never full, so that what bounds it is how many rows may wait to be written.
IN_FLIGHT = 1024
USAGE = {"prompt": 0, "cached": 0, "generated": 0}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000, help="pass-through rows (default 1000000)")
    parser.add_argument("--actors", type=int, default=len(os.sched_getaffinity(0)), help="default: the cores")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        with tempfile.TemporaryDirectory(prefix="cai-ray-overhead-") as folder:
            took = PARTS[args.part](folder, args.rows, args.actors)
        print(json.dumps({"seconds": took}))
        return 0

    load = os.getloadavg()[0]
    n, few = args.rows, max(1, args.rows // 10)
    revise, label = few, max(1, args.rows // 50)
    found = {
        "revise": _measured("revise", revise, args.actors),
        "label": _measured("label", label, args.actors),
        "few": _measured("passthrough", few, args.actors),
        "many": _measured("passthrough", n, args.actors),
        "resume": _measured("resume", few, args.actors),
    }
    seconds = {name: s for name, (s, _) in found.items()}
    peaks = {name: p for name, (_, p) in found.items()}
    print(
        json.dumps(
            {
                "benchmark": "overhead",
                "revise_calls_per_s": round(9 * revise / seconds["revise"]),
                "label_calls_per_s": round(32 * label / seconds["label"]),
                "passthrough_rows_per_s": round(n / seconds["many"]),
                "peak_gib": max(peaks.values()),
                "growth": round(peaks["many"] / peaks["few"], 3),
                "resume_seconds": seconds["resume"],
                "whole_seconds": seconds["few"],
                "rows": {"revise": revise, "label": label, "passthrough": n, "resume": few},
                "seconds": seconds,
                "peaks_gib": peaks,
                "actors": args.actors,
                "max_num_seqs": IN_FLIGHT,
                "cores": len(os.sched_getaffinity(0)),
                "load_before": round(load, 2),
                "versions": versions(),
            }
        )
    )
    return 0


def _measured(part: str, rows: int, actors: int) -> tuple[float, float]:
    """Seconds and peak GiB of one measurement in a process of its own."""
    with tempfile.TemporaryFile("w+") as stdout:
        command = [sys.executable, __file__, "--part", part, "--rows", str(rows), "--actors", str(actors)]
        code, watch = measure(command, stdout.fileno())
        stdout.seek(0)
        lines = stdout.read().splitlines()
    if code:
        raise SystemExit(f"{part}: exit code {code}")
    seconds = json.loads(lines[-1])["seconds"]
    print(f"{part}: {rows} rows in {seconds:.1f} s", file=sys.stderr, flush=True)
    return round(seconds, 2), round(watch.peak[0] / 2**30, 3)


class RenderingEngine(ScriptedEngine):
    """Renders and tokenises what it is asked, as the engine of real runs does, and answers a fixed text."""

    def __init__(self, renderer: Renderer):
        super().__init__(lambda messages, sampling: "I am sorry, but I would rather not do that.")
        self.renderer = renderer

    async def chat(self, messages: Messages, sampling: Any) -> Any:
        self.renderer.prompt_ids(messages)
        return await super().chat(messages, sampling)

    async def choose(self, messages: Messages, options: Any) -> Any:
        self.renderer.prompt_ids(messages)
        return await super().choose(messages, options)


@dataclass(frozen=True)
class Rendered:
    """A chain whose calls are rendered for the embedded world's model and its tokenizer."""

    chain: Chain[Any, Any]
    run: Run

    async def __call__(self, engine: Any, row: dict[str, Any]) -> dict[str, Any]:
        return await self.chain(_rendering(self.run.model("base"), self.run.config.templates), row)


_ENGINES: dict[tuple[str, str], RenderingEngine] = {}


def _rendering(model: str, templates: str) -> RenderingEngine:
    """One per process. (A cached property has a lock, and what is defined in a script is pickled by value.)"""
    if (model, templates) not in _ENGINES:
        renderer = Renderer(model, load_templates(templates).chat_template)
        _ENGINES[model, templates] = RenderingEngine(renderer)
    return _ENGINES[model, templates]


async def passthrough(engine: Any, row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "response": "fine", "truncated": False, "steps": [], "model": "none", "usage": USAGE}


def _revise(out: str, rows: int, actors: int) -> float:
    run = _run(out, actors)
    config = run.config.revise.model_copy(update={"rounds": 4})
    document = constitutions.load("harmless")
    chain = ReviseChain(document, load_templates(run.config.templates), config, 0, "none")
    return _seconds(run, "revise", _prompts(rows), Rendered(chain, run), RevisionTask, Revision)


def _label(out: str, rows: int, actors: int) -> float:
    run = _run(out, actors)
    config = run.config.label.judge.model_copy(update={"principles": "all"})
    chain = LabelChain(constitutions.load("harmless"), load_templates(run.config.templates), config, 0)
    pairs = (
        {**row, "response_a": _text(n, 20), "response_b": _text(n + 1, 20)} for n, row in _numbered(rows)
    )
    return _seconds(run, "label", pairs, Rendered(chain, run), LabelTask, Label)


def _passthrough(out: str, rows: int, actors: int) -> float:
    return _seconds(_run(out, actors), "revise", _prompts(rows), passthrough, RevisionTask, Revision)


def _resume(out: str, rows: int, actors: int) -> float:
    run = _run(out, actors)
    journal = Journal(run, "revise", RevisionTask, Revision, "part")
    done = {"response": "fine", "truncated": False, "steps": [], "model": "none", "usage": USAGE}
    block = [{**row, **done} for n, row in _numbered(rows) if n % 2]
    for start in range(0, len(block), 64):
        journal.write(block[start : start + 64])
    return _seconds(run, "revise", _prompts(rows), passthrough, RevisionTask, Revision)


PARTS = {"revise": _revise, "label": _label, "passthrough": _passthrough, "resume": _resume}


def _run(out: str, actors: int) -> Run:
    engine = {"kind": "scripted", "min_actors": actors, "max_actors": actors, "max_num_seqs": IN_FLIGHT}
    given = {
        "name": "overhead",
        "model": "town",
        "constitution": "harmless",
        "prompts": [{"path": "town:train"}],
    }
    run = Run(RunConfig.model_validate(given | {"out": out, "engine": engine}))
    connect(run.config)
    return run


def _seconds(
    run: Run, stage: str, rows: Iterator[Any], chain: Chain[Any, Any], takes: type, gives: type
) -> float:
    started = time.monotonic()
    made = map_rows(run, stage, rows, chain, takes=takes, gives=gives, model="base")
    seconds = time.monotonic() - started
    assert made["errors"] == 0, made
    return seconds


def _prompts(rows: int) -> Iterator[dict[str, Any]]:
    return (row for _, row in _numbered(rows))


def _numbered(rows: int) -> Iterator[tuple[int, dict[str, Any]]]:
    for n in range(rows):
        message = {"role": "user", "content": _text(n, 12)}
        yield n, {"id": f"{n:012x}", "prompt_id": f"{n:012x}", "messages": [message], "kind": "red_team"}


def _text(seed: int, words: int) -> str:
    return " ".join(WORDS[(seed * 7 + i * (1 + seed % 5)) % len(WORDS)] for i in range(words))


if __name__ == "__main__":
    sys.exit(main())
