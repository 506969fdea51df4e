"""The command line as a user runs it: a process of its own, and what becomes of its children."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
TOKEN = "a token for the test"

# Few rows and few steps of the packaged configuration: every stage is real, and none is long.
SMALL = {
    "revise.limit": 64,
    "sft.epochs": 4,
    "compare.limit": 48,
    "label.gold_limit": 24,
    "rm.human": '[{path: "town:human", limit: 64}]',
    "rm.epochs": 1,
    "ppo.steps": 2,
    "ppo.value_warmup_steps": 1,
    "ppo.rollout_batch": 32,
    "ppo.minibatch": 16,
    "evaluate.prompts": '[{path: "town:dev"}]',  # the held split is for the final table alone
    "evaluate.limit": 24,
}


def settings(values: Mapping[str, Any]) -> list[str]:
    return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]


def environment(**more: str) -> dict[str, str]:
    """This process's, without what would join another cluster or import another checkout."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "PYTHONPATH", "CAI_RAY_TOKEN")}
    return {**kept, **more}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def cai_ray(*words: object, timeout: float = 300, **more: Any) -> subprocess.CompletedProcess[str]:
    """Runs the command to its end, whatever its exit code is."""
    return subprocess.run(
        [sys.executable, "-m", "cai_ray", *map(str, words)],
        **{
            "cwd": ROOT,
            "env": environment(),
            "capture_output": True,
            "text": True,
            "timeout": timeout,
            "stdin": subprocess.DEVNULL if "input" not in more else None,
        }
        | more,
    )


def succeed(*words: object, **more: Any) -> subprocess.CompletedProcess[str]:
    done = cai_ray(*words, **more)
    assert done.returncode == 0, done.stderr[-8000:]
    return done


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of a command whose input is at fault."""
    assert done.returncode == 2, (done.returncode, done.stderr[-4000:])
    assert "Traceback" not in done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("cai-ray: ")]
    assert len(said) == 1, done.stderr[-4000:]
    return said[0]


def ask(
    url: str, body: Any = None, headers: dict[str, str] | None = None, method: str | None = None
) -> tuple[int, Any]:
    """Plain HTTP to a server, as curl would: status and JSON."""
    if headers is None:
        headers = {"Authorization": f"Bearer {TOKEN}"}
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        url, data, {"Content-Type": "application/json", **headers}, method=method
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as e:
        return e.code, json.load(e)


class Driver:
    """A command under way, in a process group of its own, with its progress in a file."""

    def __init__(self, log: Path, *words: object, env: dict[str, str] | None = None):
        self.log = log
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cai_ray", *map(str, words)],
                cwd=ROOT,
                env=env or environment(),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.children: dict[int, psutil.Process] = {}

    def wait_for(self, text: str, timeout: float = 300) -> None:
        deadline = time.time() + timeout
        while text not in self.said():
            assert self.process.poll() is None, f"ended before {text!r}:\n{self.said()[-4000:]}"
            assert time.time() < deadline, f"no {text!r} in {timeout} s:\n{self.said()[-4000:]}"
            self._look()
            time.sleep(0.1)

    def run_for(self, seconds: float) -> None:
        deadline = time.time() + seconds
        while time.time() < deadline:
            assert self.process.poll() is None, self.said()[-4000:]
            self._look()
            time.sleep(0.1)

    def signal_group(self, number: int) -> int:
        """Signals the whole process group, as a terminal or `kill -- -PID` does; the exit code."""
        self._look()
        os.killpg(self.process.pid, number)
        return self.process.wait(60)

    def leftovers(self, patience: float = 120) -> list[str]:
        """Processes that it started, directly or not, and that still run after some patience.

        Most end at once. A worker of Ray that was about to start waits 60 s for the node that started it.
        """
        _, alive = psutil.wait_procs(self.children.values(), timeout=patience)
        return [_name(p) for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def end(self) -> None:
        """Whatever of it is left, for the end of a test that failed."""
        self._look()
        _kill([psutil.Process(self.process.pid)] if self.process.poll() is None else [])
        _kill(self.children.values())

    def _look(self) -> None:
        try:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                self.children.setdefault(child.pid, child)
        except psutil.NoSuchProcess:
            return


def _kill(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def _name(process: psutil.Process) -> str:
    try:
        return f"{process.pid} {' '.join(process.cmdline())[:120]}"
    except psutil.NoSuchProcess:
        return ""
