"""The report as one HTML page, which is a function of report.json: inline style, SVG and one script, nothing fetched.

Each section is a function here that turns the report into plain data, and a template that gives the data its form.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from cai_ray.report import (
    browser,
    costs,
    curves,
    label_quality,
    main_table,
    measures,
    principles,
    snapshots,
)
from cai_ray.report.roles import colour_of, title_of
from cai_ray.report.summary import summary
from cai_ray.report.templating import digest, inline, render
from cai_ray.report.text import interval, percent
from cai_ray.stages import POLICIES

_HERE = Path(__file__).parent


class PageSection(NamedTuple):
    anchor: str
    title: str
    template: str
    """Its name in templates/sections."""
    read: Callable[[dict[str, Any]], Any]
    """From the report to the data of the template; a section without data is left out."""


def page(report: dict[str, Any]) -> str:
    """The whole page."""
    sections = [(section, section.read(report)) for section in SECTIONS]
    return document(
        "report.html",
        title=f"Constitutional AI: {report['name']}",
        report=report,
        seeds=report.get("seeds") or [report["seed"]],
        tiles=_tiles(report),
        sections=[(section, data) for section, data in sections if data],
    )


def document(template: str, **data: Any) -> str:
    """A page that stands alone, from a template that extends layout.html."""
    script = inline(_HERE / "page.js")
    return render(
        _HERE / "templates", template,
        style=inline(_HERE / "style.css"), script=script, script_digest=digest(script), **data,
    )  # fmt: skip


def _tiles(report: dict[str, Any]) -> list[dict[str, str]]:
    """The harm of each trained policy, large, with its interval and helpfulness."""
    shown = [p for p in POLICIES if p in report["models"] and report[p]["harm"]["value"] is not None]
    return [
        {
            "policy": title_of(policy),
            "style": colour_of(policy),
            "harm": percent(report[policy]["harm"]["value"]),
            "interval": interval(report[policy]["harm"]),
            "helpful": percent(report[policy]["helpful"]["value"]),
        }
        for policy in shown
    ]


def _alarms(report: dict[str, Any]) -> dict[str, Any] | None:
    """The alarms, of which there may be none; no section in a report that was not asked for any."""
    alarms = report.get("alarms")
    return None if alarms is None else {"alarms": alarms}


def _reproduce(report: dict[str, Any]) -> dict[str, Any] | None:
    """The command, and the configuration with every value that is not the default."""
    if not report.get("configuration"):
        return None
    return {name: report[name] for name in ("seed", "configuration", "versions")}


SECTIONS = (
    PageSection("summary", "In short", "summary.html", summary),
    PageSection("results", "Results", "results.html", main_table.section),
    PageSection("frontier", "Harmless and helpful", "axes.html", measures.axes),
    PageSection("families", "Harm by family", "families.html", measures.by_family),
    PageSection("revision", "Harm by round of revision", "revision.html", curves.revision),
    PageSection("quality", "Labels and reward model", "facts.html", label_quality.quality),
    PageSection(
        "certificate",
        "Certificate of the labels",
        "certificate.html",
        label_quality.certificate_section,
    ),
    PageSection(
        "ppo",
        "Reinforcement learning",
        "curves.html",
        partial(curves.training, method="ppo", curves=curves.PPO),
    ),
    PageSection(
        "snapshots",
        "Snapshots while it learned",
        "snapshots.html",
        lambda report: snapshots.section(report["snapshots"]),
    ),
    PageSection(
        "dpo",
        "Direct preference optimisation",
        "curves.html",
        partial(curves.training, method="dpo", curves=curves.DPO),
    ),
    PageSection("transcripts", "Three transcripts", "transcripts.html", browser.transcripts),
    PageSection("constitution", "Principles", "principles.html", principles.section),
    PageSection("browser", "Browse the transcripts", "browser.html", browser.section),
    PageSection("alarms", "Alarms", "alarms.html", _alarms),
    PageSection("wording", "Wording", "table.html", measures.wording),
    PageSection("sets", "Published sets", "table.html", measures.sets),
    PageSection("harness", "Capability kept", "table.html", measures.harness),
    PageSection("stages", "Cost", "costs.html", costs.section),
    PageSection("reproduce", "How to reproduce it", "reproduce.html", _reproduce),
)
"""In the order of the page."""
