"""A constitution as a document for people: Markdown with sections in the order of their priority.

    ---
    name: mine
    version: "1"
    ---
    # What our assistant stands for

    Introduction, which no model reads.

    ## Safety

    ### No weapons {#weapons}

    The assistant does not help to build weapons that ...

    ```yaml
    revision_request: Rewrite the response without ...
    ```

A heading with text of its own and no headings below it is a principle. A heading with others below it is a section; the
number of the section is its principles' priority, and its own text is kept for people. Lists and other blocks keep
their lines; the lines of a paragraph are joined. A block of YAML gives fields of the principle as in the YAML form, all
optional; missing requests are made from the text. `principle: false` leaves a heading out. The metadata at the top has
the fields of the YAML form, too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

ANCHOR = re.compile(r"\s*\{#([^}\s]+)\}\s*$")
REQUESTS = {
    "critique_request": "Say where the response goes against this principle, or that it does not: {text}",
    "revision_request": "Rewrite the response so that it follows this principle, and keep what was good in it: {text}",
    "comparison": "Which response follows this principle better? {text}",
}
"""The requests of a principle that has only a text."""


@dataclass
class Heading:
    level: int
    title: str
    texts: list[str] = field(default_factory=list)
    fields: dict[str, Any] = field(default_factory=dict)


def read(text: str, stem: str) -> dict[str, Any]:
    """The data of the document's YAML form.

    Args:
        stem: the file's stem, which is the name of a document without one.

    Raises:
        yaml.YAMLError: the metadata or the fields of a principle are not valid YAML.
    """
    meta, body = _metadata(text)
    headings = _headings(body)
    title = next((h for h in headings if h.level == 1), None)
    preamble = [h for h in headings if h.level == 0]
    principles = []
    sections = []
    section = 0
    for i, heading in enumerate(headings):
        if heading.level == 2:
            section += 1
        below = i + 1 < len(headings) and headings[i + 1].level > heading.level
        is_section = heading.level == 1 or below
        if heading in (title, *preamble) or not heading.fields.pop("principle", True):
            continue
        if is_section and heading.texts:
            sections.append(
                {"title": ANCHOR.sub("", heading.title), "text": _text(heading), "priority": section}
            )
        elif not is_section and (heading.texts or heading.fields):
            principles.append(_principle(heading, section))
    introduction = "\n\n".join(_text(h) for h in (*preamble, title) if h and h.texts)
    about = {key: value for key, value in (("description", introduction), ("sections", sections)) if value}
    name = _slug(title.title) if title else stem
    return {"name": name or stem, **about, **meta, "principles": principles}


def _metadata(text: str) -> tuple[dict[str, Any], str]:
    lines = text.lstrip("\ufeff").splitlines(keepends=True)
    if not lines or lines[0].strip() != "---":
        return {}, text
    end = next((i for i, line in enumerate(lines[1:], 1) if line.strip() == "---"), None)
    if end is None:
        raise yaml.YAMLError("the metadata at the top has no end: a line of three dashes")
    return _mapping("".join(lines[1:end]), "the metadata at the top"), "".join(lines[end + 1 :])


def _headings(body: str) -> list[Heading]:
    from markdown_it import MarkdownIt

    lines = body.splitlines()
    headings: list[Heading] = []
    tokens = MarkdownIt("commonmark").parse(body)
    for i, token in enumerate(tokens):
        if token.level != 0 or token.nesting == -1:
            continue  # the content of a block is read with the block
        if token.type == "heading_open":
            headings.append(Heading(int(token.tag[1:]), tokens[i + 1].content))
            continue
        if token.map is None or token.type == "html_block":
            continue
        if not headings:
            headings.append(Heading(0, ""))  # what stands before the first heading
        if token.type == "paragraph_open":
            headings[-1].texts.append(" ".join(line.strip() for line in lines[slice(*token.map)]).strip())
        elif token.type == "fence" and token.info.strip() in ("yaml", "yml"):
            headings[-1].fields |= _mapping(token.content, f"the fields of {headings[-1].title!r}")
        else:  # a list, a quotation, a table: its lines are what it says
            headings[-1].texts.append(
                "\n".join(line.rstrip() for line in lines[slice(*token.map)]).strip("\n")
            )
    return headings


def _text(heading: Heading) -> str:
    return "\n\n".join(heading.texts)


def _mapping(text: str, what: str) -> dict[str, Any]:
    data = yaml.safe_load(text) or {}
    if not isinstance(data, dict):
        raise yaml.YAMLError(f"{what} are not a mapping")
    return data


def _principle(heading: Heading, section: int) -> dict[str, Any]:
    anchor = ANCHOR.search(heading.title)
    title = ANCHOR.sub("", heading.title)
    text = str(heading.fields.get("text", _text(heading)))
    fields = {
        "id": anchor[1] if anchor else _slug(title),
        "title": title,
        "text": text,
        **default_requests(text),
    }
    return {**fields, "priority": section, **heading.fields}


def default_requests(text: str) -> dict[str, str]:
    """The requests and the comparison of a principle that has only a text."""
    return {name: form.replace("{text}", text) for name, form in REQUESTS.items()}


def _slug(title: str) -> str:
    """An id from a title: `no-weapons-ever` from `No weapons, ever`."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
