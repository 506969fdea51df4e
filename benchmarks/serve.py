"""The served endpoints: streams beside Ray's stock OpenAI app and `vllm serve`, comparisons beside the bare engine.

    python benchmarks/serve.py [--rows N] [--runs N]

A random model (its texts mean nothing, its work is real) answers chats of about 50 words with 8 to 64 tokens, streamed
to 32 and to 128 clients at once; each client asks anew when it has its answer. And `/v1/compare` weighs two responses
by sixteen principles in both orders, 16 requests at once, as in benchmarks/label.py.

- `ours`: `cai-ray serve`'s application, with keys and everything before the engine.
- `stock`: Ray Serve LLM's `build_openai_app`, with the same description of the model.
- `vllm`: `vllm serve` with the same engine settings.
- `engine`: the comparisons' prompts to the bare engine, as coroutines in one process.

Rates are those of steady state (turns.py). Each measurement is a process of its own; they take turns, and medians are
compared. The last line is JSON: `throughput_vs_stock`, `first_token_vs_stock` (medians) and `throughput_vs_vllm` by
number of streams, `compare_vs_engine`.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks import label
from benchmarks.turns import Found, Turns, note, worked
from cai_ray.cluster.connect import connect, disconnect
from cai_ray.engine.make import make_engine
from cai_ray.engine.vllm import engine_args
from cai_ray.prompts.load import load_templates
from cai_ray.prompts.messages import plain_messages
from cai_ray.serve.app import build, complete, environment
from cai_ray.serve.keys import Key, hash_token
from cai_ray.serve.policy import describe_policy
from cai_ray.serve.settings import ServeSettings
from cai_ray.storage import files
from cai_ray.storage.run import Run
from tests.e2e.command import free_port

WAYS = ("ours", "stock", "vllm", "engine")
STREAMS = (32, 128)
COMPARING = 16
TOKEN = "token of the benchmark"


def main() -> int:
    turns = Turns(__file__, __doc__, WAYS, rows=384, hidden=256, layers=4)
    return turns.main(measure, summary)


def summary(found: Found, rows: int) -> dict[str, Any]:
    def median(way: str, key: str) -> float:
        return statistics.median(f[key] for f in found[way])

    def over(mine: str, other: str, key: str) -> dict[str, float]:
        return {str(n): round(median(mine, f"{key}_{n}") / median(other, f"{key}_{n}"), 3) for n in STREAMS}

    return {
        "throughput_vs_stock": over("ours", "stock", "tokens_per_s"),
        "first_token_vs_stock": over("ours", "stock", "first_token_s"),
        "throughput_vs_vllm": over("ours", "vllm", "tokens_per_s"),
        "compare_vs_engine": round(median("ours", "compares_per_s") / median("engine", "compares_per_s"), 3),
        "tokens_per_s": {w: {n: round(median(w, f"tokens_per_s_{n}")) for n in STREAMS} for w in WAYS[:3]},
        "first_token_s": {
            w: {n: round(median(w, f"first_token_s_{n}"), 3) for n in STREAMS} for w in WAYS[:3]
        },
        "compares_per_s": {w: round(median(w, "compares_per_s"), 2) for w in ("ours", "engine")},
    }


def measure(way: str, model: str, rows: int, folder: str) -> dict[str, Any]:
    """Seconds before the first request is answered, and the rates."""
    began = time.time()
    if way == "engine":
        started, rate = asyncio.run(_bare(model, rows // 2, folder))
        return {"seconds": time.time() - started, "start": started - began, "compares_per_s": rate}
    with {"ours": _ours, "stock": _stock, "vllm": _vllm}[way](model) as (address, name):
        asyncio.run(
            _streams(address, name, 16, 16, tempfile.mkdtemp(dir=folder))
        )  # what only the first ones cost
        started, found = time.time(), {}
        for n in STREAMS:
            for key, value in asyncio.run(_streams(address, name, n, max(rows, 3 * n), folder)).items():
                found[f"{key}_{n}"] = value
        if way == "ours":
            found["compares_per_s"] = asyncio.run(_compares(address, rows // 2, folder))
        return {"seconds": time.time() - started, "start": started - began, **found}


@contextmanager
def _ours(model: str) -> Iterator[tuple[str, str]]:
    with _run(model) as run:
        keys = (Key(name="benchmark", sha256=hash_token(TOKEN)),)
        with _served(run, lambda: build(run, complete(run, _settings(run, keys)))) as address:
            yield address, "sl"


@contextmanager
def _stock(model: str) -> Iterator[tuple[str, str]]:
    from ray.serve.llm import build_openai_app

    with _run(model) as run:
        described = describe_policy(run, "sl", _settings(run), run.model("sl"))
        with _served(run, lambda: build_openai_app({"llm_configs": [described]})) as address:
            yield address, "sl"


@contextmanager
def _served(run: Run, application: Callable[[], Any]) -> Iterator[str]:
    from ray import serve

    port = free_port()
    connect(run.config, env=environment(run.config, _settings(run)))
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(application(), name="app", route_prefix="/")
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        disconnect()


@contextmanager
def _vllm(model: str) -> Iterator[tuple[str, str]]:
    port, args = free_port(), engine_args(model, label._config(model, "", "ours").engine, gpu=False)
    del args["distributed_executor_backend"], args["trust_remote_code"], args["disable_log_stats"]
    # What `vllm serve` runs. The command itself looks for a distribution named vllm, which the CPU build is not.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1"]
    for key, value in {**args, "port": port}.items():
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            command.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            command += [f"--{flag}", str(value)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                if server.poll() is not None:
                    raise RuntimeError(f"ended with {server.returncode}: {' '.join(command)}") from None
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", model
    finally:
        server.terminate()
        server.wait(60)


@contextmanager
def _run(model: str) -> Iterator[Run]:
    """A run whose SL-CAI policy is the model."""
    with tempfile.TemporaryDirectory(prefix="cai-ray-benchmark-run-") as folder:
        run = Run(label._config(model, folder, "ours"))
        shutil.copytree(model, run.path("sft", "model"))
        files.write_json(run.path("sft", "manifest.json"), {"stage": "sft", "id": "benchmark"})
        yield run


def _settings(run: Run, keys: tuple[Key, ...] = ()) -> ServeSettings:
    return ServeSettings(run=run.root, models=("sl",), keys=keys)


async def _streams(address: str, model: str, clients: int, requests: int, folder: str) -> dict[str, float]:
    """Answers streamed to so many clients at once: tokens a second, and the median time to the first one."""
    import aiohttp

    firsts: list[float] = []
    templates, asked = load_templates("general"), label.comparisons(requests)
    place = tempfile.mkdtemp(dir=folder)

    async def one(session: aiohttp.ClientSession, row: dict[str, Any]) -> None:
        began, tokens = time.time(), 0
        body = {
            "model": model,
            "messages": plain_messages(templates.answer_messages(row["messages"])),
            "max_tokens": random.Random(row["id"]).randint(8, 64),
            "seed": int(row["id"], 16),
            "stream": True,
        }
        async with session.post(f"{address}/v1/chat/completions", json=body) as answer:
            assert answer.status == 200, await answer.text()
            async for line in answer.content:
                if b'"content":"' in line and b'"content":""' not in line:
                    if not tokens:
                        firsts.append(time.time() - began)
                    tokens += 1
        assert tokens
        note(place, began, tokens)

    await _at_once(clients, asked, one)
    return {
        "tokens_per_s": worked(place, 0)["rate"],
        "first_token_s": statistics.median(firsts),
    }


async def _compares(address: str, requests: int, folder: str) -> float:
    """Comparisons a second."""
    place = tempfile.mkdtemp(dir=folder)

    async def one(session: Any, row: dict[str, Any]) -> None:
        began = time.time()
        body = {k: row[k] for k in ("messages", "response_a", "response_b")}
        async with session.post(f"{address}/v1/compare", json=body) as answer:
            assert answer.status == 200, await answer.text()
            assert len((await answer.json())["principles"]) == 16
        note(place, began, 1)

    await _at_once(COMPARING, label.comparisons(requests), one)
    return worked(place, 0)["rate"]


async def _at_once(
    clients: int, rows: list[dict[str, Any]], one: Callable[[Any, dict[str, Any]], Awaitable[None]]
) -> None:
    import aiohttp

    left = iter(rows)
    headers = {"Authorization": f"Bearer {TOKEN}"}
    connector = aiohttp.TCPConnector(limit=clients)
    async with aiohttp.ClientSession(headers=headers, connector=connector) as session:

        async def client() -> None:
            for row in left:
                await one(session, row)

        await asyncio.gather(*(client() for _ in range(clients)))


async def _bare(model: str, requests: int, folder: str) -> tuple[float, float]:
    """When it was up, and comparisons a second."""
    config = label._config(model, "", "ours")
    engine = make_engine(Run(config).resolve_model(model), gpu=False)
    document, templates = config.document, load_templates(config.templates)
    started, left = time.time(), iter(label.comparisons(requests))

    async def client() -> None:
        for row in left:
            began, sides = time.time(), (row["response_a"], row["response_b"])
            prompts = [
                templates.feedback_messages(row["messages"], *order, principle)
                for principle in document.enabled
                for order in (sides, sides[::-1])
            ]
            await asyncio.gather(*(engine.choose(prompt, templates.options) for prompt in prompts))
            note(folder, began, 1)

    await asyncio.gather(*(client() for _ in range(COMPARING)))
    await engine.close()
    return started, worked(folder, 0)["rate"]


if __name__ == "__main__":
    sys.exit(main())
