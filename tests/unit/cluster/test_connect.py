"""Starting Ray on a machine that is too busy for it."""

import os
import subprocess
import sys

import pytest
import ray

from cai_ray.cluster import connect
from cai_ray.compat import ray_start
from cai_ray.config.load import load_config
from cai_ray.errors import InputError

# Ray gives up on its first process at once, as it does after its usual wait on a busy machine.
NO_TIME = {"RAY_gcs_server_port_wait_time_s": "0"}


def test_a_machine_too_busy_to_start_ray_is_one_line_and_no_process_stays_behind():
    code = """
import sys, psutil, ray
from cai_ray.cli import main

starts = []
init = ray.init
ray.init = lambda **options: (starts.append(options), init(**options))
code = main(["constitution", "test", "errand-town"])
print(len(starts), [p.name() for p in psutil.Process().children(recursive=True)])
sys.exit(code)
"""
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | NO_TIME
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 1, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        "cai-ray: Ray did not start in time, in 2 attempts: this machine is busy (load average "
    )
    assert line.endswith("; run the same command again when it has less to do")
    assert done.stdout.splitlines() == ["2 []"]


def test_ray_is_given_more_time_than_by_default_but_not_against_the_environment(monkeypatch):
    environment = {"RAY_raylet_start_wait_time_s": "7"}
    monkeypatch.setattr(os, "environ", environment)
    ray_start.wait_longer()
    assert environment["RAY_raylet_start_wait_time_s"] == "7"
    assert int(environment["RAY_gcs_server_port_wait_time_s"]) > 30
    assert int(environment["RAY_raylet_client_num_connect_attempts"]) > 10


@pytest.mark.parametrize(
    "text",
    [
        "The current node timed out during startup. This could happen because …",
        "Timed out waiting for file /tmp/ray/session/gcs_server_port_1",
        "Failed to start GCS.  Last 0 lines of error files",
    ],
)
def test_a_start_that_took_too_long_is_tried_once_more(monkeypatch, text):
    def init(**options):
        begun.append(options)
        if len(begun) == 1:
            raise Exception(text)

    begun: list[dict] = []
    monkeypatch.setattr(ray, "init", init)
    assert ray_start.start_local(2, num_cpus=3)
    assert begun == [{"address": "local", "num_cpus": 3}] * 2


def test_another_failure_of_ray_is_not_taken_for_a_busy_machine(monkeypatch):
    def init(**options):
        raise ValueError("num_cpus must be positive")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ValueError, match="num_cpus"):
        ray_start.start_local(2)


@pytest.fixture
def local_start(monkeypatch):
    """What Ray would be started with on this machine, and the environment that its processes would inherit."""
    started = {}

    def start(attempts, **options):
        started.update(options, env=dict(os.environ))
        return True

    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"})
    monkeypatch.setattr(connect, "start_local", start)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    return started


def test_workers_of_a_local_cluster_inherit_their_environment(local_start):
    os.environ |= {"OMP_NUM_THREADS": "5", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "3"}
    os.environ.pop("VLLM_NO_USAGE_STATS", None)
    before = dict(os.environ)
    connect.connect(load_config("errand-town", ["engine.device=cpu"]))
    assert local_start["env"].items() >= connect.WORKER_ENV.items()
    assert local_start["env"]["OMP_WAIT_POLICY"] == "PASSIVE"
    assert local_start["runtime_env"] is None
    # This process keeps its own.
    assert {k: os.environ.get(k) for k in connect.WORKER_ENV} == {
        k: before.get(k) for k in connect.WORKER_ENV
    }


def test_a_server_starts_ray_with_the_environment_of_its_replicas(local_start):
    connect.connect(load_config("errand-town"), env={"RAYLLM_ENABLE_REQUEST_PROMPT_LOGS": "0"})
    assert local_start["env"]["RAYLLM_ENABLE_REQUEST_PROMPT_LOGS"] == "0"


@pytest.mark.parametrize("folder", ["my projects", "été", "a'b", "$(x)", "a;b", "(1)", "a&b"])
def test_an_interpreter_anywhere_is_quoted_for_the_shell(local_start, monkeypatch, tmp_path, folder):
    """Ray's own libraries start workers with runtime environments, and so through a shell."""
    (tmp_path / folder).mkdir()
    python = tmp_path / folder / "python"
    python.symlink_to("/bin/echo")
    monkeypatch.setattr(sys, "executable", str(python))
    connect.connect(load_config("errand-town"))
    command = f"exec {local_start['runtime_env']['py_executable']} worker"
    assert subprocess.check_output(["bash", "-c", command], text=True) == "worker\n"


@pytest.mark.parametrize(
    ("folder", "works"), [("my projects", False), ("a;b", False), ("été", True), ("a-b_1", True)]
)
def test_a_cluster_whose_shell_breaks_the_path_is_one_line(monkeypatch, folder, works):
    monkeypatch.setattr(sys, "executable", f"/home/me/{folder}/bin/python")
    connect.check_shell_path("ray://head:10001")  # Python is elsewhere there
    if works:
        connect.check_shell_path("auto")
        return
    with pytest.raises(
        InputError, match=f"^ray.address=auto: .*/home/me/{folder}/bin/python.*install cai_ray in"
    ):
        connect.check_shell_path("auto")
