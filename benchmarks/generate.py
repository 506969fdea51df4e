"""Generation in rounds: our tokens a second beside the bare engine's, and beside ray.data.llm's processors.

    python benchmarks/generate.py [--rows N] [--runs N] [--only KIND ...]

Prompts are answered, criticised and revised by a random model (its texts mean nothing, its work is real). Every text
has a length of its own, drawn evenly from 8 to 64 tokens by the seed of its call, so that all kinds write the same.

Four rounds, nine calls a row:
- `ours`: stage `revise` as it runs, through Ray Data.
- `steps`: vLLM's `LLM.generate`, one step of all rows after the other.
- `coroutines`: vLLM's AsyncLLM, every row a coroutine of one process.

One round, three calls a row:
- `ours_once`: as `ours`.
- `ray_data_llm`: three processors of ray.data.llm that share one engine deployment of Ray Serve.

Seconds are from the first call begun to the last one ended; what comes before is start-up. Each measurement is a
process of its own; the kinds take turns, and medians are compared. The last line is JSON: `vs_engine` is ours over the
faster of the two bare engines, `vs_steps` over the first of them, `vs_ray_data_llm` is ours over ray.data.llm, one
round each.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cai_ray import constitution as constitutions
from cai_ray import pipeline
from cai_ray.cluster import connect
from cai_ray.config import RunConfig
from cai_ray.engine import Completion, Sampling, Usage, make_engine
from cai_ray.engine.vllm import engine_args
from cai_ray.generate.draw import draw
from cai_ray.generate.revise import Revise
from cai_ray.generate.rows import map_rows
from cai_ray.prompts import Renderer, load_templates, plain_messages
from cai_ray.records import derive_seed
from cai_ray.storage import Run
from tests import tiny

KINDS = {"ours": 4, "steps": 4, "coroutines": 4, "ours_once": 1, "ray_data_llm": 1}
"""Rounds by kind."""
SHORTEST, LONGEST = 8, 64
HIDDEN, LAYERS = 128, 2


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=512, help="prompts (default 512)")
    parser.add_argument("--runs", type=int, default=3, help="measurements of each kind (default 3)")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), help="these kinds alone")
    parser.add_argument("--part", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        with tempfile.TemporaryDirectory(prefix="cai-ray-generate-") as folder:
            print(json.dumps(measure(args.part, args.model, args.rows, folder)))
        return 0

    load = os.getloadavg()[0]
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in args.only}
    with tempfile.TemporaryDirectory(prefix="cai-ray-generate-model-") as folder:
        model = str(tiny.save_model(Path(folder), hidden=HIDDEN, layers=LAYERS))
        for _ in range(args.runs):
            for kind in args.only:
                found[kind].append(_in_a_process(kind, model, args.rows))
    rates = {k: statistics.median(f["generated"] / f["seconds"] for f in fs) for k, fs in found.items()}

    def ratio(ours: str, *others: str) -> float | None:
        if not all(kind in rates for kind in (ours, *others)):
            return None
        return round(rates[ours] / max(rates[kind] for kind in others), 3)

    print(
        json.dumps(
            {
                "benchmark": "generate",
                "vs_engine": ratio("ours", "steps", "coroutines"),
                "vs_steps": ratio("ours", "steps"),
                "vs_ray_data_llm": ratio("ours_once", "ray_data_llm"),
                "generated_per_s": {kind: round(rate) for kind, rate in rates.items()},
                "generated": {kind: fs[0]["generated"] for kind, fs in found.items()},
                "seconds": {kind: [round(f["seconds"], 1) for f in fs] for kind, fs in found.items()},
                "start_seconds": {kind: [round(f["start"], 1) for f in fs] for kind, fs in found.items()},
                "rows": args.rows,
                "lengths": [SHORTEST, LONGEST],
                "model": {"hidden": HIDDEN, "layers": LAYERS},
                "engine": _config(model, "", "ours").engine.model_dump(exclude_defaults=True),
                "cores": len(os.sched_getaffinity(0)),
                "threads": os.environ.get("OMP_NUM_THREADS"),
                "load_before": round(load, 2),
                "versions": pipeline.versions(),
            }
        )
    )
    return 0


def _in_a_process(kind: str, model: str, rows: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--part", kind, "--model", model, "--rows", str(rows)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    said = json.loads(done.stdout.splitlines()[-1])
    print(f"{kind}: {said['generated']} tokens in {said['seconds']:.1f} s", file=sys.stderr, flush=True)
    return said


def measure(kind: str, model: str, rows: int, folder: str) -> dict[str, Any]:
    """One measurement: tokens written, seconds of work, seconds before it."""
    run, started = Run(_config(model, folder, kind)), time.time()
    how = {"steps": steps, "coroutines": coroutines, "ray_data_llm": ray_data_llm}.get(kind, ours)
    generated = how(run, prompts(rows), folder)
    lines = [line.split() for p in Path(folder).glob("times-*") for line in p.read_text().splitlines()]
    first, last = min(float(b) for b, _ in lines), max(float(e) for _, e in lines)
    return {"generated": generated, "seconds": last - first, "start": first - started}


# ------------------------------------------------------------------------------------------------------ ways to do it


def ours(run: Run, rows: list[dict[str, Any]], folder: str) -> int:
    connect(run.config)
    made = map_rows(run, "revise", rows, Timed(_chain(run), folder), model="base", schema="revisions")
    assert made["errors"] == 0, made
    return int(made["tokens"]["generated"])


def coroutines(run: Run, rows: list[dict[str, Any]], folder: str) -> int:
    chain = Timed(_chain(run), folder)

    async def all_rows() -> list[dict[str, Any]]:
        engine: Any = make_engine(
            run.model("base"), load_templates(run.config.templates), run.config.engine, gpu=False
        )
        try:
            return list(await asyncio.gather(*(chain(engine, row) for row in rows)))
        finally:
            await engine.close()

    return sum(row["usage"]["generated"] for row in asyncio.run(all_rows()))


def steps(run: Run, rows: list[dict[str, Any]], folder: str) -> int:
    """The same calls in the order in which a user of `LLM.generate` would make them."""
    from vllm import LLM, SamplingParams

    config, templates = run.config, load_templates(run.config.templates)
    renderer = Renderer(run.model("base"), templates.chat_template)
    llm = LLM(**engine_args(run.model("base"), config.engine, gpu=False), skip_tokenizer_init=True)
    chain, generated = _chain(run), 0

    def step(name: str, messages: list[Any]) -> list[str]:
        nonlocal generated
        params = [
            SamplingParams(
                temperature=config.revise.temperature,
                max_tokens=length(seed := derive_seed(chain.seed, row["id"], name)),
                seed=seed,
                stop_token_ids=[renderer.end_id],
                detokenize=False,
            )
            for row in rows
        ]
        asked = [{"prompt_token_ids": renderer.prompt_ids(m)} for m in messages]
        outputs = llm.generate(asked, params, use_tqdm=False)
        generated += sum(len(o.outputs[0].token_ids) for o in outputs)
        return [renderer.decode(o.outputs[0].token_ids).strip() for o in outputs]

    began = time.time()
    current = step("response", [templates.answer_messages(row["messages"]) for row in rows])
    drawn = [
        draw(
            chain.constitution.principles,
            config.revise.rounds,
            seed=chain.seed,
            row_id=row["id"],
            replacement=True,
        )
        for row in rows
    ]
    for number in range(config.revise.rounds):
        said = list(zip(rows, current, [d[number] for d in drawn], strict=True))
        critiques = step(
            f"critique {number}",
            [templates.critique_messages(row["messages"], text, p) for row, text, p in said if p],
        )
        current = step(
            f"revision {number}",
            [
                templates.revision_messages(row["messages"], text, p, critique)
                for (row, text, p), critique in zip(said, critiques, strict=True)
                if p
            ],
        )
    _note(folder, began)
    return generated


def ray_data_llm(run: Run, rows: list[dict[str, Any]], folder: str) -> int:
    """Three processors after one another, each a pool of its own that sends its rows to the one deployment."""
    import ray
    from ray import serve
    from ray.data.llm import ServeDeploymentProcessorConfig, build_processor
    from ray.serve.llm import build_llm_deployment
    from ray.serve.llm.openai_api_models import ChatCompletionRequest

    from cai_ray.serve.app import policy_config

    connect(run.config)
    llm = policy_config(run, "base")
    serve.run(build_llm_deployment(llm, override_serve_options={"name": "engine"}), name="app")
    chain, templates = _chain(run), load_templates(run.config.templates)

    def asked(row: dict[str, Any], name: str, messages: Any) -> dict[str, Any]:
        seed = derive_seed(chain.seed, row["id"], name)
        return {
            **row,
            "began": time.time(),
            "method": "chat",
            "dtype": "ChatCompletionRequest",
            "request_kwargs": {
                "model": "base",
                "messages": plain_messages(messages),
                "temperature": run.config.revise.temperature,
                "max_tokens": length(seed),
                "seed": seed,
                "stream": False,
            },
        }

    def answered(row: dict[str, Any], name: str) -> dict[str, Any]:
        _note(folder, row["began"])
        kept: dict[str, Any] = {
            k: row[k] for k in ("id", "messages", "response", "critique", "generated") if k in row
        }
        text = row["choices"][0]["message"]["content"] or "x"
        return {**kept, name: text, "generated": row.get("generated", 0) + row["usage"]["completion_tokens"]}

    def principle(row: dict[str, Any]) -> Any:
        (p,) = draw(chain.constitution.principles, 1, seed=chain.seed, row_id=row["id"], replacement=True)
        return p

    questions = {
        "response": lambda row: templates.answer_messages(row["messages"]),
        "critique": lambda row: templates.critique_messages(row["messages"], row["response"], principle(row)),
        "revision": lambda row: templates.revision_messages(
            row["messages"], row["response"], principle(row), row["critique"]
        ),
    }
    data = ray.data.from_items([{"id": r["id"], "messages": r["messages"]} for r in rows])
    for name, question in questions.items():
        config = ServeDeploymentProcessorConfig(
            deployment_name="engine",
            app_name="app",
            dtype_mapping={"ChatCompletionRequest": ChatCompletionRequest},
            batch_size=64,
            concurrency=1,
        )
        step = "response" if name == "response" else f"{name} 0"
        data = build_processor(
            config,
            preprocess=lambda row, step=step, question=question: asked(row, step, question(row)),
            postprocess=lambda row, name=name: answered(row, name),
        )(data)
    generated = sum(row["generated"] for row in data.take_all())
    serve.shutdown()
    return generated


# --------------------------------------------------------------------------------------------------- what they share


@dataclass(frozen=True)
class Timed:
    """A chain whose texts have drawn lengths, and which notes when it began and ended with each row."""

    chain: Revise
    folder: str

    async def __call__(self, engine: Any, row: dict[str, Any]) -> dict[str, Any]:
        began = time.time()
        out = await self.chain(Spread(engine), row)
        _note(self.folder, began)
        return out


class Spread:
    """An engine whose every text has the length that its seed says."""

    def __init__(self, engine: Any):
        self.engine = engine

    async def chat(self, messages: Any, sampling: Sampling) -> Completion:
        done = await self.engine.chat(messages, sampling._replace(max_tokens=length(sampling.seed)))
        return Completion(done.text or "x", True, done.usage)

    async def choose(self, messages: Any, options: Any) -> tuple[list[float], Usage]:
        raise NotImplementedError

    async def sample(self, ids: Any, sampling: Sampling) -> Any:
        raise NotImplementedError

    async def close(self) -> None:
        raise NotImplementedError


def length(seed: int) -> int:
    return SHORTEST + seed % (LONGEST - SHORTEST + 1)


def prompts(rows: int) -> list[dict[str, Any]]:
    words = " ".join(p.text for p in constitutions.load("harmless").principles).split()
    texts = [" ".join(words[(31 * n + i) % len(words)] for i in range(24)) for n in range(rows)]
    return [
        {"id": f"{n:06x}", "kind": "red_team", "messages": [{"role": "user", "content": text}]}
        for n, text in enumerate(texts)
    ]


def _chain(run: Run) -> Revise:
    config = run.config
    return Revise(
        constitutions.load(config.constitution), load_templates(config.templates), config.revise, 0, "base"
    )


def _note(folder: str, began: float) -> None:
    with open(os.path.join(folder, f"times-{os.getpid()}"), "a") as f:
        f.write(f"{began} {time.time()}\n")


def _config(model: str, out: str, kind: str) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "generate",
            "out": out or "none",
            "model": model,
            "constitution": "harmless",
            "templates": "general",
            "prompts": [{"path": "none.jsonl", "kind": "red_team"}],
            "revise": {"rounds": KINDS[kind], "draw": "with_replacement", "revision_temperature": 1.0},
            "engine": {"max_model_len": 4096, "max_num_seqs": 64, "kv_cache_mb": 512, "block_size": 16},
        }
    )


if __name__ == "__main__":
    sys.exit(main())
