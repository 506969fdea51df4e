"""Peak memory of a command, all its processes counted.

It is the sum of PSS (proportional set size: shared pages are divided among those who share them) over the command's
processes, sampled each second. Ray starts daemons that leave the process tree and its workers overwrite their
environment (setproctitle), so a process belongs to the command if its environment holds this benchmark's mark, or if
its parent or an earlier sample says so.
"""

from __future__ import annotations

import os
import subprocess
import time
import uuid
from pathlib import Path

MARK = "CAI_RAY_BENCHMARK"


def measure(command: list[str], stdout: int) -> tuple[int, Watch]:
    """Runs a command to its end and samples its memory each second."""
    mark = uuid.uuid4().hex
    watch = Watch(f"{MARK}={mark}".encode())
    process = subprocess.Popen(command, stdout=stdout, env={**os.environ, MARK: mark})
    while process.poll() is None:
        began = time.monotonic()
        watch.sample()
        try:
            process.wait(max(0.05, 1 - (time.monotonic() - began)))
        except subprocess.TimeoutExpired:
            continue
    return process.returncode, watch


class Watch:
    """The processes of one marked command, and their largest total memory so far."""

    def __init__(self, mark: bytes):
        self.mark = mark
        self.ours: set[tuple[int, str]] = set()
        self.peak: tuple[int, list[tuple[str, int]]] = (0, [])
        self.load = os.getloadavg()[0]

    def sample(self) -> None:
        sizes: dict[str, int] = {}
        for pid in self._members():
            if size := _pss(pid):
                name = _name(pid)
                sizes[name] = sizes.get(name, 0) + size
        total = sum(sizes.values())
        if total > self.peak[0]:
            self.peak = (total, sorted(sizes.items(), key=lambda item: -item[1]))

    def _members(self) -> list[int]:
        """Process ids by mark, by an earlier sample, and by descent from either."""
        parents: dict[int, int] = {}
        started: dict[int, str] = {}
        for entry in os.listdir("/proc"):
            if entry.isdigit() and (stat := _stat(int(entry))):
                parents[int(entry)], started[int(entry)] = stat
        member = {
            pid: (pid, started[pid]) in self.ours or self.mark in _read(f"/proc/{pid}/environ").split(b"\0")
            for pid in parents
        }
        for pid in parents:
            line = []
            while pid in parents and not member[pid]:
                line.append(pid)
                pid = parents[pid]
            if member.get(pid):
                member.update(dict.fromkeys(line, True))
        found = [pid for pid, ours in member.items() if ours]
        self.ours |= {(pid, started[pid]) for pid in found}
        return found


def _stat(pid: int) -> tuple[int, str] | None:
    """Parent and start time of a process; the start time tells a reused id from the old one."""
    fields = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    return (int(fields[1]), fields[19].decode()) if len(fields) > 19 else None


def _pss(pid: int) -> int:
    for line in _read(f"/proc/{pid}/smaps_rollup").splitlines():
        if line.startswith(b"Pss:"):
            return int(line.split()[1]) << 10
    return 0


def _name(pid: int) -> str:
    words = _read(f"/proc/{pid}/cmdline").replace(b"\0", b" ").decode(errors="replace").split()
    if words and words[0].startswith("ray::"):
        return words[0]
    return _read(f"/proc/{pid}/comm").decode(errors="replace").strip() or "?"


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:  # it has ended, or is another user's
        return b""
