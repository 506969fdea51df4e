"""`ray job`, as docs/clusters.md says, and the settings of what is submitted."""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Callable, Iterator

import psutil

from tests.cluster.nodes import Cluster, wait_until
from tests.e2e.command import BIN, ROOT, SMALL

# Small blocks are written often, and checkpoints too, so that a stop finds work done. The rest is as short as it gets.
SETTINGS = {
    **SMALL,
    "engine.max_num_seqs": 16,
    "sft.epochs": 6,
    "sft.checkpoint_every": 4,
    "compare.limit": 16,
    "label.gold_limit": 8,
    "rm.human": '[{path: "town:human", limit: 32}]',
    "ppo.steps": 1,
    "evaluate.limit": 8,
}


class Jobs:
    """`ray job`, with the runtime environment that docs/clusters.md names."""

    def __init__(self, cluster: Cluster):
        self.cluster = cluster
        self.env = {**cluster.env, "RAY_API_SERVER_ADDRESS": cluster.dashboard}

    def __call__(self, *words: object, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [f"{BIN}/ray", "job", *map(str, words)],
            cwd=ROOT,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def submit(self, *entrypoint: object, options: tuple[str, ...] = (), fails: bool = False) -> str:
        """Waits for the job's end, unless told not to; what it said."""
        brought = ("--runtime-env", "jobs/runtime-env.yaml", "--working-dir", ".")
        done = self("submit", *brought, *options, "--", *entrypoint)
        assert bool(done.returncode) == fails, done.stdout + done.stderr
        return done.stdout + done.stderr

    def stop_when(self, there: Callable[[], bool], *entrypoint: object) -> None:
        said = self.submit(*entrypoint, options=("--no-wait",))
        name = re.search(r"ray job stop (\w+)", said)
        assert name is not None, said
        wait_until(there, lambda: self("logs", name[1]).stdout)
        # Its workers hold still until it is stopped: however fast the machine, that is in the middle.
        with frozen(self.cluster.nodes[1].pid, "ray::MapWorker", "ray::RayTrainWorker"):
            assert "RUNNING" in self.status(name[1]).upper()
            assert self("stop", name[1]).returncode == 0
        assert "was stopped" in self.status(name[1]), self("logs", name[1]).stdout

    def status(self, name: str) -> str:
        done = self("status", name)
        return done.stdout + done.stderr


@contextlib.contextmanager
def frozen(parent: int, *names: str) -> Iterator[None]:
    found = [
        p for p in psutil.Process(parent).children(recursive=True) if " ".join(p.cmdline()).startswith(names)
    ]
    assert found
    for process in found:
        process.suspend()
    yield
    for process in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.resume()
