"""The documents: links, paths, commands, settings and examples in them are real, and their form is kept.

What a document says about the code is checked against the code itself, so that a rename shows here. Two helpers know
how the program is asked: `help_text` (the command line) and `check_configuration` (the settings).
"""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token
from pydantic import BaseModel

from benchmarks.figure import draw, read_table

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCUMENTS = [
    README,
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
FOLDERS = ("cai_ray", "benchmarks", "constitutions", "docs", "jobs", "tests")
"""What a path of the repository begins with; all others are places of the reader's own, such as RUN/ or data/."""
NOT_SETTINGS = ("ray.data", "ray.max_failures")
"""A library's module, and a setting that a decision rejects."""
MINIMAL = {
    "name": "example",
    "model": "town",
    "constitution": "errand-town",
    "prompts": [{"path": "town:revise"}],
}

each_document = pytest.mark.parametrize(
    "document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)).replace("/", "-")
)


class Block(NamedTuple):
    """A block of code, with the line that it begins at."""

    language: str
    text: str
    line: int


# ----------------------------------------------------------------------------------------- how the program is asked


@cache
def help_text(*command: str) -> str | None:
    """What `cai-ray COMMAND --help` prints, or None if there is no such command."""
    from cai_ray.cli import main

    out = StringIO()
    with redirect_stdout(out), redirect_stderr(StringIO()), pytest.MonkeyPatch.context() as patch:
        for name, value in (("COLUMNS", "300"), ("NO_COLOR", "1"), ("TERM", "dumb")):
            patch.setenv(name, value)
        code = main([*command, "--help"])
    return None if code else out.getvalue()


def check_configuration(fragment: dict[str, Any], where: str) -> None:
    """Raises InputError if a configuration with these settings is refused."""
    from cai_ray.config.load import validate

    validate({**MINIMAL, **fragment}, where)


def check_overrides(items: list[str]) -> None:
    """Raises InputError if `--set` refuses one of these."""
    from cai_ray.config.load import load_config

    load_config("errand-town", items)


def settings() -> type[BaseModel]:
    from cai_ray.config.run import RunConfig

    return RunConfig


# ----------------------------------------------------------------------------------------------- reading documents


@cache
def tokens(document: Path) -> list[Token]:
    text = document.read_text(encoding="utf-8")
    return MarkdownIt("commonmark").enable("table").parse(text)


def blocks(document: Path, *languages: str) -> list[Block]:
    fences = [token for token in tokens(document) if token.type == "fence"]
    return [Block(t.info, t.content, (t.map or [0])[0] + 1) for t in fences if t.info in languages]


def inline(document: Path) -> Iterator[Token]:
    for token in tokens(document):
        yield from token.children or ()


def code(document: Path) -> list[str]:
    """Texts in backticks, as one line each."""
    return [" ".join(token.content.split()) for token in inline(document) if token.type == "code_inline"]


def links(document: Path) -> list[str]:
    found = []
    for token in inline(document):
        href = token.attrs.get("href" if token.type == "link_open" else "src")
        if href is not None:
            found.append(str(href))
    return found


@cache
def anchors(document: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    parsed = tokens(document)
    titles = [parsed[i + 1].content for i, token in enumerate(parsed) if token.type == "heading_open"]
    plain = [re.sub(r"[^\w\- ]", "", title.replace("`", "").lower()) for title in titles]
    return {title.replace(" ", "-") for title in plain}


def prose(document: Path) -> Iterator[tuple[int, str]]:
    """Lines outside of code, with their numbers."""
    lines = document.read_text(encoding="utf-8").splitlines()
    inside = {
        line
        for token in tokens(document)
        if token.type == "fence" and token.map
        for line in range(*token.map)
    }
    for number, line in enumerate(lines):
        if number not in inside:
            yield number + 1, line


def table(document: Path, heading: str) -> list[list[str]]:
    """Cells of the first table below a heading, without its head."""
    text = document.read_text(encoding="utf-8").partition(f"\n{heading}\n")[2]
    rows = re.search(r"^(\|.*\n)+", text, re.MULTILINE)
    assert rows, f"{document.name}: no table below {heading!r}"
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in rows[0].splitlines()[2:]]


def shell_lines(document: Path) -> Iterator[list[str]]:
    """The words of each command in blocks of shell, continued lines joined and comments left out."""
    for block in blocks(document, "bash"):
        for line in block.text.replace("\\\n", " ").splitlines():
            try:
                yield shlex.split(line, comments=True)
            except ValueError:  # a quotation over several lines, such as the body of a request
                continue


def commands(document: Path) -> Iterator[list[str]]:
    """Arguments of `cai-ray`, in blocks and in backticks; a script of jobs/ is a command, too."""
    quoted = [re.sub(r"[\[\]]", "", text).split() for text in code(document)]
    for words in [*shell_lines(document), *quoted]:
        while words and "=" in words[0]:  # variables of the environment
            words = words[1:]
        end = next((i for i, word in enumerate(words) if word in ("|", ">", "&&")), len(words))
        if words[:1] == ["cai-ray"]:
            yield words[1:end]
        for i, word in enumerate(words[1:end], 1):
            if re.fullmatch(r"jobs/\w+\.py", word) and words[i - 1] == "python":
                yield [Path(word).stem, *words[i + 1 : end]]


# ------------------------------------------------------------------------------------------------------- the tests


@each_document
def test_links_lead_to_files_and_headings(document: Path) -> None:
    broken = []
    for href in links(document):
        if re.match(r"https?://", href):
            continue
        path, _, anchor = href.partition("#")
        target = (document.parent / path).resolve() if path else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(href)
    assert not broken


def test_every_document_is_reached_from_the_readme() -> None:
    reached, queue = set(), [README]
    while queue:
        document = queue.pop()
        reached.add(document)
        paths = (document.parent / href.partition("#")[0] for href in links(document) if ":" not in href)
        queue += [
            p.resolve() for p in paths if p.suffix == ".md" and p.exists() and p.resolve() not in reached
        ]
    assert set(DOCUMENTS) - reached <= {ROOT / "CHANGELOG.md"}


@each_document
def test_paths_of_the_repository_exist(document: Path) -> None:
    words = [word for text in code(document) for word in text.split()]
    words += [word for line in shell_lines(document) for word in line]
    paths = {word.strip("`.,;:()\"'") for word in words if word.split("/")[0] in FOLDERS and "/" in word}
    assert not sorted(path for path in paths if not list(ROOT.glob(path.rstrip("/"))))


def test_the_tree_of_the_readme_is_that_of_the_package() -> None:
    (tree,) = [b.text for b in blocks(README, "text") if b.text.startswith("cai_ray/\n")]
    named = re.findall(r"^  (\S+)", tree, re.MULTILINE)
    assert not [name for name in named if not (ROOT / "cai_ray" / name).exists()]
    rooms = {f"{path.parent.name}/" for path in (ROOT / "cai_ray").glob("*/__init__.py")}
    assert not sorted(rooms - set(named))
    folders = re.findall(r"(?:^|  )(\w+/)  ", tree, re.MULTILINE)
    assert not [name for name in folders if name not in named and not (ROOT / name).is_dir()]


def test_rooms_stand_in_one_order_in_both_documents() -> None:
    def rooms(document: Path, column: int) -> list[list[str]]:
        found = [sorted(re.findall(r"`([\w/]+)`", row[column])) for row in table(document, "## Rooms")]
        return [row for row in found if row]

    below = rooms(ROOT / "CONTRIBUTING.md", 1)
    assert below == rooms(ROOT / "docs" / "architecture.md", 0)[::-1]


def test_functions_on_the_way_of_a_prompt_are_in_the_files_named() -> None:
    absent = []
    way = table(ROOT / "docs" / "architecture.md", "## The way of one prompt to a reward")
    for _, path, names, _ in way:
        file = ROOT / path.strip("`")
        source = file.read_text(encoding="utf-8") if file.exists() else ""
        absent += [
            f"{path} {name}"
            for name in re.findall(r"`(\w+)`", names)
            if not re.search(rf"^\s*(async )?(def|class) {name}\b", source, re.MULTILINE)
        ]
    assert not absent


@each_document
def test_commands_and_their_options_exist(document: Path) -> None:
    unknown = []
    for words in commands(document):
        names = [w for w in words[:2] if re.fullmatch(r"[a-z]\w*", w)] if words else []
        shown = help_text(*names[:1])
        if shown is not None and len(names) == 2:
            # What follows a command is its first argument, or the name of a command in its group.
            shown = help_text(*names)
        if shown is None:
            unknown.append(" ".join(words))
            continue
        for word in words:
            option = word.partition("=")[0]
            if re.fullmatch(r"--[a-z-]+", option) and not re.search(rf"(?<![\w-]){option}(?![\w-])", shown):
                unknown.append(" ".join(words))
    assert not unknown


@each_document
def test_overrides_in_commands_are_settings(document: Path) -> None:
    for words in commands(document):
        if words and words[0] != "serve":
            values = [words[i + 1] for i, word in enumerate(words[:-1]) if word == "--set"]
            check_overrides([value for value in values if "=" in value and value != "KEY=VALUE"])


@each_document
def test_settings_in_backticks_exist(document: Path) -> None:
    unknown = []
    for text in code(document):
        name = re.match(r"[a-z_]+(\.[a-z_]+)+(?=$|: |=)", text)
        if name and not text.startswith(NOT_SETTINGS) and not is_setting(name[0].split(".")):
            unknown.append(text)
    assert not unknown


def is_setting(parts: list[str]) -> bool:
    """Whether a dotted name is that of a setting; true, too, for what begins with the name of no section."""
    model: type[BaseModel] | None = settings()
    for depth, part in enumerate(parts):
        if model is None or part not in model.model_fields:
            return depth == 0
        model = section_of(model.model_fields[part].annotation)
        if depth == 0 and model is None:  # a file such as model.safetensors
            return True
    return True


def section_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = [section_of(option) for option in getattr(annotation, "__args__", ())]
    return next((model for model in found if model), None)


@each_document
def test_examples_in_yaml_are_configurations_or_constitutions(document: Path, tmp_path: Path) -> None:
    from cai_ray import constitution

    for block in blocks(document, "yaml"):
        where = f"{document.name}:{block.line}"
        data = yaml.safe_load(block.text)
        if "principles" in data:
            (tmp_path / "example.yaml").write_text(block.text)
            assert constitution.load(str(tmp_path / "example.yaml")).principles, where
        else:
            check_configuration(data, where)
    for block in blocks(document, "markdown"):
        (tmp_path / "example.md").write_text(block.text)
        assert constitution.load(str(tmp_path / "example.md")).principles, f"{document.name}:{block.line}"


@each_document
def test_examples_in_python_and_shell_can_be_parsed(document: Path) -> None:
    for block in blocks(document, "python"):
        ast.parse(block.text)
    for block in blocks(document, "bash"):
        done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True)
        assert done.returncode == 0, f"{document.name}:{block.line}: {done.stderr}"


@each_document
def test_targets_of_make_exist(document: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    lines = [*shell_lines(document), *(text.split() for text in code(document))]
    named = {words[1] for words in lines if len(words) > 1 and words[0] == "make"}
    assert not sorted(name for name in named if name not in targets)


@each_document
def test_extras_of_the_package_exist(document: Path) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = re.findall(r"pip install -e \"?\.\[([\w-]+)\]", document.read_text(encoding="utf-8"))
    assert not sorted(set(named) - set(extras))


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 160


@each_document
def test_prose_is_wrapped_at_100_characters(document: Path) -> None:
    long = [
        f"{document.name}:{number}"
        for number, line in prose(document)
        if len(line) > 100 and not line.startswith("|") and max(map(len, line.split())) <= 60
    ]
    assert not long


@each_document
def test_percentages_have_no_blank(document: Path) -> None:
    assert not [f"{document.name}:{number}" for number, line in prose(document) if re.search(r"\d %", line)]


def test_the_result_in_the_readme_is_that_of_the_results() -> None:
    results = table(ROOT / "docs" / "results.md", "## The demo")
    assert table(README, "## What comes out") == [row[:4] for row in results]


def test_the_figure_is_drawn_from_the_results() -> None:
    figure = draw(read_table((ROOT / "docs" / "results.md").read_text(encoding="utf-8")))
    assert (ROOT / "docs" / "results.svg").read_text(encoding="utf-8") == figure
