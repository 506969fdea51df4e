"""Models and datasets of the hub, with its own library and a small hub on this machine."""

import json
from pathlib import Path

import pytest

from cai_ray.config.load import validate
from cai_ray.config.run import RunConfig
from cai_ray.data.sources import iter_rows
from cai_ray.errors import InputError
from cai_ray.storage import hub as ours
from cai_ray.storage.files import write_json
from cai_ray.storage.models import local_model, model_sha
from cai_ray.storage.pins import COMMITS, pin
from tests import tiny
from tests.hub import TOKEN, Hub


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with what the hub's repositories hold beside it."""
    model = tiny.save_model(tmp_path_factory.mktemp("model"))
    (model / "original").mkdir()
    for name in ("pytorch_model.bin", "original/params.json", "consolidated.safetensors", "README.md"):
        (model / name).write_text("not for us")
    return model


def config(model: str, out: Path, **more: object) -> RunConfig:
    data = {"name": "t", "out": str(out), "model": model, "constitution": "harmless"}
    return validate({**data, "prompts": [{"path": "x.jsonl"}], **more}, "test")


def test_a_model_is_named_by_commit_once(hub: Hub, folder: Path, tmp_path: Path) -> None:
    first = hub.publish("org/name", folder)
    second = hub.publish("org/name", folder, "v2")
    pinned = pin(config("org/name@v2", tmp_path / "run"))
    assert pinned.config.model == f"org/name@{second}"
    assert pinned.commits == {"org/name@v2": second}
    write_json(tmp_path / "run" / "run.json", {"config": {}, COMMITS: pinned.commits})
    third = hub.publish("org/name", folder, "v2")
    _forget()
    assert pin(config("org/name@v2", tmp_path / "run")).config == pinned.config, "the run keeps its commit"
    assert pin(config("org/name@v2", tmp_path / "another")).config.model == f"org/name@{third}"
    asked = len(hub.requests)
    assert pin(config(f"org/name@{first}", tmp_path / "run")).config.model == f"org/name@{first}"
    assert len(hub.requests) == asked, "a commit is what it is"
    shas = {model_sha(f"org/name@{commit}") for commit in (first, second, third)}
    assert len(shas) == 3 and len(hub.requests) == asked


def test_every_model_and_dataset_of_a_configuration_is_named_by_commit(
    hub: Hub, folder: Path, tmp_path: Path
) -> None:
    model = hub.publish("org/model", folder)
    data = hub.publish("org/data", {"train.jsonl": b'{"prompt": "Hi"}\n'}, dataset=True)
    file = "hf://datasets/org/data/train.jsonl"
    endpoint = {"kind": "openai", "base_url": "http://localhost:1/v1"}
    given = config(
        "org/model",
        tmp_path / "run",
        prompts=[{"path": file}, {"path": str(folder)}],
        sft={"init": "org/model"},
        label={"judge": {"model": "org/model"}, "gold": file},
        rm={"init": "sl", "human": [{"path": file}]},
        ppo={
            "rewards": [{"model": "rm"}, {"model": "org/model"}],
            "watch": {
                "every": 1,
                "prompts": [{"path": file}],
                "judge": {"model": "gpt/five", "engine": endpoint},
            },
        },
        evaluate={"prompts": [{"path": file}], "sets": [{"name": "s", "path": file, "kind": "comparisons"}]},
    )
    pinned = pin(given).config
    text = json.dumps(pinned.model_dump(mode="json"))
    assert text.count(f"org/model@{model}") == 4 and text.count("org/model") == 4
    assert text.count(f"hf://datasets/org/data@{data}/train.jsonl") == 6 and text.count("org/data") == 6
    assert pinned.ppo.watch.judge and pinned.ppo.watch.judge.model == "gpt/five"
    assert pinned.prompts[1].path == str(folder)
    assert pinned.rm.init == "sl" and pinned.ppo.rewards[0].model == "rm"


def test_only_what_is_needed_is_fetched_and_only_once(hub: Hub, folder: Path) -> None:
    name = f"org/name@{hub.publish('org/name', folder)}"
    small = Path(local_model(name, weights=False))
    assert not list(small.glob("*.safetensors")) and (small / "tokenizer.json").exists()
    fetched = Path(local_model(name))
    assert fetched == small
    needed = {p.name for p in folder.iterdir() if p.suffix in (".json", ".jinja", ".safetensors")}
    assert {p.name for p in fetched.iterdir()} == needed - {"consolidated.safetensors"}
    assert sorted(hub.downloads()) == sorted(needed - {"consolidated.safetensors"})
    assert (fetched / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_without_the_hub_the_cache_is_enough(
    hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.publish("org/name", folder)
    hub.publish("org/data", {"a.jsonl": b'{"prompt": "Hi"}\n'}, dataset=True)
    path = str(ours.pin(ours.parse_dataset("hf://datasets/org/data")))
    fetched, rows = local_model(f"org/name@{commit}"), list(iter_rows(path))
    hub.close()
    _forget()
    assert local_model(f"org/name@{commit}") == fetched
    assert list(iter_rows(path)) == rows == [{"prompt": "Hi"}]
    assert pin(config("org/name", tmp_path / "run")).config.model == f"org/name@{commit}"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    _forget()
    assert local_model(f"org/name@{commit}") == fetched
    for name in ("org/other", f"org/name@{'0' * 40}"):
        with pytest.raises(
            InputError, match=r"not in this machine's cache .* HF_HUB_OFFLINE is set; unset it"
        ):
            local_model(name)


def test_a_hub_that_does_not_answer_is_one_line(hub: Hub, tmp_path: Path) -> None:
    hub.close()
    for ask in (
        lambda: pin(config("org/name", tmp_path / "run")),
        lambda: local_model("org/name"),
        lambda: local_model(f"org/name@{'0' * 40}"),
        lambda: list(iter_rows("hf://datasets/org/data/a.jsonl")),
    ):
        with pytest.raises(
            InputError, match=r"cannot be reached; connect this machine for the first run"
        ) as e:
            ask()
        assert "\n" not in str(e.value)


def test_a_gated_model_names_its_page_and_the_token(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"org/name@{hub.publish('org/name', folder, gated=True)}"
    for token in (None, "hf_of_somebody_else"):
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(
            InputError, match=rf"is gated; accept its licence at {hub.url}/org/name and set HF_TOKEN"
        ):
            local_model(name)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert (Path(local_model(name)) / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "org/nmae",
            r"model org/nmae: no such folder here, and no such model at http.*; correct the name, or set HF_TOK",
        ),
        ("org/name@v9", r"has no revision 'v9'; name a branch, tag or commit of http"),
        (
            "org/pickles",
            r"its weights are pickle files \(pytorch_model.bin\), and only safetensors are read; name a rev",
        ),
        (
            "org/no/such/folder",
            r"model org/no/such/folder: no such folder; give a Hugging Face folder, or an id",
        ),
        ("./here", r"no such folder"),
        ("org/na--me", r"not a name of the hub"),
        ("org/cut", r"model.safetensors is not whole"),
        ("org/empty", r"has no config.json"),
    ],
)
def test_what_cannot_be_a_model_is_one_line(hub: Hub, folder: Path, name: str, says: str) -> None:
    hub.publish("org/name", folder)
    files = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    hub.publish("org/pickles", {n: data for n, data in files.items() if not n.endswith(".safetensors")})
    hub.publish("org/cut", files | {"model.safetensors": files["model.safetensors"][:-9]})
    hub.publish("org/empty", {"README.md": b"Soon."})
    with pytest.raises(InputError, match=says) as e:
        local_model(name)
    assert "\n" not in str(e.value)


def test_a_check_sees_pickles_without_fetching_weights(hub: Hub, folder: Path) -> None:
    files = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    hub.publish("org/pickles", {n: data for n, data in files.items() if not n.endswith(".safetensors")})
    with pytest.raises(InputError, match="pickle"):
        local_model("org/pickles", weights=False)


def test_files_folders_and_patterns_of_a_dataset(hub: Hub) -> None:
    def line(text: str) -> bytes:
        return json.dumps({"prompt": text}).encode() + b"\n"

    files = {"data/train-0.jsonl": line("a"), "data/train-1.jsonl": line("b"), "data/test-0.jsonl": line("c")}
    hub.publish("org/data", files | {"README.md": b"# Data", "loader.py": b"1/0"}, dataset=True)
    start = "hf://datasets/org/data"

    def prompts(path: str) -> list[str]:
        return [row["prompt"] for row in iter_rows(path)]

    assert prompts(f"{start}/data/test-0.jsonl") == ["c"]
    assert hub.downloads() == ["data/test-0.jsonl"]
    assert prompts(f"{start}@main/data/train-*.jsonl") == ["a", "b"]
    assert prompts(f"{start}/data") == ["c", "a", "b"]
    assert "loader.py" not in hub.downloads()
    for path, says in (
        (start, r"its rows are in folders; name one of them \(data\)"),
        (f"{start}/other.jsonl", r"no such file or folder in the dataset; look at http"),
        (f"{start}/data/valid-*.jsonl", r"no such files"),
        ("hf://datasets/org", r"write a dataset of the hub as hf://datasets/ORG/NAME"),
        ("hf://models/org/data", r"write a dataset of the hub as"),
        ("hf://datasets/org/dtaa", r"dataset .*: no such dataset at"),
        (f"{start}@v7", r"has no revision 'v7'"),
    ):
        with pytest.raises(InputError, match=says) as e:
            prompts(path)
        assert "\n" not in str(e.value)


def test_every_format_that_is_read_is_fetched() -> None:
    from cai_ray.data.formats import FORMATS

    assert set(FORMATS) <= set(ours.ROWS)


def _forget() -> None:
    """What another process would know."""
    ours.pin.cache_clear()
