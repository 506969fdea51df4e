"""An object in a process of its own: what becomes of errors, crashes and hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from cai_ray.config.engine import EngineConfig
from cai_ray.train.families import examine as examining
from cai_ray.train.families.examine import Case, examine
from cai_ray.train.families.process import Remote, StepError

HERE = "tests.unit.train.families.test_process"


class Fragile:
    """Does what a model may do."""

    def __init__(self, how: str = "") -> None:
        if how == "refuse":
            raise ValueError("no such\nmodel")
        if how == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)

    def add(self, a: int, b: int) -> int:
        return a + b

    def variable(self, name: str) -> str | None:
        return os.environ.get(name)

    def fail(self) -> None:
        raise KeyError("lm_head")

    def crash(self) -> None:
        print("the last words", flush=True)
        os._exit(7)

    def hang(self) -> None:
        time.sleep(60)

    def child(self) -> int:
        return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]).pid


class FragileSteps:
    """Steps of which one fails, one crashes and one hangs."""

    def __init__(self, case: Case) -> None:
        if case.folder == "unreadable":
            raise ValueError("no tokenizer")

    def run(self, step: str) -> None:
        if step == "rm":
            raise ValueError("no such class")
        if step in ("dpo", "engine"):
            os._exit(3)
        if step == "sft_lora":
            time.sleep(60)


@pytest.fixture
def remote() -> Iterator[Remote]:
    made = Remote(f"{HERE}:Fragile", (), 20, {"CAI_RAY_TEST": "given"})
    yield made
    made.close()


def test_errors_are_one_line_and_not_the_end(remote: Remote) -> None:
    assert remote.call("add", 1, 2) == 3
    with pytest.raises(StepError, match=r"^KeyError: 'lm_head'$"):
        remote.call("fail")
    assert remote.usable and remote.call("variable", "CAI_RAY_TEST") == "given"


def test_a_crash_says_how_it_ended(remote: Remote) -> None:
    with pytest.raises(StepError, match=r"its process ended with exit code 7 \(the last words\)"):
        remote.call("crash")
    assert not remote.usable
    with pytest.raises(StepError, match="its process ended"):
        remote.call("add", 1, 2)


def test_a_hang_ends_and_leaves_nothing_behind() -> None:
    remote = Remote(f"{HERE}:Fragile", (), 20)
    child = remote.call("child")
    remote._timeout = 0.2
    with pytest.raises(StepError, match="hang: no answer within 0 s"):
        remote.call("hang")
    assert not remote.usable
    remote.close()
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(
    ("how", "message"), [("refuse", "ValueError: no such model"), ("crash", "exit code -11")]
)
def test_a_start_that_fails_says_why(how: str, message: str) -> None:
    with pytest.raises(StepError, match=message):
        Remote(f"{HERE}:Fragile", (how,), 20)


def test_all_steps_are_tried_whatever_becomes_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examining, "STEPS_FACTORY", f"{HERE}:FragileSteps")
    monkeypatch.setattr(examining, "STEP_TIMEOUT_S", 10.0)
    said: list[str] = []
    case = Case("folder", EngineConfig(device="cpu"), "float32")
    found = examine(
        case, ["engine", "sft", "rm", "dpo", "sft_lora", "ppo"], lambda step, why: said.append(step)
    )
    assert said == list(found)
    assert found["sft"] is None and found["rm"] == "ValueError: no such class"
    assert found["dpo"] == "its process ended with exit code 3"
    assert found["sft_lora"] == "run: no answer within 10 s"
    assert found["ppo"] == f"the engine does not work: {found['engine']}"
    unreadable = examine(case._replace(folder="unreadable"), ["sft", "rm"])
    assert unreadable == dict.fromkeys(["sft", "rm"], "ValueError: no tokenizer")
