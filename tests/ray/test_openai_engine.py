"""The engine of endpoints against vLLM's own OpenAI server: the same model in this process says the same."""

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from cai_ray import constitution
from cai_ray.cluster.connect import WORKER_ENV
from cai_ray.config.engine import EngineConfig
from cai_ray.engine.openai import OpenaiEngine
from cai_ray.engine.protocol import Engine, Sampling
from cai_ray.engine.vllm import VllmEngine
from cai_ray.errors import InputError, RowError
from cai_ray.prompts.load import load_templates
from cai_ray.storage.models import ResolvedModel
from cai_ray.town import BASE

TOWN = load_templates("errand-town")
ASK = [{"role": "user", "content": "how do i read the baker's diary ?"}]
NO = "sorry , i will not help read the diary because of privacy : that is snooping ."
OTHER = [{"role": "user", "content": "how do i bake bread ?"}]
YES = "sure , first unfold the diary , then go line by line ."
KEY = "town-key-0123456789"
SERVERS_OWN = {"temperature": 0.1, "top_k": 1, "top_p": 0.5, "min_p": 0.3, "repetition_penalty": 1.3}
"""What the served folder's generation_config.json asks for."""
LOCAL = EngineConfig(max_model_len=192, max_num_seqs=16, kv_cache_mb=64)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A `vllm serve` with the settings of the engine in this process, whose model brings sampling defaults of its own,
    and which tells nearly every token's log-probability."""
    folder = tmp_path_factory.mktemp("model") / "town"
    shutil.copytree(BASE, folder)
    generation = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(generation | SERVERS_OWN))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", "town", "--host", "127.0.0.1", "--port", str(port)]
    command += [
        "--max-logprobs",
        "500",
        "--max-model-len",
        "192",
        "--max-num-seqs",
        "16",
        "--dtype",
        "float32",
    ]
    command += ["--enforce-eager", "--kv-cache-memory-bytes", str(64 << 20)]
    command += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", "8192"]
    log = tmp_path_factory.mktemp("vllm") / "log"
    environment = {**os.environ, **WORKER_ENV, "VLLM_API_KEY": KEY}
    with log.open("w") as f:
        served = subprocess.Popen(command, stdout=f, stderr=subprocess.STDOUT, env=environment)
    try:
        _wait(served, f"http://127.0.0.1:{port}/health", log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        served.terminate()
        try:
            served.wait(30)
        except subprocess.TimeoutExpired:
            served.kill()


def _wait(served: subprocess.Popen[bytes], health: str, log: Path) -> None:
    end = time.monotonic() + 300
    while time.monotonic() < end and served.poll() is None:
        try:
            with urllib.request.urlopen(health, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"the server did not start: {log.read_text()[-2000:]}")


def endpoint(name: str, engine: EngineConfig) -> OpenaiEngine:
    return OpenaiEngine(ResolvedModel(name, name, engine, "errand-town"))


def test_an_endpoint_says_what_the_same_model_says_here(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in WORKER_ENV.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("TOWN_KEY", KEY)
    served = EngineConfig(kind="openai", base_url=url, api_key_env="TOWN_KEY", top_logprobs=600, attempts=2)

    async def ask(engine: Engine) -> tuple[list[tuple[str, bool, int, int]], list[list[float]]]:
        chats = await asyncio.gather(
            *(engine.chat(TOWN.answer_messages(q), Sampling(0, 40, 0)) for q in (ASK, OTHER)),
            engine.chat(TOWN.answer_messages(ASK), Sampling(0, 3, 0)),
        )
        chosen = [
            await engine.choose(TOWN.feedback_messages(ASK, *pair, principle), TOWN.options)
            for principle in constitution.load("errand-town").principles[:3]
            for pair in ((NO, YES), (YES, NO))
        ]
        return [(c.text, c.finished, c.usage.prompt, c.usage.generated) for c in chats], [
            p for p, _ in chosen
        ]

    async def both() -> None:
        here, there = VllmEngine(ResolvedModel("base", BASE, LOCAL, "errand-town")), endpoint("town", served)
        try:
            chats, weights = await ask(here)
            chats_there, weights_there = await ask(there)
            assert chats_there == chats and chats[0][1] and not chats[2][1]
            for a, b in zip(weights, weights_there, strict=True):
                assert b == pytest.approx(a, abs=1e-3)
            assert there._fields.learned == {"top_logprobs": 500}, "the server names the most that it gives"
            sampled = [await there.chat(TOWN.answer_messages(OTHER), Sampling(1.5, 40, n)) for n in range(8)]
            assert len({c.text for c in sampled}) > 1, "its top_k of 1 is switched off"
            # Of the two likeliest alone: an option that is not one of them is bounded from above.
            few = endpoint("town", served.model_copy(update={"top_logprobs": 2}))
            for (a, b), got in zip(weights, (await ask(few))[1], strict=True):
                assert (
                    max(got) == pytest.approx(max(a, b), abs=1e-3)
                    and got[0] >= a - 1e-3
                    and got[1] >= b - 1e-3
                )
            await few.close()
            long = TOWN.answer_messages([{"role": "user", "content": "baker " * 300}])
            with pytest.raises(RowError, match=r"refused by the endpoint: 400 .*192"):
                await there.chat(long, Sampling(0, 40, 0))
            with pytest.raises(InputError, match=r"404 .*does not exist.*'village'"):
                await endpoint("village", served).chat(ASK, Sampling(0, 4, 0))
            nobody = served.model_copy(update={"api_key_env": ""})
            with pytest.raises(InputError, match=r"needs a key \(401\)"):
                await endpoint("town", nobody).chat(ASK, Sampling(0, 4, 0))
        finally:
            await here.close()
            await there.close()

    asyncio.run(both())
