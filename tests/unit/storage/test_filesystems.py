"""Object storage against a real S3 server on this machine, on days when requests fail."""

from __future__ import annotations

import json
import os
import pickle
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from cai_ray import pipeline
from cai_ray.cli import main
from cai_ray.data.sources import iter_rows
from cai_ray.errors import InputError
from cai_ray.generate import journal
from cai_ray.generate.journal import Journal
from cai_ray.provenance.inputs import _files_sha
from cai_ray.storage import files, filesystems, object_stores
from cai_ray.storage.arrow import to_table
from cai_ray.storage.filesystems import resolve
from cai_ray.storage.records import Revision, SftRow
from cai_ray.storage.run import Run
from cai_ray.storage.tables import iter_tables, read_tables, write_table
from tests.ray.engines import town_config
from tests.s3 import KEYS, S3, Fault

BIG = bytes(range(256)) * (48 << 10)  # 12 MB: sent in parts


@pytest.fixture(scope="module")
def server() -> Iterator[S3]:
    made = S3()
    yield made
    made.close()


@pytest.fixture
def s3(server: S3, monkeypatch: pytest.MonkeyPatch) -> S3:
    server.stand_in(monkeypatch, AWS_EC2_METADATA_DISABLED="true")
    return server


@pytest.fixture
def place(request: pytest.FixtureRequest, s3: S3) -> str:
    """A folder of the bucket for this test, which has been looked at."""
    uri = f"s3://bucket/{request.node.name}"
    files.exists(uri)
    return uri


def keys(place: str) -> list[str]:
    fs, path = resolve(place)
    found = fs.get_file_info(pafs.FileSelector(path, recursive=True, allow_not_found=True))
    return sorted(i.path[len(path) + 1 :] for i in found)


KINDS = ["500", "503", "slow", "cut the request", "cut the answer", "lose the answer"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["PUT", "GET", "HEAD", "POST"])
def test_what_fails_three_times_comes_through(place: str, s3: S3, kind: str, method: str) -> None:
    uri = files.join(place, "file")
    with s3.proxy.failing(Fault(kind, match=f"^{method} ", times=3, seconds=0.1)) as (fault,):  # type: ignore[arg-type]
        for _ in range(3):  # what is only slow, or lost when it does not matter, is not asked again
            files.write_bytes(uri, BIG)
            assert files.read_bytes(uri) == BIG
            assert files.exists(uri)
    assert fault.done == 3


@pytest.mark.parametrize("kind", ["500", "503"])
def test_an_error_that_is_longer_than_what_was_asked_for(
    place: str, s3: S3, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S3's client cannot hold it, and does not try again by itself."""
    for size in (1, 10, 60, 200):
        files.write_bytes(files.join(place, f"small-{size}"), b"x" * size)
        with s3.proxy.failing(Fault(kind, match="GET .*small", times=3)) as (fault,):  # type: ignore[arg-type]
            assert files.read_bytes(files.join(place, f"small-{size}")) == b"x" * size
        assert fault.done == 3
    rows = [{"id": "0"}, {"id": "1"}]
    write_table(files.join(place, "part-0.parquet"), pa.Table.from_pylist(rows))
    monkeypatch.setattr(filesystems, "_WHOLE_BYTES", 0)
    slice = journal.Slice("part", files.join(place, "part-0.parquet"), 0, 2)
    for read, wanted in (
        (lambda: read_tables(place).to_pylist(), rows),
        (lambda: [row for table in iter_tables(place, rows=1) for row in table.to_pylist()], rows),
        (slice.read, rows),
    ):
        # The footer is longer than an error; what is asked for after it is not.
        with s3.proxy.failing(Fault(kind, match="GET .*parquet", every=2, times=1)) as (fault,):  # type: ignore[arg-type]
            assert read() == wanted
        assert fault.done == 1


def test_no_thread_of_arrow_reads_by_python(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take the process down, were it to let go of what it read while the interpreter ends."""
    threads = set()
    read = filesystems._RetryingFile.read

    def noted(self: filesystems._RetryingFile, size: int | None = -1) -> bytes:
        threads.add(threading.get_ident())
        return read(self, size)

    monkeypatch.setattr(filesystems._RetryingFile, "read", noted)
    rows = [{"id": f"{i}", "prompt": f"how do i read diary {i} ?"} for i in range(9)]
    folder = files.join(place, "rows")
    write_table(files.join(folder, "part-0.parquet"), pa.Table.from_pylist(rows), row_group_rows=3)
    for whole in (filesystems._WHOLE_BYTES, 0):
        monkeypatch.setattr(filesystems, "_WHOLE_BYTES", whole)
        assert read_tables(folder).num_rows == 9
        assert sum(table.num_rows for table in iter_tables(folder)) == 9
        assert len(list(iter_rows(folder))) == 9
        assert len(journal.Slice("part", files.join(folder, "part-0.parquet"), 0, 3).read()) == 3
    assert threads <= {threading.get_ident()}


def test_how_it_is_tried_again_travels(s3: S3, place: str) -> None:
    """Ray Train's workers get the file system pickled; pyarrow's own would forget it, and give up after three."""
    files.write_bytes(files.join(place, "file"), b"here")
    fs, path = resolve(files.join(place, "file"))
    fs = pickle.loads(pickle.dumps(fs))
    with s3.proxy.failing(Fault("503", times=5)), fs.open_input_file(path) as f:
        assert f.read() == b"here"


def test_a_server_that_stays_away_is_one_line(s3: S3, place: str) -> None:
    with s3.proxy.failing(Fault("500", match="HEAD")), pytest.raises(OSError, match="AWS Error") as e:
        pafs.S3FileSystem(
            endpoint_override=s3.proxy.url, retry_strategy=pafs.AwsDefaultS3RetryStrategy(2)
        ).get_file_info("bucket/x")
    told = filesystems.refusal(e.value)
    assert told is not None and told.startswith("s3://bucket: S3 does not answer") and "\n" not in told
    assert filesystems.refusal(ValueError("no error of storage")) is None


@pytest.mark.parametrize(
    ("uri", "line"),
    [
        ("s3://none/run", "s3://none: the bucket does not exist; create it, or name another"),
        ("s3://", "names no bucket; give s3://bucket/folder"),
        ("s3:///run", "names no bucket"),
        ("s3://bucket/run?region=x", "settings are not read from a URI"),
        ("ftp://host/run", "cannot be opened .*; use a path, s3:// or gs://"),
    ],
)
def test_a_place_that_is_at_fault(s3: S3, uri: str, line: str) -> None:
    with pytest.raises(InputError, match=line):
        files.exists(files.join(uri, "run.json") if uri.endswith("/") else uri)


def test_a_server_that_is_not_there(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")  # counts before AWS_ENDPOINT_URL
    with pytest.raises(InputError, match=r"s3://bucket: http://127\.0\.0\.1:9 does not answer \(.*connect"):
        files.exists("s3://bucket/run")


def test_a_server_that_does_not_answer(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_stores, "_FIRST_ANSWER_S", 1.0)
    with s3.proxy.failing(Fault("slow", seconds=3)), pytest.raises(InputError, match="does not answer"):
        files.exists("s3://bucket/run")


def test_credentials_that_are_refused(s3: S3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with s3.guarded():
        with pytest.raises(InputError, match="access is denied to these credentials"):
            files.exists("s3://bucket/run")
        for name in KEYS:
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
        with pytest.raises(InputError, match="no credentials are found; set AWS_ACCESS_KEY_ID"):
            files.exists("s3://bucket/run")


def make_user(s3: S3, name: str, *actions: str) -> dict[str, str]:
    """A user of the server with these rights, and its keys."""
    import boto3

    iam = boto3.client(
        "iam",
        endpoint_url=f"http://127.0.0.1:{s3.server.get_host_and_port()[1]}",
        region_name="us-east-1",
        aws_access_key_id="test",
        aws_secret_access_key="secret",
    )
    iam.create_user(UserName=name)
    allow = {"Effect": "Allow", "Action": list(actions), "Resource": "*"}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [allow]})
    iam.put_user_policy(UserName=name, PolicyName="rights", PolicyDocument=policy)
    key = iam.create_access_key(UserName=name)["AccessKey"]
    return {"AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"]}


def test_credentials_of_the_usual_chain(s3: S3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    owner, reader = make_user(s3, "owner", "s3:*"), make_user(s3, "reader", "s3:Get*", "s3:List*")
    for name in KEYS:
        monkeypatch.delenv(name)
    profiles = {"default": reader, "cai": owner}
    (tmp_path / "credentials").write_text(
        "".join(
            f"[{profile}]\n" + "".join(f"{key.lower()} = {value}\n" for key, value in keys.items())
            for profile, keys in profiles.items()
        )
    )
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    with s3.guarded():
        run = Run(town_config(out="s3://bucket/chain"))
        with pytest.raises(
            InputError, match=r"out s3://bucket/chain: cannot be written \(.*access is denied"
        ):
            pipeline._check_writable(run)
        with monkeypatch.context() as patch:
            patch.setenv("AWS_PROFILE", "cai")
            object_stores._stores.clear()
            pipeline._check_writable(run)
            files.write_bytes(run.path("here"), b"1")
        with monkeypatch.context() as patch:
            for name, value in owner.items():
                patch.setenv(name, value)
            object_stores._stores.clear()
            assert files.read_bytes(run.path("here")) == b"1"
        with monkeypatch.context() as patch:
            patch.setenv("AWS_ACCESS_KEY_ID", "nobody")
            patch.setenv("AWS_SECRET_ACCESS_KEY", "none")
            object_stores._stores.clear()
            with pytest.raises(InputError, match="access is denied to these credentials"):
                files.read_bytes(run.path("here"))


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("status s3://none/run", "s3://none: the bucket does not exist; create it, or name another"),
        ("status s3://bucket/run", "s3://bucket/run: no run here (run.json is missing)"),
        ("status s3://", "s3:///run.json: names no bucket; give s3://bucket/folder"),
        ("export s3://bucket/run --out s3://none/x", "s3://bucket/run: no run here"),
        ("revise errand-town --out s3://none/run", "s3://none: the bucket does not exist"),
        (
            "revise errand-town --out s3://bucket/run --set model=s3://bucket/none",
            "model s3://bucket/none: no such folder",
        ),
        (
            'revise errand-town --out s3://bucket/run --set prompts=[{"path":"s3://bucket/none.jsonl"}]',
            "s3://bucket/none.jsonl: no such file",
        ),
    ],
)
def test_what_the_command_says(s3: S3, capsys: pytest.CaptureFixture[str], words: str, line: str) -> None:
    assert main([*words.split()]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"cai-ray: {line}")


def test_a_server_that_fails_on_the_way_is_one_line(
    s3: S3, place: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(town_config(out=place))
    files.write_json(run.path("run.json"), {"config": run.config.model_dump(mode="json")})
    object_stores._stores.clear()
    monkeypatch.setattr(object_stores, "ATTEMPTS", 1)
    with s3.proxy.failing(Fault("500", match="HEAD .*manifest")):
        assert main(["status", place]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        r"cai-ray: s3://bucket: S3 does not answer .*; the same command goes on from here", said
    )


def test_an_object_may_be_read_where_the_bucket_may_not_be_listed(s3: S3, place: str) -> None:
    files.write_bytes(files.join(place, "open"), b"to all")
    object_stores._stores.clear()
    with s3.proxy.failing(Fault("403", match="GET .*list-type")):
        assert files.read_bytes(files.join(place, "open")) == b"to all"
        object_stores._stores.clear()
        with pytest.raises(InputError, match="access is denied"):
            files.read_bytes(files.join(place, "closed"))


def test_what_files_cost(s3: S3, place: str) -> None:
    """No folders are made, a small file is one request, and a large one is not read bit by bit."""
    with s3.proxy.counting() as written:
        files.write_bytes(files.join(place, "a", "b", "c"), b"small")
    with s3.proxy.counting() as read:
        files.read_bytes(files.join(place, "a", "b", "c"))
    assert (written, read) == ({"PUT": 1}, {"HEAD": 1, "GET": 1})
    lines = b"".join(b'{"prompt": "%d"}\n' % i for i in range(200_000))
    files.write_bytes(files.join(place, "prompts.jsonl"), lines)
    with s3.proxy.counting() as read:
        assert sum(1 for _ in iter_rows(files.join(place, "prompts.jsonl"))) == 200_000
    assert read["GET"] <= 3
    assert [k for k in keys(place) if k.endswith("/")] == []


def test_a_request_counts_where_it_came(s3: S3, place: str) -> None:
    """Of a client that did not wait, the answer may be given while another test counts."""
    uri = files.join(place, "file")
    files.write_bytes(uri, b"here")
    with s3.proxy.failing(Fault("slow", seconds=0.5)) as (fault,):
        asking = threading.Thread(target=files.exists, args=(uri,))
        asking.start()
        while not fault.done:
            time.sleep(0.01)
    with s3.proxy.counting() as asked:
        asking.join()
    assert (s3.proxy.asked[-1].status, asked) == (200, {})


def test_what_a_journal_costs(s3: S3, place: str) -> None:
    """A file of finished rows is read with two requests; a slice to walk with three."""
    run = Run(town_config(out=place))
    journal.begin(run, "revise", {"seed": "0"})
    made, blocks = Journal(run, "revise", Revision, Revision, "part"), 6
    rows = [{"id": f"{i:016x}", "response": "fine", "usage": {"calls": 1}} for i in range(16 * blocks)]
    (slice, *_) = made.plan(rows)
    with s3.proxy.counting() as asked:
        for i in range(blocks):
            made.write(rows[16 * i : 16 * i + 16])
    assert asked == {"PUT": blocks}
    with s3.proxy.counting() as asked:
        assert made.finished_ids() == {row["id"] for row in rows}
    assert asked == {"HEAD": blocks, "GET": 1 + blocks}
    with s3.proxy.counting() as asked:
        assert len(slice.read()) == slice.rows
    assert asked.total() <= 3
    with s3.proxy.counting() as asked:
        assert made.publish().rows == len(rows)
    # Once for ids and once for rows; and one look at what an attempt before may have published.
    assert asked == {"HEAD": 2 * blocks, "GET": 2 * (1 + blocks) + 1, "PUT": 1}
    assert [r["id"] for r in run.rows("revise")] == sorted(row["id"] for row in rows)


def test_a_folder_is_made_the_same_as_another(place: str, tmp_path: Path) -> None:
    (tmp_path / "model" / "below").mkdir(parents=True)
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "below" / "big").write_bytes(BIG)
    uri = files.join(place, "model")
    files.write_bytes(files.join(uri, "model-00003-of-00003.safetensors"), b"of an attempt with other shards")
    files.upload_folder(tmp_path / "model", uri)
    assert files.list_files(uri, recursive=True) == [
        f"{resolve(uri)[1]}/{name}" for name in ("below/big", "config.json")
    ]
    # Within the store, and back.
    files.upload_folder(uri, files.join(place, "again"))
    assert Path(files.local_folder(files.join(place, "again")), "below", "big").read_bytes() == BIG


def test_a_copy_that_fails_leaves_nothing_behind(s3: S3, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An upload cannot be given up: what had come would otherwise stand there as if it were whole."""
    monkeypatch.setattr(filesystems, "COPY_BYTES", 1 << 20)
    files.write_bytes(files.join(place, "whole"), BIG)
    _, source = resolve(files.join(place, "whole"))
    impatient = pafs.S3FileSystem(
        endpoint_override=s3.proxy.url, retry_strategy=pafs.AwsDefaultS3RetryStrategy(0)
    )
    fs, target = resolve(files.join(place, "half"))
    with (
        s3.proxy.failing(Fault("500", every=3, match="GET .*whole")),
        pytest.raises(OSError, match="AWS Error"),
    ):
        filesystems.copy_file(impatient, source, fs, target)
    assert keys(place) in (["whole"], ["", "whole"])


def test_a_model_is_copied_once_by_all_processes_of_a_node(
    s3: S3, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(tmp_path))
    files.write_bytes(files.join(place, "config.json"), b"{}")
    files.write_bytes(files.join(place, "model.safetensors"), BIG)
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(files.local_folder(place))) for _ in range(4)]
    # The first is cut off in the middle; what it left is no model.
    with (
        s3.proxy.counting() as asked,
        s3.proxy.failing(Fault("slow", match="GET .*safetensors", seconds=0.5)),
    ):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(set(found)) == 1 and len(found) == 4
    assert Path(found[0], "model.safetensors").read_bytes() == BIG
    assert asked["HEAD"] == 2  # each file once
    files.write_bytes(files.join(place, "config.json"), b'{"new": 1}')
    assert json.loads(Path(files.local_folder(place), "config.json").read_text()) == {"new": 1}


def test_half_a_copy_of_a_killed_process_is_no_model(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(tmp_path))
    files.write_bytes(files.join(place, "config.json"), b"{}")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            files.local_folder(place)
    (left,) = tmp_path.rglob("*.part")
    (left / "leftover.safetensors").write_bytes(b"half")
    assert os.listdir(files.local_folder(place)) == ["config.json"]


def test_nothing_at_a_uri_is_no_id_of_the_hub(place: str) -> None:
    with pytest.raises(InputError, match=r"model s3://.*: no such folder; give a Hugging Face folder or id"):
        Run(town_config(out=place, model=f"{place}/none")).model("base")


def test_prompts_in_every_format(place: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"how do i read diary {i} ?"} for i in range(3000)]
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "p.parquet")
    with pa.ipc.new_stream(tmp_path / "p.arrow", table.schema) as sink:
        sink.write_table(table, max_chunksize=500)
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "p.csv").write_text("\n".join(["prompt", *(row["prompt"] for row in rows)]))
    import gzip

    (tmp_path / "p.jsonl.gz").write_bytes(gzip.compress((tmp_path / "p.jsonl").read_bytes()))
    files.upload_folder(tmp_path, place)
    for name in ("p.parquet", "p.arrow", "p.jsonl", "p.csv", "p.jsonl.gz", "p.js*l"):
        assert list(iter_rows(files.join(place, name))) == rows, name
    with pytest.raises(InputError, match=r"s3://.*/none\.jsonl: no such file"):
        list(iter_rows(files.join(place, "none.jsonl")))


def test_prompts_are_read_once_however_many_stages_ask_whether_they_changed(s3: S3, place: str) -> None:
    uri = files.join(place, "prompts.jsonl")
    files.write_bytes(uri, b'{"prompt": "a"}\n')
    with s3.proxy.counting() as asked:
        (same,) = {_files_sha(uri) for _ in range(5)}
    assert asked["GET"] == 1
    files.write_bytes(uri, b'{"prompt": "ab"}\n')
    assert _files_sha(uri) != same


def test_rows_of_a_stage_in_their_order(place: str) -> None:
    run = Run(town_config(out=place))
    for part in (1, 0):
        run.write_rows("sft", to_table([{"id": f"{part}{i}"} for i in range(3)], SftRow), part)
    assert [r["id"] for r in run.rows("sft", ["id"])] == ["00", "01", "02", "10", "11", "12"]
    files.delete(run.path("sft"))
    assert not files.exists(run.path("sft")) and files.list_files(run.path("sft")) == []
    files.delete(run.path("sft"))  # nothing there is no error
