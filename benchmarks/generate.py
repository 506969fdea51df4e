"""Generation in rounds: our tokens a second beside the bare engine's, and beside ray.data.llm's processors.

    python benchmarks/generate.py [--rows N] [--runs N]

Prompts are answered, criticised and revised by a random model (its texts mean nothing, its work is real). Every text
has a length of its own, drawn evenly from 8 to 64 tokens by the seed of its call, so that all kinds write the same.

Four rounds, nine calls a row:
- `ours`: stage `revise` as it runs, through Ray Data.
- `steps`: vLLM's `LLM.generate`, one step of all rows after the other.
- `coroutines`: vLLM's AsyncLLM, every row a coroutine of one process.

One round, three calls a row:
- `ours_once`: as `ours`.
- `ray_data_llm`: three processors of ray.data.llm that share one engine deployment of Ray Serve.

Tokens a second are those of steady state (turns.py), start-up is apart. Each measurement is a process of its own;
the kinds take turns, and medians are compared. The last line is JSON: `vs_engine` is ours over the
faster of the two bare engines, `vs_steps` over the first of them, `vs_ray_data_llm` is ours over ray.data.llm, one
round each.
"""

from __future__ import annotations

import asyncio
import sys
import time
from dataclasses import dataclass
from typing import Any

from benchmarks.turns import Found, Turns, median_of, note, worked
from cai_ray import constitution as constitutions
from cai_ray.cluster.connect import connect
from cai_ray.cluster.usage import Usage
from cai_ray.config.run import RunConfig
from cai_ray.engine.make import make_engine
from cai_ray.engine.protocol import Completion, Sampling
from cai_ray.engine.vllm import engine_args
from cai_ray.generate.draw import draw
from cai_ray.generate.revise import ReviseChain, RevisionTask
from cai_ray.generate.rows import map_rows
from cai_ray.prompts.load import load_templates
from cai_ray.prompts.messages import plain_messages
from cai_ray.prompts.renderer import Renderer
from cai_ray.storage.records import Revision, derive_seed
from cai_ray.storage.run import Run

KINDS = {"ours": 4, "steps": 4, "coroutines": 4, "ours_once": 1, "ray_data_llm": 1}
"""Rounds by kind."""
SHORTEST, LONGEST = 8, 64


def main() -> int:
    turns = Turns(__file__, __doc__, KINDS, rows=512, hidden=128, layers=2)
    return turns.main(measure, summary)


def summary(found: Found, rows: int) -> dict[str, Any]:
    rates = median_of(found, "rate")
    return {
        "vs_engine": round(rates["ours"] / max(rates["steps"], rates["coroutines"]), 3),
        "vs_steps": round(rates["ours"] / rates["steps"], 3),
        "vs_ray_data_llm": round(rates["ours_once"] / rates["ray_data_llm"], 3),
        "generated_per_s": {kind: round(rate) for kind, rate in rates.items()},
        "generated": {kind: fs[0]["amount"] for kind, fs in found.items()},
        "lengths": [SHORTEST, LONGEST],
        "engine": _config("none", "", "ours").engine.model_dump(exclude_defaults=True),
    }


def measure(kind: str, model: str, rows: int, folder: str) -> dict[str, Any]:
    """One measurement: tokens written, seconds of work, seconds before it."""
    run, started = Run(_config(model, folder, kind)), time.time()
    how = {"steps": steps, "coroutines": coroutines, "ray_data_llm": ray_data_llm}.get(kind, ours)
    generated = how(run, prompts(rows), folder)
    found = worked(folder, started)
    assert found["amount"] == generated, (found, generated)
    return found


# ------------------------------------------------------------------------------------------------------ ways to do it


def ours(run: Run, rows: list[Any], folder: str) -> int:
    connect(run.config)
    made = map_rows(
        run, "revise", rows, Spreading(_chain(run), folder), takes=RevisionTask, gives=Revision, model="base"
    )
    assert made["errors"] == 0, made
    return int(made["tokens"]["generated"])


def coroutines(run: Run, rows: list[Any], folder: str) -> int:
    chain = Spreading(_chain(run), folder)

    async def all_rows() -> list[Any]:
        engine: Any = make_engine(run.resolve_model("base"), gpu=False)
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
        began = time.time()
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
        written = sum(len(o.outputs[0].token_ids) for o in outputs)
        note(folder, began, written)
        generated += written
        return [renderer.decode(o.outputs[0].token_ids).strip() for o in outputs]

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
    return generated


def ray_data_llm(run: Run, rows: list[dict[str, Any]], folder: str) -> int:
    """Three processors after one another, each a pool of its own that sends its rows to the one deployment."""
    import ray
    from ray import serve
    from ray.data.llm import ServeDeploymentProcessorConfig, build_processor
    from ray.serve.llm import build_llm_deployment
    from ray.serve.llm.openai_api_models import ChatCompletionRequest

    from cai_ray.serve.app import environment
    from cai_ray.serve.policy import describe_policy
    from cai_ray.serve.settings import ServeSettings

    settings = ServeSettings(run=run.root, models=("base",))
    connect(run.config, env=environment(run.config, settings))
    llm = describe_policy(run, "base", settings, run.model("base"))
    llm.log_engine_metrics, llm.engine_kwargs["disable_log_stats"] = (
        False,
        True,
    )  # as the engine it is compared with
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
        note(folder, row["began"], row["usage"]["completion_tokens"])
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
class Spreading:
    """A chain whose texts have drawn lengths."""

    chain: ReviseChain
    folder: str

    async def __call__(self, engine: Any, row: RevisionTask) -> Revision:
        return await self.chain(Spread(engine, self.folder), row)


class Spread:
    """An engine whose every text has the length that its seed says, and is noted."""

    def __init__(self, engine: Any, folder: str):
        self.engine, self.folder = engine, folder

    async def chat(self, messages: Any, sampling: Sampling) -> Completion:
        began = time.time()
        done = await self.engine.chat(messages, sampling._replace(max_tokens=length(sampling.seed)))
        note(self.folder, began, done.usage.generated)
        return Completion(done.text or "x", True, done.usage)

    async def choose(self, messages: Any, options: Any) -> tuple[list[float], Usage]:
        raise NotImplementedError

    def tokens(self) -> int:
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


def _chain(run: Run) -> ReviseChain:
    config = run.config
    return ReviseChain(
        constitutions.load(config.constitution), load_templates(config.templates), config.revise, 0, "base"
    )


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
            "engine": {
                "threads": 1,
                "max_model_len": 4096,
                "max_num_seqs": 64,
                "kv_cache_mb": 512,
                "block_size": 32,
            },
        }
    )


if __name__ == "__main__":
    sys.exit(main())
