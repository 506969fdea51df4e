"""The command line: help at once, one line for bad input, exit codes, and what is drawn on a terminal."""

import errno
import io
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.main import get_command

from cai_ray.cli import main
from cai_ray.cli.app import app
from cai_ray.cli.studies import AblateCommand
from cai_ray.stages import STAGES

COLOUR = re.compile(r"\x1b\[(3[0-7]|9[0-7]|38)[;m]")


def cai_ray(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cai_ray", *args], capture_output=True, text=True, timeout=120
    )


def on_a_terminal(code: str, **environment: str) -> tuple[str, str]:
    """What a program writes to a terminal on stderr, and to a pipe on stdout."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "120", **environment},
        text=True,
    )
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 65536):
            shown += part
    except OSError:  # the other end is closed
        pass
    assert process.stdout is not None
    out = process.stdout.read()
    assert process.wait(60) == 0, shown.decode()
    os.close(ours)
    return shown.decode(), out


def commands() -> list[list[str]]:
    """The words of every command, groups included."""
    found: list[list[str]] = [[]]
    for name, command in get_command(app).commands.items():
        found.append([name])
        found += [[name, action] for action in getattr(command, "commands", {})]
    return found


def test_help_imports_nothing_heavy() -> None:
    heavy = ("ray", "torch", "vllm", "transformers", "pyarrow", "pydantic", "rich")
    code = (
        "import sys; from cai_ray.cli import main\n"
        "assert main(['--help']) == 0\n"
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert out.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("command", commands(), ids=lambda words: " ".join(words) or "cai-ray")
def test_every_command_has_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--help"]) == 0
    out, err = capsys.readouterr()
    usage, _, rest = out.partition("\n\n")
    assert usage.startswith(" ".join(["Usage: cai-ray", *command])) and not err
    assert re.match(r"  \w", rest), "the help says what the command does"
    assert "..." not in rest, "no help is cut off"


NEED_NOTHING = ("demo", "town check", "constitution schema", "config schema", "config docs", "config models")


@pytest.mark.parametrize("command", commands(), ids=lambda words: " ".join(words) or "cai-ray")
def test_every_command_says_in_one_line_what_it_lacks(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    if " ".join(command) in NEED_NOTHING:
        return
    assert main(command) == 2
    assert re.fullmatch(r"cai-ray: .+\n", capsys.readouterr().err)


def test_the_commands_are_the_stages(capsys: pytest.CaptureFixture[str]) -> None:
    assert [words[0] for words in commands() if words and words[0] in STAGES] == list(STAGES)
    for name, stage in STAGES.items():
        assert main([name, "--help"]) == 0
        assert stage.help in " ".join(capsys.readouterr().out.split())


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("cai-ray 0.")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["run", "nowhere.yaml"], "no such file"),
        (["run", "errand-town", "--set", "ppo.kl_cof=1"], "did you mean 'kl_coef'"),
        (["run", "errand-town", "--set", "ppo"], "write it as key=value"),
        (["revise", "errand-town", "--set", "revise.rounds=0"], "revise.rounds"),
        (["run", "errand-town", "--set", "sft.workers=5"], "not divisible by 5 workers; use 45 or 50"),
        (["run", "errand-town", "--keep", "rm,rn"], "--keep: 'rn' is not a stage; use one of revise, sft,"),
        (["run", "errand-town", "--until", "dpo"], "--until dpo is not a stage of method=ppo; use one of"),
        (["status", "/nowhere"], "no run here"),
        (["town", "check", "--model", "/nowhere"], "no such folder"),
        (["status", ""], "the run directory is empty"),
        (["status", "/" + "a" * 300], "File name too long"),
        (["run", "errand-town", "--out", ""], "out: is empty"),
        (["run", "errand-town", "--out", "runs/{name}/{0}"], "out runs/{name}/{0}: only {name} may"),
        (["demo", "--out", ""], "--out is empty"),
        (["demo", "--set", "seed=5"], "use --seeds N"),
        (["demo", "--set", "out=foo"], "use --out DIR"),
        (["serve", "--no-auth"], "serve: give a run's directory"),
        (["serve", "run", "--add-token", "me"], "name the file for its hash with --token-file"),
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
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == "cai-ray: no such command 'fly'; see `cai-ray --help`\n"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "missing command; see `cai-ray --help`"),
        (["fly"], "no such command 'fly'; see `cai-ray --help`"),
        (["revize"], "no such command 'revize' (did you mean 'revise'?); see `cai-ray --help`"),
        (["town"], "missing command; see `cai-ray town --help`"),
        (["town", "biuld"], "'biuld' (did you mean 'build'?); see `cai-ray town --help`"),
        (["--quiet"], "no such option --quiet; see `cai-ray --help`"),
        (["demo", "--sed", "3"], "--sed (did you mean --seeds or --set?); see `cai-ray demo --help`"),
        (["status"], "missing argument RUN; see `cai-ray status --help`"),
        (["status", "a", "b"], "unexpected extra argument(s) (b); see `cai-ray status --help`"),
        (["town", "build"], "missing option --out; see `cai-ray town build --help`"),
        (["town", "build", "--out"], "'--out' requires an argument; see `cai-ray town build --help`"),
        (["run", "errand-town", "--until", "rn"], "--until: 'rn' is not a stage; use one of revise, sft,"),
        (["chat", "run", "--model", "x"], "--model: 'x' is not one of 'base', 'sl', 'rl'; see"),
        (["ablate", "errand-town"], "missing option --without; see `cai-ray ablate --help`"),
        (["run", "errand-town", "--estimate", "0"], "--estimate: '0' must be a whole number of at least 1"),
        (["demo", "--seeds", "x"], "--seeds: 'x' must be a whole number of at least 1"),
        (["demo", "--seeds", "0"], "--seeds: '0' must be a whole number of at least 1"),
        *(
            (["serve", "run", "--port", p], f"--port: '{p}' must be a port from 1 to 65535")
            for p in ("0", "-1", "65536", "http", "")
        ),
        (["serve", "run", "--host", ""], "--host: is empty; 127.0.0.1 is this machine alone"),
    ],
)
def test_a_wrong_command_option_or_argument_is_one_line_too(
    capsys: pytest.CaptureFixture[str], args: list[str], says: str
) -> None:
    assert main(args) == 2
    out, err = capsys.readouterr()
    assert says in err and err.startswith("cai-ray: ") and err.count("\n") == 1 and err.endswith("--help`\n")
    assert not out


@pytest.mark.parametrize(
    ("words", "prompts"),
    [(["--estimate"], 32), (["--estimate", "8"], 8), (["--estimate=8"], 8), (["--estimate", "--json"], 32)],
)
def test_an_estimate_may_stand_without_a_number(
    monkeypatch: pytest.MonkeyPatch, words: list[str], prompts: int
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr("cai_ray.cli.run.print_estimate", lambda *arguments: calls.append(arguments))
    assert main(["revise", "errand-town", *words]) == 0
    assert [(names, n, as_json) for _, names, n, as_json in calls] == [
        (["revise"], prompts, "--json" in words)
    ]


def test_several_principles_may_follow_one_option() -> None:
    lists: list[list[str]] = []
    words = typer.Typer()

    @words.command(cls=AblateCommand)
    def command(config: str, without: list[str] = typer.Option(...), seeds: int = 1) -> None:
        lists.append([config, *without, str(seeds)])

    for line in ("c --without a b --seeds 2", "--without a --without b --seeds 2 c", "c --without=a"):
        words(line.split(), standalone_mode=False)
    assert lists == [["c", "a", "b", "2"], ["c", "a", "b", "2"], ["c", "a", "1"]]


def test_an_interrupted_command_can_be_repeated(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cai_ray.storage.run.open_run", interrupt)
    assert main(["status", "anywhere"]) == 130
    assert capsys.readouterr().err == "cai-ray: interrupted; the same command goes on from here\n"


def test_our_own_faults_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("cai_ray.storage.run.open_run", fail)
    with pytest.raises(ZeroDivisionError, match="ours"):
        main(["status", "anywhere"])


def test_a_reader_that_stops_reading_is_no_failure() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "cai_ray", "--help"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writer)
    assert done.returncode == 0 and not done.stderr


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


def test_the_settings_are_described_for_editors_and_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "schema"]) == 0
    assert json.loads(capsys.readouterr().out)["properties"]["ppo"]
    assert main(["config", "docs"]) == 0
    assert "kl_coef" in capsys.readouterr().out


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_table_is_drawn_on_a_terminal_and_plain_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from cai_ray.report.terminal import print_table

    monkeypatch.setenv("TERM", "xterm-256color")
    rows = [["", "recall"], ["[bold]kind[/]", "50 %"]]
    print_table(rows, head=True)
    assert capsys.readouterr().out == "               recall\n[bold]kind[/]  50 %\n"
    for no_colour in ("", "1"):
        monkeypatch.setenv("NO_COLOR", no_colour)
        terminal = Terminal()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", terminal)
            print_table(rows, head=True, plain="not this")
        assert "───" in terminal.getvalue() and "[bold]kind[/]" in terminal.getvalue()
        assert not (no_colour and COLOUR.search(terminal.getvalue()))
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    print_table(rows, plain="this")
    assert terminal.getvalue() == "this\n"


SHOW = """
import sys, time
from cai_ray.cluster.progress import Progress, ProgressDisplay
with ProgressDisplay(every=10) as display:
    for i in (1, 2):
        display.show(Progress("sft", i, 2, "steps", "loss 1.5", f"sft: step {i} of 2, loss 1.5"))
        time.sleep(0.6)
    display.print("warning: a [dashboard] is away")
    print("a log line", file=sys.stderr)
    print("the result")
"""


def test_progress_is_a_bar_on_a_terminal() -> None:
    shown, out = on_a_terminal(SHOW, NO_COLOR="")
    assert "━" in shown and "2/2 steps" in shown and "loss 1.5" in shown and COLOUR.search(shown)
    assert "step 1 of 2" not in shown
    assert "  warning: a [dashboard] is away\r\n" in shown and "a log line\r\n" in shown
    assert out == "the result\n"


def test_a_bar_has_no_colour_where_none_is_wanted() -> None:
    shown, _ = on_a_terminal(SHOW, NO_COLOR="1")
    assert "━" in shown and not COLOUR.search(shown)


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_plain_lines_elsewhere(terminal: bool) -> None:
    if terminal:  # one that nothing can be drawn on
        shown = on_a_terminal(SHOW, TERM="dumb")[0].replace("\r\n", "\n")
    else:
        shown = subprocess.run([sys.executable, "-c", SHOW], capture_output=True, text=True).stderr
    assert shown == "  sft: step 1 of 2, loss 1.5\n  warning: a [dashboard] is away\na log line\n"
