"""Parts of the report as plain text: the main table, the labels' certificate, transcripts."""

from __future__ import annotations

import textwrap
from typing import Any

from cai_ray.report import label_quality, main_table
from cai_ray.report.roles import in_order, title_of
from cai_ray.report.text import columns, interval, percent, signed, visible

_WIDTH = 92


def results_rows(report: dict[str, Any]) -> list[list[str]]:
    """The main table: share and 95% interval in percent, a column per policy; the first row is the head."""
    rows = [["", *(title_of(policy) for policy in report["models"])]]
    for row in main_table.rows(report):
        label = f"  {row.label}" if row.is_family else row.label
        rows.append([label, *(f"{percent(r['value'])}  {interval(r)}".rstrip() for r in row.rates)])
    return rows


def results(report: dict[str, Any]) -> str:
    """The main table with a line beneath its head."""
    rows = results_rows(report)
    lines = columns(rows)
    widest = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join([lines[0], "─" * (sum(widest) + 2 * (len(widest) - 1)), *lines[1:]])


def certificate(certificate: dict[str, Any]) -> str:
    """The labels' certificate: single numbers, then tables."""
    lines = ["Certificate of the labels"]
    for fact in label_quality.certificate_facts(certificate):
        lines.append(f"  {fact.name:<20}{fact.value:>8}  {fact.meaning}".rstrip())
    for title, table in label_quality.certificate_tables(certificate):
        lines += ["", f"  {title}", *(f"  {line}" for line in columns([table.head, *table.rows]))]
    return visible("\n".join(lines))


def transcript(item: dict[str, Any], number: int) -> str:
    """One transcript, from prompt to the last policy's answer."""
    parts = [f"Transcript {number}"]
    for message in item["messages"]:
        parts.append(speech("prompt" if message["role"] == "user" else message["role"], message["content"]))
    parts.append(speech("first answer", item["response"]))
    for step in item["steps"]:
        parts += critique_and_revision(step)
    for policy in in_order(item["answers"]):
        answer = item["answers"][policy]
        reward = "" if answer["reward"] is None else f"  (reward {signed(answer['reward'])})"
        parts.append(speech(title_of(policy), answer["text"] + reward))
    return "\n".join(parts)


def critique_and_revision(step: dict[str, Any]) -> list[str]:
    """One round of a transcript."""
    unused = "  (cut off and not used)" if step.get("critique_unused") else ""
    critique = f"[{step['title']}] {step['critique'] or '(none)'}{unused}"
    why = f": {step['left_out']}" if step.get("left_out") else ""
    revision = step["revision"] if step["changed"] else f"(unchanged{why})"
    if step.get("revision_cut"):
        revision += "  (cut off)"
    return [speech(f"critique {step['round']}", critique), speech(f"revision {step['round']}", revision)]


def speech(speaker: str, text: str) -> str:
    """A text beside the name of its speaker, in lines that fit a terminal."""
    lines = [line for part in visible(text).split("\n") for line in textwrap.wrap(part, _WIDTH) or [""]]
    return "\n".join(f"  {speaker if i == 0 else '':<14}{line}".rstrip() for i, line in enumerate(lines))
