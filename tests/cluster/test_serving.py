"""A server under what the world does to it: wrong requests, killed replicas, the signal to end."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from cai_ray.serve.guard import OPEN_PATHS
from cai_ray.storage.run import Run
from cai_ray.town import BASE
from tests import fuzz
from tests.e2e.command import BIN, TOKEN, Driver, ask, environment, free_port

ASKED = [{"role": "user", "content": "how do i read the baker's diary ?"}]
REQUESTS = 10_000


@pytest.fixture(scope="module")
def server(served_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Driver]]:
    """A server with two replicas of its policy. The last test ends it."""
    port = free_port()
    adapter = _adapter(tmp_path_factory.mktemp("adapter"))
    two = ("--set", "policy.min=2", "--set", "policy.max=2", "--adapter", f"odd={adapter}")
    words = ("serve", served_run.root, "--port", port, *two)
    driver = Driver(tmp_path_factory.mktemp("log") / "log", *words, env=environment(CAI_RAY_TOKEN=TOKEN))
    try:
        driver.wait_for("serving", 600)
        yield f"http://127.0.0.1:{port}", driver
    finally:
        driver.end()


def _adapter(folder: Path) -> Path:
    """A LoRA adapter with random weights, as PEFT saves it."""
    import peft
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(str(BASE))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    torch.manual_seed(0)
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.3)
    adapted.save_pretrained(str(folder))
    return folder


def test_an_adapter_answers_by_its_name_and_changes_no_other_answer(server: tuple[str, Driver]) -> None:
    address, _ = server
    cards = ask(f"{address}/v1/models")[1]["data"]
    assert [(c["id"], c.get("adapter_on")) for c in cards] == [("rl", None), ("odd", "rl")]

    def says(model: str) -> str:
        body = {"model": model, "messages": ASKED, "max_tokens": 30, "temperature": 0}
        status, answer = ask(f"{address}/v1/chat/completions", body)
        assert status == 200 and answer["model"] == model, answer
        return str(answer["choices"][0]["message"]["content"])

    plain = says("rl")
    assert plain.strip().startswith("sure")
    # In one batch of the engine, too.
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(says, ["rl", "odd"] * 8))
    assert set(answers[::2]) == {plain}
    assert len(set(answers[1::2])) == 1 and plain not in answers[1::2]


def test_wrong_requests_are_the_clients_fault(server: tuple[str, Driver]) -> None:
    address, driver = server
    found = asyncio.run(_send(address, list(fuzz.requests(200, 1, TOKEN))))  # what only the first ones cost
    before = _held(driver)
    found = asyncio.run(_send(address, list(fuzz.requests(REQUESTS, 0, TOKEN))))
    assert len(found) == REQUESTS
    bad = [(w, s, t) for w, s, t in found if s >= 500 or "Traceback" in t or 'File "' in t]
    assert not bad, bad[:3]
    for wrong, status, text in found:
        if not wrong.token and wrong.path not in OPEN_PATHS:
            assert status == 401, (wrong, status)
        elif status >= 400 and wrong.method != "HEAD" and text.startswith("{"):
            assert {"message", "type", "param", "code"} == set(json.loads(text)["error"]), (wrong, text)
    counts = Counter(status for _, status, _ in found)
    assert counts[400] > REQUESTS / 3 and counts[401] > REQUESTS / 10 and counts[200] > 100, counts
    after = _held(driver)
    assert after["memory"] < 1.15 * before["memory"] and after["files"] < before["files"] + 30, (
        before,
        after,
    )


def test_schemathesis_finds_no_fault(server: tuple[str, Driver], tmp_path: Path) -> None:
    address, _ = server
    pytest.importorskip("schemathesis")
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    words = f"run {address}/openapi.json --checks {checks} --max-examples 25 --seed 1 --request-timeout 60 --no-color"
    header = f"Authorization: Bearer {TOKEN}"
    done = subprocess.run(
        # What changes the server's constitution is left to its own tests.
        [f"{BIN}/schemathesis", *words.split(), "--header", header, "--exclude-method", "PUT"],
        capture_output=True,
        text=True,
        timeout=400,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_a_killed_replica_fails_no_request_that_it_had_not_begun(server: tuple[str, Driver]) -> None:
    address, driver = server
    found: Counter[Any] = Counter()
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            status, last = _stream(address, 40)
            found[(status, last)] += 1

    clients = [threading.Thread(target=load) for _ in range(6)]
    for client in clients:
        client.start()
    try:
        _wait(lambda: found[(200, "done")] > 30)
        victim = _replicas(driver)[0]
        victim.kill()
        _wait(lambda: len(_replicas(driver)) == 2 and victim not in _replicas(driver), 200)
        answered = found[(200, "done")]
        _wait(lambda: found[(200, "done")] > answered + 30)
    finally:
        stop.set()
        for client in clients:
            client.join()
    # A stream that had begun there is cut, with an event that says so.
    assert set(found) <= {(200, "done"), (200, "stream_interrupted")}, found
    assert found[(200, "stream_interrupted")] <= 6


def test_what_has_begun_is_ended_before_the_server_ends(server: tuple[str, Driver]) -> None:
    address, driver = server
    found: list[tuple[int, str]] = []
    begun = [threading.Event() for _ in range(6)]
    clients = [threading.Thread(target=lambda b=b: found.append(_stream(address, 150, 16, b))) for b in begun]
    for client in clients:
        client.start()
    assert all(b.wait(60) for b in begun) and not found
    driver.process.send_signal(signal.SIGTERM)
    for client in clients:
        client.join()
    assert driver.process.wait(120) == 0, driver.said()[-3000:]
    assert found == [(200, "done")] * 6
    assert driver.leftovers() == []


def _stream(address: str, tokens: int, n: int = 1, begun: threading.Event | None = None) -> tuple[int, str]:
    """Status and how the stream ended: `done`, the code of an error, or `cut`."""
    body = {"model": "rl", "prompt": "how do i", "max_tokens": tokens, "n": n, "stream": True}
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/v1/completions", json.dumps(body).encode(), headers)
    last, status = "", 0
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            status = answer.status
            for line in answer:
                if begun:
                    begun.set()
                last = line.decode().strip() or last
    except urllib.error.HTTPError as e:
        return e.code, e.read().decode()[:200]
    except OSError as e:
        return status, repr(e)
    if last == "data: [DONE]":
        return status, "done"
    event = json.loads(last.removeprefix("data: ") or "{}")
    return status, event.get("error", {}).get("code", "cut")


async def _send(address: str, wrongs: list[fuzz.Wrong]) -> list[tuple[fuzz.Wrong, int, str]]:
    import aiohttp
    from yarl import URL

    found, left = [], iter(wrongs)
    timeout = aiohttp.ClientTimeout(total=60)  # nothing may hang
    async with aiohttp.ClientSession(timeout=timeout, skip_auto_headers={"Content-Type"}) as session:

        async def client() -> None:
            for wrong in left:
                url = URL(address + wrong.path, encoded=True)
                async with session.request(
                    wrong.method, url, data=wrong.body, headers=wrong.headers
                ) as answer:
                    found.append((wrong, answer.status, (await answer.read()).decode(errors="replace")))

        await asyncio.gather(*(client() for _ in range(16)))
    return found


def _held(driver: Driver) -> dict[str, int]:
    """Memory and open files of the ingress and the proxy."""
    held = {"memory": 0, "files": 0}
    for process in psutil.Process(driver.process.pid).children(recursive=True):
        with suppress(psutil.Error):
            if any(part in "".join(process.cmdline()) for part in ("cai-ray:ingress", "ProxyActor")):
                held["memory"] += process.memory_full_info().uss
                held["files"] += process.num_fds()
    assert held["memory"]
    return held


def _replicas(driver: Driver) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(driver.process.pid).children(recursive=True):
        with suppress(psutil.Error):
            if "ServeReplica:cai-ray:policy-rl" in "".join(process.cmdline()):
                found.append(process)
    return found


def _wait(until: Any, seconds: float = 60) -> None:
    deadline = time.time() + seconds
    while not until():
        assert time.time() < deadline
        time.sleep(0.2)
