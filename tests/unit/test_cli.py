"""The command line: help at once, one line for bad input, exit codes."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from cai_ray.cli import STAGE_HELP, main
from cai_ray.stages import STAGES


def cai_ray(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cai_ray", *args], capture_output=True, text=True, timeout=120
    )


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from cai_ray.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('ray', 'torch', 'vllm', 'transformers', 'pyarrow', 'pydantic') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert out.stdout.splitlines()[-1] == "[]"


def test_the_commands_are_the_stages() -> None:
    assert list(STAGE_HELP) == list(STAGES)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["run", "nowhere.yaml"], "no such file"),
        (["run", "errand-town", "--set", "ppo.kl_cof=1"], "did you mean 'kl_coef'"),
        (["run", "errand-town", "--set", "ppo"], "write it as key=value"),
        (["revise", "errand-town", "--set", "revise.rounds=0"], "revise.rounds"),
        (["run", "errand-town", "--set", "sft.workers=5"], "not divisible by 5 workers; use 45 or 50"),
        (["status", "/nowhere"], "no run here"),
        (["town", "check", "--model", "/nowhere"], "no such folder"),
        (["status", ""], "the run directory is empty"),
        (["status", "/" + "a" * 300], "File name too long"),
        (["run", "errand-town", "--out", ""], "out: is empty"),
        (["run", "errand-town", "--out", "runs/{name}/{0}"], "out runs/{name}/{0}: only {name} may"),
        (["demo", "--out", ""], "--out is empty"),
        (["demo", "--set", "seed=5"], "use --seeds N"),
        (["demo", "--set", "out=foo"], "use --out DIR"),
    ],
)
def test_item_38_bad_input_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], args: list[str], says: str
) -> None:
    assert main(args) == 2
    err = capsys.readouterr().err
    assert says in err and err.startswith("cai-ray: ") and err.count("\n") == 1


def test_a_constitution_without_a_needed_field(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "name: x\nprinciples:\n  - {id: kind, title: t, text: t, critique_request: c, comparison: c}\n"
    )
    assert main(["run", "errand-town", "--set", f"constitution={path}", "--out", str(tmp_path / "o")]) == 2
    err = capsys.readouterr().err
    assert "revision_request" in err and "(principle 'kind')" in err


def test_an_unknown_command_ends_with_2() -> None:
    done = cai_ray("fly")
    assert done.returncode == 2 and "invalid choice" in done.stderr


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "required: COMMAND; see `cai-ray --help`"),
        (["fly"], "invalid choice: 'fly'"),
        (["status"], "required: run; see `cai-ray status --help`"),
        (["town", "build"], "required: --out; see `cai-ray town build --help`"),
        (["demo", "--seeds", "x"], "--seeds: 'x' must be a whole number of at least 1"),
        (["demo", "--seeds", "0"], "--seeds: '0' must be a whole number of at least 1"),
        *(
            (["serve", "run", "--port", p], f"--port: '{p}' must be a port from 1 to 65535")
            for p in ("0", "-1", "65536", "http", "")
        ),
        (["serve", "run", "--host", ""], "--host: is empty; 127.0.0.1 is this machine alone"),
    ],
)
def test_what_argparse_refuses_is_one_line_too(
    capsys: pytest.CaptureFixture[str], args: list[str], says: str
) -> None:
    with pytest.raises(SystemExit) as done:
        main(args)
    err = capsys.readouterr().err
    assert done.value.code == 2
    assert says in err and err.startswith("cai-ray: ") and err.count("\n") == 1 and err.endswith("--help`\n")


def test_a_full_disk_is_one_line_wherever_it_was_met(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ray wraps what a task or a training worker met."""
    from ray.exceptions import RayTaskError
    from ray.train import WorkerGroupError

    full = OSError(errno.ENOSPC, "Error writing bytes to file")
    task = RayTaskError("write", "Traceback …", full)
    for met in (full, task.as_instanceof_cause(), WorkerGroupError("failed", {1: task})):

        def fails(*_: object, met: Exception = met) -> None:
            raise met

        monkeypatch.setattr("cai_ray.storage.run.open_run", fails)
        assert main(["status", "anywhere"]) == 2
        said = capsys.readouterr().err
        assert "No space left on device" in said
        assert len(said.splitlines()) == 1
