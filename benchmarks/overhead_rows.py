"""Made-up rows of realistic size, and what overhead.py does with them."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from cai_ray import constitution as constitutions
from cai_ray.cluster.connect import connect
from cai_ray.config.run import RunConfig
from cai_ray.config.training import SftConfig
from cai_ray.engine.scripted import ScriptedEngine
from cai_ray.generate.chain import Chain
from cai_ray.generate.journal import Journal, JournalWriter
from cai_ray.generate.label import LabelChain, LabelTask
from cai_ray.generate.revise import ReviseChain, RevisionTask
from cai_ray.generate.rows import map_rows
from cai_ray.judging import certificate as certificates
from cai_ray.prompts.load import load_templates
from cai_ray.prompts.messages import Messages
from cai_ray.prompts.renderer import Renderer
from cai_ray.storage.arrow import to_tables
from cai_ray.storage.records import Label, Revision, derive_id
from cai_ray.storage.run import Run
from cai_ray.storage.tables import iter_tables, write_tables
from cai_ray.town import BASE, grammar

TEXT_BYTES = 2200
"""Of an answer: a million of them are a column of more than two gigabytes."""
IN_FLIGHT = 1024
"""An engine that answers at once is never full, so that what bounds it is how many rows may wait to be written."""
BLOCK = 40
"""Rows that an actor with 160 rows in flight writes at a time."""
VOTES = 16
USAGE = {"prompt": 900, "cached": 400, "generated": 400, "calls": 9}
_PART_ROWS = 8192


def revise(out: str, rows: int, actors: int) -> float:
    run = _run(out, actors)
    config = run.config.revise.model_copy(update={"rounds": 4})
    document = constitutions.load("harmless")
    chain = ReviseChain(document, load_templates(run.config.templates), config, 0, "none")
    return _seconds(run, "revise", _prompts(rows), Rendered(chain, run), RevisionTask, Revision)


def label(out: str, rows: int, actors: int) -> float:
    run = _run(out, actors)
    config = run.config.label.judge.model_copy(update={"principles": "all"})
    chain = LabelChain(constitutions.load("harmless"), load_templates(run.config.templates), config, 0)
    pairs = (
        {**row, "response_a": text(2 * n), "response_b": text(2 * n + 1)}
        for n, row in enumerate(_prompts(rows))
    )
    return _seconds(run, "label", pairs, Rendered(chain, run), LabelTask, Label)


def passthrough(out: str, rows: int, actors: int) -> float:
    return _seconds(_run(out, actors), "revise", _prompts(rows), _nothing, RevisionTask, Revision)


async def _nothing(engine: Any, row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "response": "fine", "truncated": False, "steps": [], "model": "none", "usage": USAGE}


def journal(out: str, rows: int, actors: int) -> float:
    """As two actors write it, and the driver publishes it."""
    started = time.monotonic()
    journal = _journal(out)
    _write(journal, _finished(rows))
    published = journal.publish()
    assert (published.rows, published.errors) == (rows, 0), published
    return time.monotonic() - started


def prepare_journal(out: str, rows: int) -> None:
    _write(_journal(out), (row for n, row in enumerate(_finished(rows)) if n % max(1, rows // 64)))


def resume(out: str, rows: int, actors: int) -> float:
    """Seconds until the first row that was not finished is walked."""
    noted, started = Path(out) / "walked", time.time()
    _seconds(_run(out, actors), "revise", _prompts(rows), Noting(str(noted)), RevisionTask, Revision)
    return float(noted.read_text()) - started


@dataclass(frozen=True)
class Noting:
    """Notes when it walks its first row."""

    file: str

    async def __call__(self, engine: Any, row: dict[str, Any]) -> dict[str, Any]:
        if not Path(self.file).exists():
            Path(self.file).write_text(str(time.time()))
        return await _nothing(engine, row)


def prepare_revisions(out: str, rows: int) -> None:
    step = {
        "round": 1,
        "principle_id": "p",
        "critique_request": "c",
        "critique": "It may do harm.",
        "key": "k",
    }

    def revised() -> Iterator[dict[str, Any]]:
        for n, row in enumerate(_finished(rows)):
            helpful = n % 4 == 3
            revision = {**step, "revision_request": "r", "revision": text(n + rows)}
            yield {
                **row,
                "kind": "helpful" if helpful else "red_team",
                "steps": [] if helpful else [revision],
            }

    _write_parts(_run(out), "revise", revised(), Revision)


def sft(out: str, rows: int, actors: int) -> float:
    """The reading of stage `sft`, from rows to token ids, without the context limit of the embedded world's model."""
    from cai_ray.train import sft
    from cai_ray.train.sft_records import choose_records, to_records

    run = _run(out)
    started = time.monotonic()
    config, templates = SftConfig(), load_templates(run.config.templates)
    read = run.each_row("revise", ["id", "messages", "kind", "response", "truncated", "steps", "error"])
    choice = choose_records(read, config, 0, templates.critiques)
    records = to_records(read, config, choice.ids)
    data = sft.write_records(run, records, Renderer(BASE), templates, 1 << 20, choice.ids, Counter())
    assert len(data) == len(choice.ids) == rows, (len(data), len(choice.ids))
    return time.monotonic() - started


def prepare_labels(out: str, rows: int) -> None:
    rng = random.Random(0)
    names = [p.id for p in constitutions.load("harmless").principles][:VOTES]

    def labels() -> Iterator[dict[str, Any]]:
        for n, row in enumerate(_prompts(rows)):
            votes = [_vote(name, rng) for name in names]
            pair = {"response_a": text(2 * n), "response_b": text(2 * n + 1)}
            yield {**row, **pair, "votes": votes, "p_a": 0.6, "p_a_raw": rng.random(), "usage": USAGE}

    _write_parts(_run(out), "label", labels(), Label)


def _vote(name: str, rng: random.Random) -> dict[str, Any]:
    logprobs = {f"logprob_{side}": -rng.random() for side in ("a", "b", "a_swapped", "b_swapped")}
    return {"principle_id": name, "p_a": rng.random(), "key": f"{rng.getrandbits(64):016x}", **logprobs}


def certificate(out: str, rows: int, actors: int) -> float:
    run = _run(out)
    started = time.monotonic()
    tables = iter_tables(run.path("label"), certificates.COLUMNS)
    proof = certificates.certificate(label for _, label in certificates.read(tables))
    assert proof["labels"] == rows, proof["labels"]
    return time.monotonic() - started


class RenderingEngine(ScriptedEngine):
    """Renders and tokenises what it is asked, as the engine of real runs does, and answers with a made-up text."""

    def __init__(self, renderer: Renderer):
        super().__init__(lambda messages, sampling: text(sampling.seed))
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


@cache
def _rendering(model: str, templates: str) -> RenderingEngine:
    return RenderingEngine(Renderer(model, load_templates(templates).chat_template))


def _run(out: str, actors: int = 0) -> Run:
    """A run; with `actors`, on a local cluster."""
    engine = {"kind": "scripted", "min_actors": max(1, actors), "max_actors": max(1, actors)}
    given = {
        "name": "overhead",
        "model": "town",
        "constitution": "harmless",
        "prompts": [{"path": "town:train"}],
        "engine": {**engine, "max_num_seqs": IN_FLIGHT},
        "out": out,
    }
    run = Run(RunConfig.model_validate(given))
    if actors:
        connect(run.config)
    return run


def _seconds(
    run: Run, stage: str, rows: Iterable[Any], chain: Chain[Any, Any], takes: type, gives: type
) -> float:
    started = time.monotonic()
    summary = map_rows(run, stage, rows, chain, takes=takes, gives=gives, model="base")
    seconds = time.monotonic() - started
    assert summary["errors"] == 0, summary
    return seconds


def _journal(out: str) -> Journal:
    return Journal(_run(out), "revise", RevisionTask, Revision, "part")


def _write(journal: Journal, rows: Iterable[dict[str, Any]]) -> None:
    """Writes finished rows in small blocks, which two writers merge by and by."""
    writers = [JournalWriter(journal, BLOCK) for _ in range(2)]
    block: list[dict[str, Any]] = []
    for n, row in enumerate(rows):
        block.append(row)
        if len(block) == BLOCK:
            writers[n // BLOCK % 2].write(block)
            block = []
    if block:
        writers[0].write(block)


def _write_parts(run: Run, stage: str, rows: Iterator[dict[str, Any]], record: type) -> None:
    tables = to_tables(rows, record, _PART_ROWS)
    for part, table in enumerate(tables):
        write_tables(run.path(stage, f"part-{part:05d}.parquet"), [table], table.schema)


def _prompts(rows: int) -> Iterator[dict[str, Any]]:
    for n in range(rows):
        message = {"role": "user", "content": text(n, 120)}
        id = derive_id("row", n)
        yield {"id": id, "prompt_id": id, "messages": [message], "kind": "red_team"}


def _finished(rows: int) -> Iterator[dict[str, Any]]:
    done = {"truncated": False, "steps": [], "model": "none", "usage": USAGE, "error": None}
    for n, row in enumerate(_prompts(rows)):
        yield {**row, **done, "response": text(n)}


def text(seed: int, size: int = TEXT_BYTES) -> str:
    """Words of the embedded world, of some `size` bytes; by another seed others."""
    words = _words()
    start = words.index(" ", seed * 2654435761 % (len(words) - 2 * TEXT_BYTES)) + 1
    return words[start : words.rindex(" ", start, start + size)]


@cache
def _words() -> str:
    """Random words, more than a compressor looks back on."""
    rng = random.Random(0)
    plain = [word for word in grammar.words() if word.isalpha()]
    return " ".join(" ".join(rng.choices(plain, k=10_000)) for _ in range(300))
