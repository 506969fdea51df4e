"""A quarter of an hour of load on `cai-ray serve` while its replicas are killed: what fails, and what memory grows.

    python benchmarks/load.py [--minutes 15] [--streams 8] [--kill-every 120]

Two replicas of a policy (a random model, whose texts mean nothing) stream answers of 32 to 256 tokens to eight clients.
Every two minutes one of the two is killed with SIGKILL. An answer that had begun there is cut, and counted apart; what
had not begun is to be answered by the other one. The last line is JSON:

- `failed`: requests with another status than 200, or none within a minute.
- `cut`: streams that ended without their last line.
- `growth`: memory (PSS) of all processes of the server while both replicas are up, the median of the last quarter of
  the time over that of the first, whose first minute is left out; `growth_by_part` for its processes apart.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks import label
from cai_ray.storage import files
from cai_ray.storage.run import Run
from tests import tiny
from tests.e2e.command import free_port

TOKEN = "token-of-the-benchmark"
POLICY = "policy-rl"
PARTS = {"ServeReplica:cai-ray:ingress": "ingress", "ProxyActor": "proxy", "ServeController": "controller"}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--kill-every", type=float, default=120, help="seconds")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cai-ray-load-") as folder, _server(folder) as (address, server):
        found = asyncio.run(_load(address, server, 60 * args.minutes, args.streams, args.kill_every))
    print(json.dumps({"benchmark": "load", **vars(args), **found}))
    return 0


@contextmanager
def _server(folder: str) -> Iterator[tuple[str, psutil.Process]]:
    model = tiny.save_model(Path(folder) / "base", hidden=128, layers=2)
    run = Run(label._config(str(model), folder, "ours"))
    cfg = run.config
    shutil.copytree(model, run.path("ppo", "model"))
    files.write_json(run.path("ppo", "manifest.json"), {"stage": "ppo", "id": "benchmark"})
    files.write_json(run.path("run.json"), {"config": cfg.model_dump(mode="json")})
    files.write_bytes(run.path("constitution.yaml"), cfg.document.to_yaml().encode())
    port = free_port()
    words = ["serve", folder, "--port", str(port), "--set", "policy.min=2", "--set", "policy.max=2"]
    log = Path(folder) / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "cai_ray", *words],
            env={**os.environ, "CAI_RAY_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"},
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        while "serving" not in log.read_text():
            if process.poll() is not None:
                raise RuntimeError(log.read_text()[-4000:])
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}", psutil.Process(process.pid)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(120)


async def _load(
    address: str, server: psutil.Process, seconds: float, streams: int, kill_every: float
) -> dict[str, Any]:
    import aiohttp

    counts: Counter[str] = Counter()
    statuses: Counter[str] = Counter()
    prompts = [row["messages"] for row in label.comparisons(200)]
    end = time.monotonic() + seconds
    timeout = aiohttp.ClientTimeout(total=60)
    headers = {"Authorization": f"Bearer {TOKEN}"}

    async def client(session: aiohttp.ClientSession, number: int) -> None:
        dice = random.Random(number)
        while time.monotonic() < end:
            body = {"model": "rl", "messages": dice.choice(prompts), "stream": True}
            body["max_tokens"] = dice.randint(32, 256)
            begun = False
            try:
                async with session.post(f"{address}/v1/chat/completions", json=body) as answer:
                    if answer.status != 200:
                        counts["failed"] += 1
                        statuses[f"{answer.status}: {(await answer.text())[:200]}"] += 1
                        continue
                    last = b""
                    async for line in answer.content:
                        begun = True
                        last = line.strip() or last
                    counts["whole" if last == b"data: [DONE]" else "cut"] += 1
            except (aiohttp.ClientError, TimeoutError) as e:
                counts["cut" if begun else "failed"] += 1
                statuses[repr(e)[:200]] += 1

    memory: list[tuple[float, dict[str, int]]] = []
    began = time.monotonic()

    async def watch() -> None:
        while time.monotonic() < end:
            found = await asyncio.to_thread(_memory, server)
            if found.get(POLICY, 0) and len(_replicas(server)) == 2:
                memory.append((time.monotonic() - began, found))
            await asyncio.sleep(5)

    async def kill() -> None:
        dice = random.Random(0)
        while (wait := min(kill_every, end - time.monotonic())) > 0:
            await asyncio.sleep(wait)
            if end - time.monotonic() > 30 and (victims := _replicas(server)):
                dice.choice(victims).kill()
                counts["kills"] += 1

    async with aiohttp.ClientSession(headers=headers, timeout=timeout) as session:
        await asyncio.gather(*(client(session, n) for n in range(streams)), watch(), kill())
    first = [m for at, m in memory if 60 <= at < max(seconds / 4, 120)]
    last = [m for at, m in memory if at >= 0.75 * seconds]

    def growth(part: str) -> float | None:
        sizes = [[m[part] for m in ms if part in m] for ms in (first, last)]
        return round(statistics.median(sizes[1]) / statistics.median(sizes[0]), 3) if all(sizes) else None

    return {
        **{key: counts[key] for key in ("failed", "cut", "whole", "kills")},
        "growth": growth("all"),
        "growth_by_part": {part: growth(part) for part in (*PARTS.values(), POLICY)},
        "mib": {key: round(value / 2**20) for key, value in (last or first or [{}])[-1].items()},
        "answers": dict(statuses),
    }


def _replicas(server: psutil.Process) -> list[psutil.Process]:
    found = []
    for process in server.children(recursive=True):
        with suppress(psutil.Error):
            if f"ServeReplica:cai-ray:{POLICY}" in "".join(process.cmdline()):
                found.append(process)
    return found


def _memory(server: psutil.Process) -> dict[str, int]:
    """PSS in bytes, of all processes and by part; a replica's with its engine's."""
    found: Counter[str] = Counter()
    for process in server.children(recursive=True):
        with suppress(psutil.Error):
            name, pss = "".join(process.cmdline()), process.memory_full_info().pss
            found["all"] += pss
            for start, part in {**PARTS, f"ServeReplica:cai-ray:{POLICY}": POLICY}.items():
                found[part] += pss * (start in name)
    return dict(found)


if __name__ == "__main__":
    sys.exit(main())
