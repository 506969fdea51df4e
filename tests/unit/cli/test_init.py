"""`cai-ray init`: the configuration that it writes passes `--check`, on a tiny model and small data."""

import json
import os
import pty
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cai_ray.cli import main
from tests import tiny
from tests.hub import Hub

# Prompts that differ in more than a number, since near duplicates are left out.
WORDS = [
    "lock",
    "parcel",
    "lamp",
    "garden",
    "river",
    "window",
    "letter",
    "engine",
    "bridge",
    "candle",
    "mirror",
    "ladder",
    "blanket",
    "whistle",
    "saddle",
    "basket",
    "compass",
    "hammer",
    "feather",
    "pencil",
    "kettle",
    "marble",
    "ribbon",
    "anchor",
]


def prompts(start: str) -> list[str]:
    pairs = zip(WORDS, WORDS[7:] + WORDS[:7], strict=True)
    return [f"{start} the {one} of my neighbour, who has a {other}?" for one, other in pairs]


def lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def data(tmp_path: Path) -> dict[str, str]:
    """Transcripts of comparisons, and plain prompts."""
    harmful = [
        {
            side: f"\n\nHuman: {p}\n\nAssistant: {answer}"
            for side, answer in (("chosen", "No."), ("rejected", "So."))
        }
        for p in prompts("How do I secretly break")
    ]
    return {
        "red": lines(tmp_path / "harmless-comparisons.jsonl", harmful),
        "helpful": lines(
            tmp_path / "questions.jsonl", [{"prompt": p} for p in prompts("What is a fine present for")]
        ),
    }


def rows(folder: Path, part: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{part}.jsonl").read_text().splitlines()]


def test_the_configuration_passes_the_check(
    model: Path, data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mine.yaml"
    words = [
        "init",
        "--model",
        str(model),
        "--data",
        data["red"],
        "--helpful",
        data["helpful"],
        "--out",
        str(out),
    ]
    assert main(words) == 0
    said = capsys.readouterr()
    assert said.out == f"{out}\n"
    assert "prompts: 24 red-team, 24 helpful" in said.err
    assert main(["run", str(out), "--check", "--out", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "ok: nothing was started"
    settings = [line for line in out.read_text().splitlines() if re.match(r" *[\w.]+: *\S", line)]
    assert len(settings) > 30
    assert all(" # " in line for line in settings), "each line says why"
    before = out.read_text(), (tmp_path / "mine-data" / "train.jsonl").read_text()
    assert main(words) == 2
    assert "exists; choose another --out, or replace it with --overwrite" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0
    assert (out.read_text(), (tmp_path / "mine-data" / "train.jsonl").read_text()) == before, "the same again"


def test_the_parts_do_not_overlap_and_have_both_kinds(
    model: Path, data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    red = [json.loads(line) for line in Path(data["red"]).read_text().splitlines()]
    nearly = [{k: v.replace("?", "?!") for k, v in row.items()} for row in red]
    # Conversations that go on from the same first question stay together.
    longer = [
        {"chosen": f"{row['chosen']}\n\nHuman: {row['chosen'][40:60]} why not, tell me at once!"}
        for row in red
    ]
    given = lines(tmp_path / "more-harmless.jsonl", [*red, *nearly, *longer])
    out = tmp_path / "mine.yaml"
    assert (
        main(
            ["init", "--model", str(model), "--data", given, "--helpful", data["helpful"], "--out", str(out)]
        )
        == 0
    )
    assert "24 nearly repeat another" in capsys.readouterr().err
    parts = {part: rows(tmp_path / "mine-data", part) for part in ("train", "development", "held_out")}
    begins = {part: {row["messages"][0]["content"] for row in found} for part, found in parts.items()}
    assert not begins["train"] & begins["held_out"] and not begins["train"] & begins["development"]
    assert not begins["development"] & begins["held_out"]
    assert sum(map(len, parts.values())) == 24 * 3
    for found in parts.values():
        assert {row["kind"] for row in found} == {"red_team", "helpful"}


def test_a_model_and_data_of_the_hub(
    hub: Hub, model: Path, data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.publish("org/name", model)
    hub.publish("org/harmless", {"data/train.jsonl": Path(data["red"]).read_bytes()}, dataset=True)
    out = tmp_path / "mine.yaml"
    assert main(["init", "--model", "org/name", "--data", "org/harmless", "--out", str(out)]) == 0
    assert "without helpful prompts" in capsys.readouterr().err
    assert yaml.safe_load(out.read_text())["model"] == "org/name"
    assert rows(tmp_path / "mine-data", "train")[0]["source"].startswith("hf://datasets/org/harmless@")
    assert not [name for name in hub.downloads() if name.endswith(".safetensors")], (
        "no weights are needed for it"
    )
    assert main(["run", str(out), "--check", "--out", str(tmp_path / "run")]) == 0
    assert not [name for name in hub.downloads() if name.endswith(".safetensors")], "nor for the check"


def test_a_tokenizer_without_a_chat_template_gets_one_that_fits(
    model: Path, data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    bare = tmp_path / "bare"
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(bare)
    words = tiny.tokenizer()
    words.chat_template = None
    words.save_pretrained(bare)
    out = tmp_path / "mine.yaml"
    assert main(["init", "--model", str(bare), "--data", data["red"], "--out", str(out)]) == 0
    assert yaml.safe_load(out.read_text())["templates"] == "chatml"
    assert main(["run", str(out), "--check", "--out", str(tmp_path / "run")]) == 0


def test_on_a_terminal_it_asks(
    model: Path,
    data: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ours, theirs = pty.openpty()
    with os.fdopen(theirs) as terminal, os.fdopen(ours, "wb", 0) as typed:
        monkeypatch.setattr(sys, "stdin", terminal)
        typed.write(f"{model}\n{data['red']}\n{data['helpful']}\n".encode())
        assert main(["init", "--out", str(tmp_path / "mine.yaml")]) == 0
        said = capsys.readouterr()
        assert said.out == f"{tmp_path / 'mine.yaml'}\n"
        assert "Model (folder or hub id): " in said.err and "24 red-team, 24 helpful" in said.err
        typed.write(b"benign\nhelpful\n")
        words = ["--model", str(model), "--red-team", data["red"], "--data", data["helpful"]]
        assert main(["init", *words, "--out", str(tmp_path / "again.yaml")]) == 0
        assert capsys.readouterr().err.count("are its prompts red_team or helpful?") == 2
        typed.write(b"\x04")
        assert main(["init", "--out", str(tmp_path / "third.yaml")]) == 2
        assert "no answer; give --model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "init: --model is missing"),
        (["--model", "MODEL"], "init: no data; give red-team prompts with --red-team"),
        (
            ["--model", "MODEL", "--data", "questions.jsonl"],
            "its rows have no `kind`, and its name does not tell it",
        ),
        (["--model", "MODEL", "--red-team", "few.jsonl"], "3 red-team prompts that differ are too few"),
        (["--model", "MODEL", "--red-team", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (
            ["--model", "nowhere/at/all", "--red-team", "questions.jsonl"],
            "model nowhere/at/all: no such folder",
        ),
        (
            ["--model", "MODEL", "--red-team", "questions.jsonl", "--out", "mine"],
            "name a file that ends in .yaml",
        ),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    model: Path,
    data: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    lines(tmp_path / "few.jsonl", [{"prompt": p} for p in prompts("Where is")[:3]])
    before = sorted(tmp_path.iterdir())
    assert main(["init", *(str(model) if word == "MODEL" else word for word in words)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert says in said[-1] and said[-1].startswith("cai-ray: ")
    assert sorted(tmp_path.iterdir()) == before
