"""Run directories that are damaged, or whose name is at fault: the file and the remedy, and no traceback."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from cai_ray.cli import main
from cai_ray.config.load import load_config
from cai_ray.errors import InputError
from cai_ray.generate.journal import Journal
from cai_ray.storage import files
from cai_ray.storage.arrow import to_table
from cai_ray.storage.models import local_model
from cai_ray.storage.records import Revision
from cai_ray.storage.run import Run, open_run
from tests import tiny

FOLDER = None
NO_OBJECT = [b"{", b"", b"[]", b"{}", b"null", b"\x93NUMPY\x00\xff", b"[" * 100_000, FOLDER]


def make(out: Path) -> Run:
    run = Run(load_config("errand-town", out=str(out)))
    files.write_json(run.path("run.json"), {"config": run.config.model_dump(mode="json")})
    return run


def put(path: Path, content: bytes | None) -> None:
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir() if content is FOLDER else path.write_bytes(content)


@pytest.mark.parametrize("command", ["status", "chat", "serve --no-auth"])
@pytest.mark.parametrize(
    "content", [*NO_OBJECT, b'{"config": null}', b'{"config": {}}', b'{"config": {"nme": "x"}}']
)
def test_a_damaged_run_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, command: str
) -> None:
    make(tmp_path)
    put(tmp_path / "run.json", content)
    assert main([*command.split(), str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"cai-ray: {tmp_path}/run.json: ") and err.count("\n") == 1
    assert f"delete it and run `cai-ray run CONFIG --out {tmp_path}` again" in err


def test_an_unknown_key_in_run_json_is_named(tmp_path: Path) -> None:
    value = make(tmp_path).config.model_dump(mode="json")
    (tmp_path / "run.json").write_text(json.dumps({"config": {**value, "ppo": {"kl_cof": 1}}}))
    with pytest.raises(InputError, match=r"run\.json: unknown key 'ppo\.kl_cof'.*delete it and run"):
        open_run(str(tmp_path))


@pytest.mark.parametrize("content", NO_OBJECT)
def test_a_damaged_manifest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None
) -> None:
    make(tmp_path)
    put(tmp_path / "ppo" / "manifest.json", content)
    assert main(["status", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"cai-ray: {tmp_path}/ppo/manifest.json: ") and err.count("\n") == 1
    assert f"delete {tmp_path}/ppo and run the stage again" in err


DAMAGES = {
    "empty": lambda data: b"",
    "of something else": lambda data: b"junk\n",
    "half": lambda data: data[: len(data) // 2],
    "with a hole": lambda data: data[:100] + bytes(200) + data[300:],
    "with a flipped bit": lambda data: data[:300] + bytes([data[300] ^ 1]) + data[301:],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_of_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[bytes], bytes]
) -> None:
    run = make(tmp_path)
    rows = [{"id": f"{i:016x}", "response": f"how do i bake {i} cakes ?"} for i in range(200)]
    run.write_rows("revise", to_table(rows, Revision))
    path = tmp_path / "revise" / "part-00000.parquet"
    path.write_bytes(damage(path.read_bytes()))
    line = re.escape(f"{path}: is damaged (") + r"[^\n]+\); delete it, and its stage's manifest\.json[^\n]+"
    assert main(["explain", str(tmp_path), rows[0]["id"]]) == 2
    assert re.fullmatch(f"cai-ray: {line}\n", capsys.readouterr().err)
    with pytest.raises(InputError, match=line):
        list(run.each_row("revise"))
    journal = Journal(run, "revise", Revision, Revision, "part")
    files.copy(path, files.join(journal.folder, "done-0.parquet"))
    with pytest.raises(InputError, match=r"journal/part/done-0\.parquet: is damaged"):
        journal.finished_ids()


@pytest.mark.parametrize("content", NO_OBJECT)
def test_what_a_stage_keeps_beside_its_rows_is_damaged(tmp_path: Path, content: bytes | None) -> None:
    run = make(tmp_path)
    path = tmp_path / "label" / "certificate.json"
    remedy = "make it again with `cai-ray label CONFIG --overwrite`"
    with pytest.raises(InputError, match=re.escape(f"{path}: is missing; {remedy}")):
        run.facts("label", path.name)
    put(path, content)
    with pytest.raises(InputError, match=f"{re.escape(str(path))}: .+; {remedy}"):
        run.facts("label", path.name)


def test_damaged_metrics(tmp_path: Path) -> None:
    run = make(tmp_path)
    assert run.metrics("ppo") == []
    run.write_metrics("ppo", [{"step": 1}, {"step": 2}])
    assert [row["step"] for row in run.metrics("ppo")] == [1, 2]
    for content in (b'{"step": 1}\n{"ste', b"[1]\n", b"\xff\xfe"):
        put(tmp_path / "ppo" / "metrics.jsonl", content)
        with pytest.raises(InputError, match=r"metrics\.jsonl: .+; make it again with `cai-ray ppo CONFIG"):
            run.metrics("ppo")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


@pytest.mark.parametrize("damage", [*list(DAMAGES.values())[:3], lambda _: POINTER])
def test_weights_that_are_not_whole(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    """Of a download that broke off, or a clone without git-lfs: said before an engine or a trainer is started."""
    model = tmp_path / "model"
    tiny.save_model(model, "qwen2")
    assert local_model(str(model)) == str(model)
    weights = model / "model.safetensors"
    with pytest.raises(InputError, match=f"model {weights}: the folder has no config.json"):
        local_model(str(weights))
    weights.write_bytes(damage(weights.read_bytes()))
    with pytest.raises(
        InputError, match=rf"model {model}: model\.safetensors is not whole \(.+\); copy or make it"
    ):
        local_model(str(model))


def test_damaged_weights_are_not_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ray Serve would start each replica three times, and then name the deployment alone."""
    run = make(tmp_path)
    files.write_json(run.path("sft", "manifest.json"), {"id": "sft"})
    tiny.save_model(tmp_path / "sft" / "model", "qwen2")
    (tmp_path / "sft" / "model" / "model.safetensors").write_bytes(POINTER)
    assert main(["serve", str(tmp_path), "--models", "sl", "--no-auth"]) == 2
    assert re.search(
        r"^cai-ray: model .+/sft/model: model\.safetensors is not whole", capsys.readouterr().err, re.M
    )


def test_a_shard_is_missing(tmp_path: Path) -> None:
    tiny.save_model(tmp_path, "qwen2")
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    files.write_json(tmp_path / "model.safetensors.index.json", index)
    with pytest.raises(
        InputError, match=r"model-00002-of-00002\.safetensors is missing, which its index names"
    ):
        local_model(str(tmp_path))


@pytest.mark.parametrize("out", ["{", "}", "{}", "{nme}", "runs/{name}/{0}", "{name!r}", "", " "])
def test_an_out_that_is_no_directory_is_refused(out: str) -> None:
    with pytest.raises(InputError, match=r"^out") as e:
        Run(load_config("errand-town", out=out))
    assert "--out" in str(e.value) and out in str(e.value)


def test_the_name_stands_for_the_run() -> None:
    assert Run(load_config("errand-town", out="/x/{name}/{name}-1")).root == "/x/errand-town/errand-town-1"
