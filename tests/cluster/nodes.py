"""Clusters of this machine: several nodes, each with a raylet of its own, as `ray start` makes them."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.e2e.command import BIN, SMALL, environment, free_port

# A stage that several nodes have work with.
ROWS = {**SMALL, "revise.limit": 256, "engine.max_num_seqs": 16}

# The fake provider of Ray's autoscaler calls its nodes so, and its head.
_FAKE_HEAD = "f" * 51 + "00000"
_PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"


class Cluster:
    """A head and what is added to it. Ended by its own processes, no other's: `ray stop` would end every cluster here.

    Args:
        head: the head's resources, as words of `ray start`.
        pools: kinds of nodes that an autoscaler adds and removes: their resources, and how many at most.
    """

    def __init__(self, head: str, pools: dict[str, tuple[dict[str, int], int]] | None = None):
        # The name of a socket may have 107 bytes, so the folder is not pytest's.
        self.folder = tempfile.mkdtemp(prefix="ray")
        # Ray asks for a token unless told otherwise; nodes, drivers and clients have the same one.
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        patience = {"RAY_raylet_start_wait_time_s": "300"}  # of `ray start`, on a machine with other work
        self.env = environment(PATH=f"{BIN}{os.pathsep}{os.environ['PATH']}", **token, **patience)
        self.address = f"127.0.0.1:{free_port()}"
        self.dashboard = f"http://127.0.0.1:{free_port()}"
        self.nodes: list[subprocess.Popen[bytes]] = []
        self.config = os.path.join(self.folder, "autoscaling.yaml")
        more = {}
        words = f"""--head --port {self.address.split(":")[1]} {head} --temp-dir {self.folder}
            --ray-client-server-port {free_port()} --dashboard-host 127.0.0.1
            --dashboard-port {self.dashboard.rsplit(":")[-1]}"""
        if pools is not None:
            self._write(pools)
            words += f" --autoscaling-config {self.config}"
            more = {
                "RAY_enable_autoscaler_v2": "1",
                "AUTOSCALER_UPDATE_INTERVAL_S": "1",
                "RAY_FAKE_CLUSTER": "1",
            }
            more |= dict.fromkeys(("RAY_CLOUD_INSTANCE_ID", "RAY_OVERRIDE_NODE_ID_FOR_TESTING"), _FAKE_HEAD)
        self.add(words, **more)

    def add(self, words: str, **more: str) -> subprocess.Popen[bytes]:
        command = f"""{BIN}/ray start --block --disable-usage-stats --node-ip-address 127.0.0.1
            --dashboard-agent-listen-port {free_port()} --object-store-memory 100000000 {words}"""
        with open(os.path.join(self.folder, f"node-{len(self.nodes)}.log"), "wb") as log:
            node = subprocess.Popen(
                command.split(),
                env={**self.env, **more},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.nodes.append(node)
        return node

    def add_worker(self, cpus: int = 8) -> subprocess.Popen[bytes]:
        """Waits until it is there: two that join one machine at the same moment get in each other's way."""
        # Its own folder, as on a machine of its own: nodes that share one unpack a job's files there at the same time.
        folder = f"{self.folder}-{len(self.nodes)}"
        node = self.add(f"--address {self.address} --num-cpus {cpus} --temp-dir {folder}")
        wait_until(self.started, self.said)
        return node

    def started(self) -> bool:
        """Whether the node that was added last is there."""
        assert self.nodes[-1].poll() is None, self.said()
        log = Path(self.folder) / f"node-{len(self.nodes) - 1}.log"
        return "Ray runtime started" in log.read_text(errors="replace")

    def ids(self) -> list[str]:
        """Of the nodes that are alive."""
        script = f"""import ray; ray.init('{self.address}', logging_level='ERROR', log_to_driver=False)
print(*(n['NodeID'] for n in ray.nodes() if n['Alive']))"""
        done = subprocess.run([sys.executable, "-c", script], env=self.env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr + self.said()
        return done.stdout.split()

    def drain(self, node: str, seconds: int) -> None:
        """As a spot market does: a notice, with the time that is left."""
        reason = "--reason DRAIN_NODE_REASON_PREEMPTION --reason-message test"
        words = f"{BIN}/ray drain-node --address {self.address} --node-id {node} {reason}"
        subprocess.run(
            [*words.split(), "--deadline-remaining-seconds", str(seconds)],
            env=self.env,
            check=True,
            capture_output=True,
        )

    def kill(self, node: subprocess.Popen[bytes]) -> None:
        """As when the machine is gone: raylet and all that it started, at once."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        node.wait()

    def log(self, name: str) -> str:
        return (Path(self.folder) / "session_latest/logs" / name).read_text(errors="replace")

    def said(self) -> str:
        logs = [
            *Path(self.folder).glob("node-*.log"),
            *Path(self.folder).glob("session_latest/logs/monitor*"),
        ]
        return "\n".join(f"== {log.name}\n{log.read_text(errors='replace')[-2000:]}" for log in logs)

    def _write(self, pools: dict[str, tuple[dict[str, int], int]]) -> None:
        kinds: dict[str, Any] = {
            name: {"resources": resources, "max_workers": most, "min_workers": 0, "node_config": {}}
            for name, (resources, most) in pools.items()
        }
        kinds["ray.head.default"] = {"resources": {"CPU": 0}, "max_workers": 0, "node_config": {}}
        commands = (
            "setup",
            "head_setup",
            "worker_setup",
            "initialization",
            "head_start_ray",
            "worker_start_ray",
        )
        config = {
            "cluster_name": "fake",
            "max_workers": sum(most for _, most in pools.values()),
            "idle_timeout_minutes": 0.2,
            # By its class: the defaults of `type: fake_multinode` are not in Ray's wheel.
            "provider": {
                "type": "external",
                "module": _PROVIDER,
                "gcs_address": self.address,
                "head_node_id": _FAKE_HEAD,
                "launch_multiple": True,
                "disable_node_updaters": True,
                "worker_rpc_drain": True,
            },
            "auth": {},
            "file_mounts": {},
            "cluster_synced_files": [],
            "head_node_type": "ray.head.default",
            "available_node_types": kinds,
            **{f"{name}_commands": [] for name in commands},
        }
        Path(self.config).write_text(yaml.safe_dump(config))

    def end(self) -> None:
        for node in reversed(self.nodes):
            if node.poll() is None:
                self.kill(node)
        for folder in (self.folder, *(f"{self.folder}-{n}" for n in range(len(self.nodes)))):
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def running(
    head: str, workers: int = 0, cpus: int = 8, pools: dict[str, tuple[dict[str, int], int]] | None = None
) -> Iterator[Cluster]:
    """A cluster whose nodes are there."""
    made = Cluster(head, pools)
    try:
        wait_until(made.started, made.said)
        for _ in range(workers):
            made.add_worker(cpus)
        yield made
    finally:
        made.end()


def wait_until(there: Callable[[], bool], said: Callable[[], str], seconds: float = 300) -> None:
    deadline = time.time() + seconds
    while not there():
        assert time.time() < deadline, said()[-6000:]
        time.sleep(0.2)


def by_id(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """All but what depends on what the engine's cache held."""
    return {row["id"]: {k: v for k, v in row.items() if k != "usage"} for row in rows}
