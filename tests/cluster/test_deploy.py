"""A server deployed to a cluster by Ray's own command, from the file that `cai-ray serve --write-config` writes."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from cai_ray import constitution
from cai_ray.serve.constitutions import RELOAD_EVERY_S
from cai_ray.storage.run import Run
from tests.cluster.nodes import running, wait_until
from tests.e2e.command import BIN, ask, cai_ray, environment, free_port, refused, succeed

ASKED = [{"role": "user", "content": "how do i read the baker's diary ?"}]
PAIR = {"messages": ASKED, "response_a": "sure .", "response_b": "sorry , i will not help ."}


def test_serve_deploy(served_run: Run, tmp_path: Path) -> None:
    keys, file, port = tmp_path / "keys", tmp_path / "serve.yaml", free_port()
    add = ("serve", "--token-file", keys, "--add-token")
    user = succeed(*add, "user").stdout.strip()
    admin = succeed(*add, "ops", "--admin").stdout.strip()
    words = ("serve", served_run.root, "--token-file", keys, "--port", port, "--write-config", file)
    succeed(*words, "--set", "requests_per_minute=40", "--set", "max_tokens=8")
    assert user not in file.read_text() and admin not in file.read_text()
    address = f"http://127.0.0.1:{port}"
    with running("--num-cpus 16") as cluster:

        def serve(*words: object) -> subprocess.CompletedProcess[str]:
            command = [f"{BIN}/serve", *map(str, words), "--address", cluster.dashboard]
            return subprocess.run(command, env=cluster.env, capture_output=True, text=True, timeout=120)

        wait_until(lambda: serve("status").returncode == 0, cluster.said)
        done = serve("deploy", file)
        assert done.returncode == 0, done.stdout + done.stderr
        wait_until(lambda: "status: RUNNING" in serve("status").stdout, lambda: serve("status").stdout, 400)

        def as_(token: str) -> dict[str, str]:
            return {"Authorization": f"Bearer {token}"}

        status, answer = ask(f"{address}/v1/compare", PAIR, as_(user))
        assert status == 200 and answer["constitution"]["sha"] == constitution.load("errand-town").sha
        # The server's limit holds where a request names none.
        chat = {"messages": ASKED, "temperature": 0}
        status, answer = ask(f"{address}/v1/chat/completions", chat, as_(user))
        assert status == 200 and answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] == 8
        assert ask(f"{address}/v1/models", headers=as_("wrong"))[0] == 401
        # A user's key asks; another constitution needs one that may.
        new = constitution.load("errand-town").model_copy(update={"version": "2"})
        (tmp_path / "new.yaml").write_text(new.to_yaml())
        update = ("serve", "--update-constitution", tmp_path / "new.yaml", "--port", port)
        denied = cai_ray(*update, env=environment(CAI_RAY_TOKEN=user))
        assert "may not change the constitution" in refused(denied)
        succeed(*update, env=environment(CAI_RAY_TOKEN=admin))
        assert ask(f"{address}/v1/compare", PAIR, as_(user))[1]["constitution"]["version"] == "2"
        # And back, by the run's directory: an explanation sees it without any other request.
        succeed("serve", served_run.root, "--update-constitution", "errand-town")
        time.sleep(RELOAD_EVERY_S + 0.5)
        _, answer = ask(f"{address}/v1/chat/completions", chat | {"explain": True}, as_(admin))
        assert answer["explanation"]["constitution"]["version"] == "1"
        statuses = [ask(f"{address}/v1/models", headers=as_(user))[0] for _ in range(60)]
        assert 429 in statuses and set(statuses) == {200, 429}
        assert ask(f"{address}/v1/models", headers=as_(admin))[0] == 200
        assert serve("shutdown", "-y").returncode == 0
