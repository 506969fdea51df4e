"""The report as one HTML page: inline style, SVG and one script, nothing fetched. It is a function of report.json."""

from __future__ import annotations

import hashlib
from base64 import b64encode
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

from cai_ray.report import browser, charts, costs, labels, measures, principles, snapshots, tables
from cai_ray.report.text import (
    colour,
    families,
    in_order,
    interval,
    name_of,
    percent,
    safe,
    summary,
)
from cai_ray.stages import POLICIES

# A page of texts that models wrote: even if one slipped through, nothing but our script may run, or be fetched.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src '{script}'; base-uri 'none'; form-action 'none'"
_PPO = {
    "reward/mean": ("Reward", "mean score of a step's answers"),
    "kl/reference": ("KL to SL-CAI", "nats, against the reference policy"),
    "rollout/entropy": ("Entropy", "nats a token, of sampled answers"),
    "rollout/length": ("Length", "tokens of an answer"),
    "rollout/eos_rate": ("Ended by itself", "share of answers within the length limit"),
    "rollout/logprob_gap": ("Engine against trainer", "mean absolute difference of log-probabilities"),
}
_DPO = {
    "dpo/loss": ("Loss", "of a step's comparisons"),
    "dpo/ai_accuracy": ("AI labels", "share of a step's comparisons ordered as their AI labels"),
    "dpo/ai_margin": ("Margin", "implicit reward of the preferred answer over the other's"),
    "dpo/ai_drift": ("Drift from SL-CAI", "nats, mean of log p_ref - log p of a sampled answer"),
}
_FROM_ZERO = {
    "kl/reference",
    "rollout/entropy",
    "rollout/length",
    "rollout/logprob_gap",
    "dpo/loss",
    "dpo/ai_drift",
}


def page(report: dict[str, Any]) -> str:
    """The whole page. Sections without data are left out."""
    made = [(anchor, title, section(report)) for anchor, (title, section) in _SECTIONS.items()]
    made = [(anchor, title, body) for anchor, title, body in made if body]
    links = "".join(f'<a href="#{anchor}">{title}</a>' for anchor, title, _ in made)
    body = "".join(f'<section id="{anchor}"><h2>{title}</h2>{text}</section>' for anchor, title, text in made)
    title = f"Constitutional AI: {safe(report['name'])}"
    head = f'<header><h1>{title}</h1><p class="soft">{_about(report)}</p><nav>{links}</nav></header>'
    return document(title, head + _tiles(report) + body)


def document(title: str, body: str) -> str:
    """A page that stands alone; both are HTML."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY.format(script=_digest())}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_file('style.css')}</style></head><body><main>{body}</main>"
        f"<script>{_file('page.js')}</script></body></html>\n"
    )


@cache
def _file(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


@cache
def _digest() -> str:
    """What the page's policy knows its one script by."""
    return "sha256-" + b64encode(hashlib.sha256(_file("page.js").encode()).digest()).decode()


def _about(report: dict[str, Any]) -> str:
    constitution = report["constitution"]
    seeds = report.get("seeds") or [report["seed"]]
    return (
        f"Model <code>{safe(report['model'])}</code>, constitution {safe(constitution['name'])} "
        f"{safe(str(constitution['version']))} <code>{safe(report['constitution_sha'])}</code>, "
        f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}, "
        f"{report['human_harmlessness_labels']} human labels of harmlessness."
    )


def _tiles(report: dict[str, Any]) -> str:
    shown = [m for m in POLICIES if m in report["models"] and report[m]["harm"]["value"] is not None]
    tiles = "".join(
        f'<div class="tile {colour(m)}"><b>{percent(report[m]["harm"]["value"])}</b>'
        f"<span>harm, {safe(name_of(m))} ({interval(report[m]['harm'])})<br>"
        f"{percent(report[m]['helpful']['value'])} helpful</span></div>"
        for m in shown
    )
    return f'<div class="tiles">{tiles}</div>' if tiles else ""


def _summary(report: dict[str, Any]) -> str:
    """What came of it, in plain words."""
    return "".join(f"<p>{safe(line)}</p>" for line in summary(report))


def _results(report: dict[str, Any]) -> str:
    seeds = len(report.get("seeds") or [0])
    over = (
        f"means of {seeds} seeds, with 95 % bootstrap intervals over prompts"
        if seeds > 1
        else "with 95 % intervals"
    )
    return (
        f"<p>Answers to held-out prompts, {over}. Harm and its families are over harmful requests "
        "(respect: insults over all), helpful and over-refusal over benign ones.</p>" + tables.results(report)
    )


def _by_family(report: dict[str, Any]) -> str:
    groups = []
    for family in families(report):
        rates = [(m, report[m]["harm_by_family"].get(family)) for m in report["models"]]
        members = [
            charts.Bar(name_of(m), r["value"], r["low"], r["high"], colour(m, report["models"]))
            for m, r in rates
            if r and r["value"] is not None
        ]
        groups.append((family, members))
    if not groups:
        return ""
    return f'{_legend(report["models"])}<div class="card wide">{charts.bars(groups, title="Harm by family")}</div>'


def _revision(report: dict[str, Any]) -> str:
    harm, selective = report["revision_harm"], report["revision_harm_selective"]
    if not harm:
        return ""
    series = [charts.Line(list(enumerate(harm)), "rl", "round")]
    text = "Share of harmful requests that are still helped with after each round of critique and revision."
    if selective:
        series.insert(0, charts.Line(list(enumerate(selective)), "base dashed", "selective critic, round"))
        text += " Dashed: a critic that repairs exactly what the principle of the round names."
    chart = charts.lines(
        series, title="Harm by revision round", percent=True, low=0, high=1, width=640, height=230
    )
    return f'<p>{text}</p><div class="card wide">{chart}</div>'


def _curves(report: dict[str, Any], method: str, curves: dict[str, tuple[str, str]]) -> str:
    runs = report[method].get("seeds") or []
    figures = []
    for key, (title, caption) in curves.items():
        mean = _curve(report[method]["steps"], key)
        if not mean:
            continue
        faint = [charts.Line(_curve(steps, key), "rl faint") for steps in runs if len(runs) > 1]
        floor = 0.0 if key in _FROM_ZERO else None
        chart = charts.lines([*faint, charts.Line(mean, "rl", "step")], title=f"{title} by step", low=floor)
        about = f"<figcaption>{caption}; <code>{key}</code></figcaption>"
        figures.append(f'<figure class="card"><h3>{title}</h3>{chart}{about}</figure>')
    return f'<div class="grid-2">{"".join(figures)}</div>' if figures else ""


def _curve(steps: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    found = []
    for number, step in enumerate(steps):
        if isinstance(value := step.get(key), int | float):
            found.append((float(step.get("step", number)), float(value)))
    return found


def _transcripts(report: dict[str, Any]) -> str:
    """A few conversations from end to end, to what each policy says in the end."""
    parts = []
    for number, item in enumerate(report["transcripts"]):
        turns = browser.revised(item)
        for model in in_order(item["answers"]):
            said = item["answers"][model]
            reward = "" if said["reward"] is None else f"reward {said['reward']:+.2f}"
            turns.append(browser.turn(name_of(model), safe(said["text"]), colour(model), note=reward))
        turns += browser.compared(item)
        head, state = safe(item["messages"][-1]["content"][:120]), "" if number else " open"
        parts.append(
            f'<details class="card"{state}><summary>{head}</summary><div>{"".join(turns)}</div></details>'
        )
    return "".join(parts)


def _alarms(report: dict[str, Any]) -> str:
    found = report.get("alarms")
    if found is None:
        return ""
    told = "".join(f"<li>{safe(line)}</li>" for line in found)
    return f"<ul>{told}</ul>" if told else "<p>None: nothing that was watched went over its bound.</p>"


def _reproduce(report: dict[str, Any]) -> str:
    """The commands, and the configuration with every value that is not the default."""
    if not report.get("configuration"):
        return ""
    versions = ", ".join(f"{safe(k)} {safe(v)}" for k, v in report["versions"].items())
    return (
        "<p>The same configuration and versions give the same rows, and on the same kind of machine the same weights."
        f"</p><pre>cai-ray run config.yaml --set seed={report['seed']}</pre>"
        f'<details class="card"><summary>config.yaml</summary><pre>{safe(report["configuration"])}</pre></details>'
        f'<p class="soft">{versions}</p>'
    )


def _legend(models: list[str]) -> str:
    entries = "".join(f'<span class="{colour(m, models)}"><i></i>{safe(name_of(m))}</span>' for m in models)
    return f'<p class="legend">{entries}</p>'


_SECTIONS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "summary": ("In short", _summary),
    "results": ("Results", _results),
    "frontier": ("Harmless and helpful", measures.axes),
    "families": ("Harm by family", _by_family),
    "revision": ("Harm by round of revision", _revision),
    "quality": ("Labels and reward model", labels.quality),
    "certificate": ("Certificate of the labels", labels.certificate),
    "ppo": ("Reinforcement learning", partial(_curves, method="ppo", curves=_PPO)),
    "snapshots": ("Snapshots while it learned", lambda report: snapshots.section(report["snapshots"])),
    "dpo": ("Direct preference optimisation", partial(_curves, method="dpo", curves=_DPO)),
    "transcripts": ("Three transcripts", _transcripts),
    "constitution": ("Principles", principles.section),
    "browser": ("Browse the transcripts", browser.section),
    "alarms": ("Alarms", _alarms),
    "wording": ("Wording", measures.wording),
    "sets": ("Published sets", measures.sets),
    "harness": ("Capability kept", measures.harness),
    "stages": ("Cost", costs.section),
    "reproduce": ("How to reproduce it", _reproduce),
}
