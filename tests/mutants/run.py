"""Puts known faults in, one by one, and shows that the test named after the item fails for each.

    python tests/mutants/run.py [-k SUBSTR] [--jobs N]

A fault is a patch beside this file; its first line names the test that must fail:

    # test: tests/unit/train/test_losses.py::test_item_12_soft_bradley_terry

The patches are applied to copies of the working tree. Each pytest is forked from a process that has imported the
large libraries, since that would take most of a unit test's time. A fault counts as killed when pytest ends with 1 and
the named test is among the failures: an import that breaks, or a test that is not found, does not count. The exit
code is 0 if every fault is killed. A test that is skipped here (no GPU) leaves its faults out, and says so.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

T = TypeVar("T")

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
HEADER = "# test: "
TIMEOUT_S = 900
LIBRARIES = [
    "pytest",
    "hypothesis",
    "numpy",
    "pyarrow",
    "pydantic",
    "torch",
    "transformers.models.llama.modeling_llama",
]
MOMENTS = itertools.count(1_000_000_000)
"""Times of change for files that a patch touches, each another: compiled modules are known by time and size alone."""


class Mutant(NamedTuple):
    patch: Path
    test: str

    @property
    def name(self) -> str:
        return self.patch.stem


class Outcome(NamedTuple):
    exit_code: int
    results: dict[str, str]
    """`passed`, `failed`, `skipped` or `error` by test, the parameters in brackets taken off."""
    reason: str


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-k", default="", metavar="SUBSTR", help="only the patches whose name contains it")
    parser.add_argument("--jobs", type=int, default=1, help="how many at once (default 1)")
    args = parser.parse_args()

    mutants = [read_mutant(p) for p in sorted(HERE.glob("*.patch")) if args.k in p.stem]
    if not mutants:
        print(f"no patch in {HERE} has {args.k!r} in its name", file=sys.stderr)
        return 2
    os.environ["OMP_NUM_THREADS"] = "1"
    multiprocessing.get_context("forkserver").set_forkserver_preload(LIBRARIES)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        trees: queue.Queue[Path] = queue.Queue()
        for i in range(max(1, args.jobs)):
            trees.put(copy_tree(Path(folder) / str(i)))
        check_import(trees.queue[0])

        def on_a_tree(function: Callable[[Path], T]) -> T:
            tree = trees.get()
            try:
                return function(tree)
            finally:
                trees.put(tree)

        def judge(mutant: Mutant) -> str:
            verdict, reason = on_a_tree(lambda tree: try_mutant(tree, mutant))
            print(f"{verdict:9} {mutant.name}  {reason}", flush=True)
            return verdict

        with ThreadPoolExecutor(max(1, args.jobs)) as pool:
            tests = sorted({m.test for m in mutants})
            print(f"{len(tests)} tests without a fault", flush=True)
            files = [list(own) for _, own in itertools.groupby(tests, lambda test: test.partition("::")[0])]
            before: dict[str, str] = {}
            for outcome in pool.map(lambda own: on_a_tree(lambda tree: run_tests(tree, own)), files):
                before |= outcome.results
                if outcome.exit_code:
                    print(outcome.reason)
            if broken := [t for t in tests if before.get(t) not in ("passed", "skipped")]:
                for test in broken:
                    print(f"NOT PASSING  {test} ({before.get(test, 'not found')})")
                return 1
            skipped = {t for t in tests if before[t] == "skipped"}
            verdicts = list(pool.map(judge, [m for m in mutants if m.test not in skipped]))
    for mutant in (m for m in mutants if m.test in skipped):
        print(f"{'left out':9} {mutant.name}  {mutant.test} is skipped on this machine")
    killed = verdicts.count("killed")
    print(f"{killed} killed, {len(verdicts) - killed} survived")
    return 0 if killed == len(verdicts) else 1


def read_mutant(patch: Path) -> Mutant:
    first = patch.read_text(encoding="utf-8").splitlines()[0]
    if not first.startswith(HEADER):
        raise SystemExit(f"{patch}: the first line must be `{HEADER}FILE::TEST`")
    return Mutant(patch, first.removeprefix(HEADER).strip())


def copy_tree(target: Path) -> Path:
    """Copies what git tracks, and what it would track, as it is in the working tree."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)
    return target


def environment(tree: Path) -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": str(tree),
        "OMP_NUM_THREADS": "1",
        # `git apply` passes over files that it takes for outside of a repository around the copy.
        "GIT_CEILING_DIRECTORIES": str(tree.parent),
    }


def check_import(tree: Path) -> None:
    """The tests must see the copy, not the package that is installed."""
    code = "import cai_ray; print(cai_ray.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tree,
        env=environment(tree),
        check=True,
        capture_output=True,
        text=True,
    )
    if not Path(done.stdout.strip()).is_relative_to(tree):
        raise SystemExit(f"the copy in {tree} is not what is imported, but {done.stdout.strip()}")


def try_mutant(tree: Path, mutant: Mutant) -> tuple[str, str]:
    applied = subprocess.run(
        ["git", "apply", "--verbose", str(mutant.patch)],
        cwd=tree,
        env=environment(tree),
        capture_output=True,
        text=True,
    )
    touched = [
        line.split("\t")[0][6:] for line in mutant.patch.read_text().splitlines() if line.startswith("+++ b/")
    ]
    changed = [f for f in touched if not (ROOT / f).exists() or differs(tree / f, ROOT / f)]
    for name in touched:
        renew(tree / name)
    try:
        if applied.returncode or not changed:
            return "NO PATCH", (applied.stderr.strip().splitlines() or ["it changes nothing"])[0]
        outcome = run_tests(tree, [mutant.test])
        if outcome.exit_code == 1 and outcome.results.get(mutant.test) == "failed":
            return "killed", outcome.reason
        return "SURVIVED", f"{mutant.test} {outcome.results.get(mutant.test, 'not run')} {outcome.reason}"
    finally:
        for name in touched:
            if (ROOT / name).exists():
                shutil.copy(ROOT / name, tree / name)
                renew(tree / name)
            else:
                (tree / name).unlink(missing_ok=True)


def renew(path: Path) -> None:
    """Has what was compiled of a file before compiled again."""
    if path.exists():
        moment = next(MOMENTS)
        os.utime(path, (moment, moment))


def differs(one: Path, other: Path) -> bool:
    return not one.exists() or one.read_bytes() != other.read_bytes()


def run_tests(tree: Path, tests: list[str]) -> Outcome:
    report = tree / "mutants-report.xml"
    report.unlink(missing_ok=True)
    options = [
        "-q",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        "-o",
        "junit_family=xunit1",
        f"--junitxml={report}",
    ]
    log = tree / "mutants-log.txt"
    process = multiprocessing.get_context("forkserver").Process(
        target=run_pytest, args=(tree, [*options, *tests], log)
    )
    process.start()
    process.join(TIMEOUT_S)
    if process.exitcode is None:
        os.killpg(process.pid or 0, signal.SIGKILL)
        return Outcome(124, {}, f"no end within {TIMEOUT_S} s")
    if not report.exists():
        return Outcome(process.exitcode, {}, log.read_text(errors="replace").strip()[-300:])
    rank = ["passed", "skipped", "error", "failed"]
    results: dict[str, str] = {}
    reason = ""
    for case in ET.parse(report).iter("testcase"):
        tags = {child.tag: child for child in case}
        result = next(
            (r for r, t in (("failed", "failure"), ("error", "error"), ("skipped", "skipped")) if t in tags),
            "passed",
        )
        test = f"{case.get('file')}::{(case.get('name') or '').partition('[')[0]}"
        results[test] = max(results.get(test, "passed"), result, key=rank.index)
        if result in ("failed", "error") and not reason:
            text = next(iter(case)).get("message") or ""
            reason = text.strip().partition("\n")[0][:120]
    return Outcome(process.exitcode, results, reason)


def run_pytest(tree: Path, words: list[str], log: Path) -> None:
    """The body of a process: pytest, as a command of its own in the copy."""
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if stream == 1 else os.O_APPEND)), stream)
    os.environ.update(environment(tree))
    os.chdir(tree)
    sys.path.insert(0, str(tree))
    import pytest

    sys.exit(int(pytest.main(words)))


if __name__ == "__main__":
    sys.exit(main())
