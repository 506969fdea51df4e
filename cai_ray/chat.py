"""`cai-ray chat RUN`: talk to a run's policy in the terminal."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterator

from cai_ray.cluster.connect import prepare_engine, uses_gpu, worker_env
from cai_ray.data.formats import clean
from cai_ray.engine.make import make_engine
from cai_ray.engine.protocol import Engine, Sampling
from cai_ray.errors import InputError, RowError
from cai_ray.prompts.load import load_templates
from cai_ray.report.roles import title_of
from cai_ray.report.text import visible
from cai_ray.stages import Policy, maker_of
from cai_ray.storage.records import derive_seed
from cai_ray.storage.run import Run


def run(run: Run, which: Policy) -> int:
    """Answers lines of stdin until it ends or is interrupted, and returns the exit code.

    Raises:
        InputError: the policy is not trained yet, or cannot be loaded.
    """
    if (stage := maker_of(which, run.config.method)) and run.manifest(stage) is None:
        raise InputError(
            f"{run.root}: the {title_of(which)} policy is not trained yet; choose another with --model"
        )
    # An engine's warnings would stand between questions and answers.
    for key, value in {**worker_env(run.config), "VLLM_LOGGING_LEVEL": "ERROR"}.items():
        os.environ.setdefault(key, value)
    model, gpu = run.resolve_model(which), uses_gpu(run.config)
    prepare_engine(model.engine, gpu)
    engine = make_engine(model, gpu)
    try:
        talk(engine, run, which)
    except KeyboardInterrupt:
        print(file=sys.stderr)
    finally:
        asyncio.run(engine.close())
    return 0


def talk(engine: Engine, run: Run, which: str) -> None:
    """Prints an answer to each line. A terminal holds one conversation; from a pipe, each line begins its own."""
    config, terminal = run.config, sys.stdin.isatty()
    has_history = terminal and config.model != "town"  # the embedded world has no second turns
    templates = load_templates(config.templates)
    if terminal:
        print(
            f"{title_of(which)} of {config.name}. Ctrl-D ends{'; /new starts over' if has_history else ''}.",
            file=sys.stderr,
        )
    history: list[dict[str, str]] = []
    # The event loop does not run while a line is typed: no request is in flight then, and Ctrl-C ends the chat at once.
    with asyncio.Runner() as runner:
        for number, line in enumerate(_lines(terminal)):
            if line == "/new" or not has_history:
                history = []
            if line == "/new":
                continue
            history.append({"role": "user", "content": line})
            sampling = Sampling(
                config.evaluate.temperature,
                config.evaluate.max_tokens,
                derive_seed(config.seed, "chat", number),
            )
            try:
                answer = runner.run(engine.chat(templates.answer_messages(history), sampling)).text  # type: ignore[arg-type]
            except RowError as e:
                print(f"({e}; the conversation starts over)", file=sys.stderr)
                history, answer = [], ""
            history.append({"role": "assistant", "content": answer})
            print(visible(answer) if terminal else " ".join(visible(answer).split()), flush=True)


def _lines(terminal: bool) -> Iterator[str]:
    """Lines until the input ends. Empty lines count only in a pipe, where the n-th answer belongs to the n-th line."""
    if terminal:
        import readline  # noqa: F401  gives input() its line editing
    while True:
        if terminal:
            try:
                line = input("> ")
            except EOFError:
                print()
                return
        elif not (line := sys.stdin.readline()):
            return
        if (text := clean(line.strip())) or not terminal:
            yield text
