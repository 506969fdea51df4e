"""What `cai-ray export` writes, on handmade artifacts with texts that try to be more than text."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from markdown_it import MarkdownIt

from cai_ray.cli import main
from cai_ray.config.judge import PromptedModel
from cai_ray.config.run import RunConfig
from cai_ray.constitution import load
from cai_ray.errors import InputError
from cai_ray.export import markdown
from cai_ray.export.datasets import SCHEMAS
from cai_ray.export.folders import export
from cai_ray.judging import certificate
from cai_ray.stages import STAGES, models_of
from cai_ray.storage import files
from cai_ray.storage.arrow import to_table
from cai_ray.storage.records import Label, Revision, SftRow
from cai_ray.storage.run import Run
from tests import tiny

EVIL = '---\nlicense: mit\n---\n# x | `y` ``` </table> <script>alert(1)</script> [z](https://evil) "q" \x1b[31m: {b}'
PROMPT = [{"role": "user", "content": f"hello {EVIL}"}]


def label(number: int, p_a: float | None, **more: Any) -> dict[str, Any]:
    votes = [
        {"principle_id": "first", "p_a": p_a, "abstained": None},
        {"principle_id": "second", "p_a": None, "abstained": "no option"},
    ]
    return {
        "id": f"l{number}",
        "messages": PROMPT,
        "response_a": f"a {EVIL}",
        "response_b": "b",
        "truncated_a": True,
        "truncated_b": False,
        "p_a": p_a,
        "p_a_raw": p_a,
        "votes": votes,
        "error": None,
    } | more


def revised(number: int, **more: Any) -> dict[str, Any]:
    steps = [
        {"round": i, "principle_id": "first", "critique": EVIL, "revision": f"revision {i} {EVIL}"}
        for i in (1, 2)
    ]
    return {
        "id": f"r{number}",
        "messages": PROMPT,
        "kind": "red_team",
        "response": EVIL,
        "truncated": True,
        "steps": steps,
        "revision": steps[-1]["revision"],
        "error": None,
    } | more


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """All stages done; `report` has two policies of which one has no rate."""
    folder = tmp_path / "run"
    principles = [
        {
            "id": i,
            "title": EVIL,
            "text": EVIL,
            "critique_request": "c",
            "revision_request": "r",
            "comparison": "q",
        }
        for i in ("first", "second")
    ]
    constitution = tmp_path / "constitution.yaml"
    constitution.write_text(yaml.safe_dump({"name": EVIL, "version": EVIL, "principles": principles}))
    config = {
        "name": "evil",
        "out": str(folder),
        "constitution": str(constitution),
        "model": f"/secret/{EVIL}",
    }
    config |= {
        "prompts": [{"path": "/secret/prompts.jsonl"}],
        "rm": {"human": [{"path": "/secret/human.jsonl"}]},
    }
    run = Run(RunConfig.model_validate(config))
    document = load(constitution)
    files.write_bytes(run.path("constitution.yaml"), document.to_yaml().encode())
    opened = {"config": run.config.model_dump(mode="json"), "versions": {}, "constitution_sha": document.sha}
    files.write_json(run.path("run.json"), opened)
    run.write_rows("revise", to_table([revised(0), revised(1, error="failed"), helpful(2)], Revision))
    sft = {"id": "s", "messages": [*PROMPT, {"role": "assistant", "content": EVIL}], "kind": "revision"}
    run.write_rows("sft", to_table([sft], SftRow))
    labels = [
        label(0, 0.75),
        label(1, 0.25),
        label(2, None, error="failed"),
        label(3, 0.5, response_b=f"a {EVIL}"),
    ]
    run.write_rows("label", to_table(labels, Label))
    proof = certificate.certificate(label for _, label in certificate.read([to_table(labels, Label)]))
    files.write_json(run.path("label", "certificate.json"), proof)
    for stage in models_of("ppo").values():
        tiny.save_model(Path(run.path(stage, "model")), "qwen2")
    files.write_json(run.path("rm", "model", "reward_head.json"), {"mean": 0.5, "std": 2.0, "n": 4})
    rate = {"value": 0.25, "low": 0.125, "high": 0.5, "n": 8}
    nothing = {"value": None, "low": None, "high": None, "n": 0}
    policy = {"harm": rate, "harm_by_family": {}, "preferred_to_base": nothing}
    report = {"models": ["base", EVIL], "base": policy, EVIL: policy, "constitution": {"principles": []}}
    files.write_json(run.path("report", "report.json"), report)
    for name, stage in STAGES.items():
        inputs = {upstream: f"id of {upstream}" for upstream in stage.needs}
        manifest: dict[str, Any] = {"id": f"id of {name}", "inputs": inputs, "rows_out": 1234, "errors": 0}
        if name == "rm":
            manifest["metrics"] = {"accuracy_ai": 0.75, "loss_ai": 0.5, "n_ai": 40.0}
            manifest["human_labels"] = {"helpful": 77}
        files.write_json(run.path(name, "manifest.json"), manifest)
    return run


def helpful(number: int) -> dict[str, Any]:
    return revised(number, kind="helpful", steps=[], revision=None, response="gladly")


def front(card: Path) -> dict[str, Any]:
    """The front matter, as the Hub finds it."""
    found = re.match(r"---\n(.*?)\n---\n", card.read_text(), re.DOTALL)
    return yaml.safe_load(found[1]) if found else {}


def rows(out: Path, name: str) -> list[dict[str, Any]]:
    (file,) = (out / "datasets" / "data" / name).glob("*.parquet")
    table = pq.read_table(file)
    assert table.schema.remove_metadata() == SCHEMAS[name]
    return table.to_pylist()


def test_preferences_follow_the_label_whichever_slot_it_prefers(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert not export(run, str(out)).missing
    first, second = rows(out, "preferences")
    a, b = ([{"role": "assistant", "content": text}] for text in (f"a {EVIL}", "b"))
    assert (first["chosen"], first["rejected"]) == (a, b)
    assert (second["chosen"], second["rejected"]) == (b, a)
    for row in (first, second):
        assert row["prompt"] == PROMPT
        assert row["p_chosen"] == row["p_chosen_raw"] == 0.75
        assert row["votes"] == [
            {"principle_id": "first", "p_chosen": 0.75, "abstained": None},
            {"principle_id": "second", "p_chosen": None, "abstained": "no option"},
        ]
    assert (first["truncated_chosen"], first["truncated_rejected"]) == (True, False)
    assert (second["truncated_chosen"], second["truncated_rejected"]) == (False, True)
    card = (out / "datasets" / "README.md").read_text()
    assert "1 with an error, 1 of two responses that are the same" in card


def test_revisions_end_with_what_was_trained_on(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(run, str(out))
    revised, helpful = rows(out, "revisions")  # the failed one is left out
    assert revised["prompt"] == PROMPT and revised["response"] == EVIL
    assert revised["completion"] == [{"role": "assistant", "content": f"revision 2 {EVIL}"}]
    assert not revised["truncated"], "the response was; the revision is whole"
    assert [s["principle_id"] for s in revised["steps"]] == ["first", "first"]
    assert helpful["completion"] == [{"role": "assistant", "content": "gladly"}]
    assert [r["messages"][-1]["content"] for r in rows(out, "sft")] == [EVIL]


def test_models_are_as_they_are_with_a_card_each(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(run, str(out))
    for role, stage in models_of("ppo").items():
        folder, source = out / "models" / role, Path(run.path(stage, "model"))
        for file in source.iterdir():
            assert (folder / file.name).read_bytes() == file.read_bytes()
        said = (folder / "README.md").read_text()
        assert load(run.path("constitution.yaml")).sha in said
        assert "1,234" in said
    reward = (out / "models" / "rm" / "README.md").read_text()
    assert "75.0% (59.8–85.8, n = 40)" in reward
    assert '"<|im_end|>"' in reward and "MEAN, STD = 0.5, 2.0" in reward
    assert "human comparisons about what is helpful | 77" in reward
    assert "25.0% (12.5–50.0, n = 8)" in (out / "models" / "rl" / "README.md").read_text()


def test_an_exported_policy_stops_where_its_turn_ends(run: Run, tmp_path: Path) -> None:
    """The base model ends texts with one token; the template set's chat template ends turns with another."""
    from transformers import AutoTokenizer, GenerationConfig

    templates = yaml.safe_load((Path(files.__file__).parents[1] / "templates" / "general.yaml").read_text())
    (tmp_path / "set.yaml").write_text(yaml.safe_dump({**templates, "chat_template": tiny.CHATML}))
    chatting = Run(run.config.model_copy(update={"templates": str(tmp_path / "set.yaml")}))
    for stage in models_of("ppo").values():
        folder = Path(run.path(stage, "model"))
        (folder / "chat_template.jinja").unlink()
        for name, change in (
            ("tokenizer_config.json", {"eos_token": "<|endoftext|>", "chat_template": None}),
            ("generation_config.json", {"eos_token_id": 0, "temperature": 0.5}),
        ):
            data = files.read_object(folder / name, "") or {}
            files.write_json(folder / name, {**data, **change})
    export(chatting, str(tmp_path / "out"))
    for role in ("sl", "rl"):
        folder = tmp_path / "out" / "models" / role
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert GenerationConfig.from_pretrained(folder).eos_token_id == [
            tokenizer.convert_tokens_to_ids("<|im_end|>"),
            tokenizer.eos_token_id,
        ]
        assert (files.read_object(folder / "generation_config.json", "") or {})["temperature"] == 0.5
        assert tokenizer.chat_template == tiny.CHATML == (folder / "chat_template.jinja").read_text()
        assert (files.read_object(folder / "tokenizer_config.json", "") or {})["chat_template"] == tiny.CHATML


@pytest.mark.parametrize("given", [None, 2, [2, 0]])
def test_the_end_of_a_turn_is_added_once(run: Run, tmp_path: Path, given: Any) -> None:
    """Where generation_config.json names no end, or is missing, that of config.json counts."""
    place = Path(run.path("sft", "model", "generation_config.json"))
    place.unlink(missing_ok=True)
    if given is not None:
        files.write_json(place, {"eos_token_id": given})
    export(run, str(tmp_path / "out"))
    out = tmp_path / "out" / "models" / "sl" / "generation_config.json"
    exported = (files.read_object(out, "") or {}).get("eos_token_id") if out.exists() else None
    assert exported == given


def test_no_text_becomes_structure_of_a_card(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(run, str(out))
    pipelines = {"sl": "text-generation", "rm": "text-classification", "rl": "text-generation"}
    for role, pipeline_tag in pipelines.items():
        matter = front(out / "models" / role / "README.md")
        assert matter.keys() == {"library_name", "pipeline_tag", "tags"}
        assert (matter["library_name"], matter["pipeline_tag"]) == ("transformers", pipeline_tag)
    assert [c["config_name"] for c in front(out / "datasets" / "README.md")["configs"]] == list(SCHEMAS)
    for card in out.rglob("README.md"):
        said = re.sub(r"\A---\n.*?\n---\n", "", card.read_text(), flags=re.DOTALL)
        assert "\x1b" not in said
        tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(said)
        inline = [t for token in tokens for t in token.children or []]
        assert not [
            t for t in tokens + inline if t.type in ("html_block", "html_inline", "image", "code_block", "hr")
        ]
        assert {t.attrs["href"] for t in inline if t.type == "link_open"} <= {
            "https://arxiv.org/abs/2212.08073"
        }
        headings = [tokens[i + 1].content for i, t in enumerate(tokens) if t.type == "heading_open"]
        assert headings[0].startswith("evil: ") and not [h for h in headings[1:] if "license" in h]
        assert {t.info for t in tokens if t.type == "fence"} <= {"python", "yaml"}
        for settings in (t.content for t in tokens if t.info == "yaml"):
            assert yaml.safe_load(settings)
        # What they are of is there, as it was written.
        if "Constitution" in headings:
            assert [t for t in inline if t.type == "strong_open"]
            shown = "".join(t.content for t in inline if t.type == "text")
            assert " ".join(EVIL.replace("\x1b", "�").split()) in shown


def test_no_place_on_the_machine_is_told(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(run, str(out))
    for card in out.rglob("README.md"):
        assert "secret" not in card.read_text() and str(tmp_path) not in card.read_text()


def test_a_base_model_of_the_hub_is_named(run: Run, tmp_path: Path) -> None:
    for model, named in (
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        (f"Qwen/Qwen3-0.6B@{'0a' * 20}", "Qwen/Qwen3-0.6B"),
        ("../models/mine", None),
        ("town", None),
    ):
        other = Run(run.config.model_copy(update={"model": model}))
        out = tmp_path / f"out {len(model)}"
        export(other, str(out))
        assert front(out / "models" / "sl" / "README.md").get("base_model") == named


def test_the_cards_say_who_wrote_critiques_and_revisions(run: Run, tmp_path: Path) -> None:
    export(run, str(tmp_path / "alone"))
    assert "after it had criticised" in (tmp_path / "alone" / "models" / "sl" / "README.md").read_text()
    reviser = PromptedModel(model="/secret/place/large")
    revise = run.config.revise.model_copy(update={"reviser": reviser})
    other = Run(run.config.model_copy(update={"revise": revise}))
    by_another = revised(0, reviser="/secret/place/large")
    other.write_rows("revise", to_table([by_another, helpful(2)], Revision))
    export(other, str(tmp_path / "out"))
    cards = [(tmp_path / "out" / f / "README.md").read_text() for f in ("models/sl", "models/rl", "datasets")]
    assert "after large had criticised" in cards[0] and "`large` wrote" in cards[2]
    assert not any("secret" in card for card in cards)
    written = {row["reviser"] for row in rows(tmp_path / "out", "revisions")}
    assert written == {"large", None}


def test_what_is_not_done_is_left_out_and_named(run: Run, tmp_path: Path) -> None:
    for stage in ("report", "evaluate", "ppo", "rm", "label"):
        shutil.rmtree(run.path(stage))
    out = tmp_path / "out"
    done = export(run, str(out))
    assert [m.partition(":")[0] for m in done.missing] == ["models/rm", "models/rl", "datasets", "results"]
    assert {p.name for p in (out / "models").iterdir()} == {"sl"}
    assert {p.name for p in (out / "datasets" / "data").iterdir()} == {"revisions", "sft"}
    assert "stage ppo is not complete" in (out / "README.md").read_text()
    assert "Not measured" in (out / "models" / "sl" / "README.md").read_text()


def test_what_rests_on_an_older_stage_is_left_out(run: Run, tmp_path: Path) -> None:
    manifest = run.manifest("label")
    assert manifest
    files.write_json(run.path("label", "manifest.json"), manifest | {"id": "made again"})
    out = tmp_path / "out"
    done = export(run, str(out))
    assert [m.partition(":")[0] for m in done.missing] == ["models/rm", "models/rl", "results"]
    assert all("was made before what it reads was made again" in m for m in done.missing)
    assert "Not measured" in (out / "models" / "sl" / "README.md").read_text(), (
        "the report is of other models"
    )


def test_bad_places_are_one_line(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    for words, says in (
        ([str(tmp_path / "nowhere")], "no run here"),
        ([run.root, "--out", str(full)], "holds something already"),
        ([run.root, "--out", str(full / "mine.txt")], "holds something already"),
        ([run.root, "--out", run.root], "holds something already"),
        ([run.root, "--out", ""], "--out is empty"),
    ):
        assert main(["export", *words]) == 2
        err = capsys.readouterr().err
        assert says in err and err.count("\n") == 1
    assert [p.name for p in full.iterdir()] == ["mine.txt"]


def test_a_run_with_nothing_done_says_so(run: Run, tmp_path: Path) -> None:
    for stage in STAGES:
        shutil.rmtree(run.path(stage), ignore_errors=True)
    with pytest.raises(InputError, match="nothing to export yet"):
        export(run, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_command_says_where_and_what_is_missing(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run.path("report"))
    assert main(["export", run.root]) == 0
    said = capsys.readouterr()
    assert said.out == f"{run.root}/export\n"
    assert said.err == "not exported: results: stage report is not complete\n"
    assert (Path(run.root) / "export" / "README.md").exists()


def test_runs_and_exports_may_lie_on_other_file_systems(run: Run, tmp_path: Path, far: str) -> None:
    shutil.copytree(run.root, tmp_path / "bucket" / "run")
    remote = Run(run.config.model_copy(update={"out": far}))
    export(remote, f"{far}-export")
    export(run, str(tmp_path / "near"))
    near, away = tmp_path / "near", tmp_path / "bucket" / "run-export"
    paths = sorted(p.relative_to(near) for p in near.rglob("*") if p.is_file())
    assert paths == sorted(p.relative_to(away) for p in away.rglob("*") if p.is_file())
    assert all((near / f).read_bytes() == (away / f).read_bytes() for f in paths)


@pytest.mark.parametrize(
    "text",
    [
        EVIL,
        "`",
        "``` ```",
        "a|b",
        "",
        "* x",
        "1. x",
        "&lt;",
        "\\",
        "# x",
        "- x",
        "+ x",
        "2) x",
        "---",
        "==",
        "-1.5",
    ],
)
def test_markdown_keeps_every_character_of_a_line(text: str) -> None:
    line = markdown.escaped(text)
    assert "\n" not in line and "<" not in line and ">" not in line
    back = re.sub(r"\\(.)", r"\1", line).replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    shown = " ".join(text.replace("\x1b", "�").split())
    assert back == shown
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(f"{line}\n")
    assert [t.type for t in tokens] == ["paragraph_open", "inline", "paragraph_close"] * bool(shown)
    assert "".join(t.content for t in tokens[1].children or []) == shown if shown else not tokens


@pytest.mark.parametrize("text", [EVIL, "`", "``x`", "a_b"])
def test_nothing_ends_code_within_a_line(text: str) -> None:
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(f"x {markdown.code(text)} y")
    assert [t.type for t in tokens[1].children or []] == ["text", "code_inline", "text"]
    assert tokens[1].children[1].content == " ".join(text.replace("\x1b", "�").split())  # type: ignore[index]


def test_nothing_ends_a_block_of_code_early() -> None:
    for text in (EVIL, "```\n````\n# x", "`"):
        (block,) = MarkdownIt().parse(markdown.code_block(text, "yaml"))
        assert (block.type, block.content) == ("fence", text.replace("\x1b", "�") + "\n")
