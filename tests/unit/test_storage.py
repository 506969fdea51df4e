"""Run directories that are damaged, or whose name is at fault: the file and the remedy, and no traceback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cai_ray import config, storage
from cai_ray.cli import main
from cai_ray.errors import InputError
from cai_ray.storage import Run, open_run

FOLDER = None
NO_OBJECT = [b"{", b"", b"[]", b"{}", b"null", b"\x93NUMPY\x00\xff", b"[" * 100_000, FOLDER]


def make(out: Path) -> Run:
    run = Run(config.load("errand-town", out=str(out)))
    storage.write_json(run.path("run.json"), {"config": run.config.model_dump(mode="json")})
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


@pytest.mark.parametrize("out", ["{", "}", "{}", "{nme}", "runs/{name}/{0}", "{name!r}", "", " "])
def test_an_out_that_is_no_directory_is_refused(out: str) -> None:
    with pytest.raises(InputError, match=r"^out") as e:
        Run(config.load("errand-town", out=out))
    assert "--out" in str(e.value) and out in str(e.value)


def test_the_name_stands_for_the_run() -> None:
    assert Run(config.load("errand-town", out="/x/{name}/{name}-1")).root == "/x/errand-town/errand-town-1"
