"""Puts a run's policies, critic and reward model on Ray Serve, as one application behind one address."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import urllib.error
import urllib.request
from typing import Any

import yaml

from cai_ray import constitution as constitutions
from cai_ray.cluster.connect import cluster_address, connect, disconnect, on_gpu, uses_gpu, worker_env
from cai_ray.cluster.placement import ResourceNeed, check
from cai_ray.cluster.threads import Crowd
from cai_ray.cluster.worker_errors import input_error
from cai_ray.config.run import RunConfig
from cai_ray.engine.http_client import is_on_this_machine
from cai_ray.errors import InputError
from cai_ray.prompts.check import check_judge
from cai_ray.prompts.load import load_templates
from cai_ray.serve.settings import ServeSettings, load
from cai_ray.stages import POLICIES, ROLES, maker_of
from cai_ray.storage import files
from cai_ray.storage.pins import pin, pin_section
from cai_ray.storage.run import Run, open_run

APPLICATION = "cai-ray"


def serve(settings: ServeSettings, host: str, port: int, metrics_port: int | None = None) -> None:
    """Serves a run until interrupted. Requests that have begun are then answered first.

    Raises:
        InputError: the run has no policy, one of its models is damaged, or the address is taken.
    """
    os.environ.setdefault(
        "VLLM_LOGGING_LEVEL", "ERROR"
    )  # of this process; replicas have their own environment
    run = open_run(settings.run)
    settings = complete(run, settings)
    _check_free(host, port)
    env = environment(run.config, settings)
    connect(run.config, metrics_port, env)
    _check_room(run, settings)
    from ray import serve as ray_serve

    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # replicas log where they run
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    parts = [*settings.models, "the critic", *(["the reward model"] if run.manifest("rm") else [])]
    print(f"starting {', '.join(parts)}", file=sys.stderr, flush=True)
    try:
        options = {"host": host, "port": port, "request_timeout_s": settings.timeout_s + 60}
        ray_serve.start(http_options=options)
        try:
            # A local cluster was started with the environment.
            runtime_env = {"env_vars": env} if cluster_address(run.config) else None
            ray_serve.run(build(run, settings, runtime_env), name=APPLICATION, route_prefix="/")
        except RuntimeError as e:
            # Ray names the deployments that did not start. The reason is in their replicas' messages.
            status = ray_serve.status().applications.get(APPLICATION)
            messages = [d.message for d in status.deployments.values()] if status else []
            raise input_error("\n".join(messages)) or RuntimeError("\n".join([str(e), *messages])) from e
        names = ", ".join([*settings.models, *settings.adapters])
        print(f"serving {run.config.name} ({names}) at http://{host}:{port}/v1", file=sys.stderr, flush=True)
        stop.wait()
        print("finishing the requests that have begun", file=sys.stderr, flush=True)
        ray_serve.delete(APPLICATION)  # it waits for requests, while the proxies still carry their answers
    finally:
        if cluster_address(run.config):  # a local cluster ends with all that runs on it
            ray_serve.shutdown()
        disconnect()


def application(args: dict[str, Any]) -> Any:
    """The application that a Serve config file names by `import_path`, with the settings as its `args`."""
    settings = load(args)
    run = open_run(settings.run)
    settings = complete(run, settings)
    return build(run, settings, {"env_vars": environment(run.config, settings)})


def complete(run: Run, settings: ServeSettings) -> ServeSettings:
    """The settings with the default models and the keys of the token file, checked against the run.

    Raises:
        InputError: a model is not trained yet or damaged, an adapter cannot be served, or there is no key.
    """
    from cai_ray.serve.keys import read_file

    settings = pin_section(settings, pin(run.config).commits)
    models = settings.models or (_most_trained(run),)
    judge = settings.judge_of(run.config)
    for role in (*models, *({judge.model} & ROLES.keys() - {*models})):
        stage = maker_of(role, run.config.method)
        if stage and run.manifest(stage) is None:
            raise InputError(
                f"{run.root}: no {role} policy is trained yet; run `cai-ray run` up to {stage} first"
            )
    for model in (*models, judge, *(["rm"] if run.manifest("rm") else [])):
        run.resolve_model(model).check()
    check_judge(load_templates(judge.templates or run.config.templates), judge, "judge")
    if settings.adapters:
        from cai_ray.serve.policy import adapter_rank

        for path in settings.adapters.values():
            adapter_rank(path)
    keys = settings.keys
    if settings.token_file:
        keys += read_file(settings.token_file)
    if not keys and not settings.no_auth:
        raise InputError(
            "serve: no key is given; set `token_file` or `keys`, or `no_auth` on a loopback address"
        )
    return settings.model_copy(update={"models": models, "keys": keys, "token_file": None})


def _most_trained(run: Run) -> str:
    for role in reversed(POLICIES):
        stage = maker_of(role, run.config.method)
        if stage and run.manifest(stage) is not None:
            return role
    raise InputError(
        f"{run.root}: no policy is trained yet; run `cai-ray run` up to sft or {run.config.method} first"
    )


def build(run: Run, settings: ServeSettings, runtime_env: dict[str, Any] | None = None) -> Any:
    """The Serve application of settings that are complete.

    Args:
        runtime_env: that of all replicas; None on a cluster that was started with their environment.
    """
    from ray import serve as ray_serve
    from ray.serve.llm import build_llm_deployment

    from cai_ray.serve.api import make_ingress
    from cai_ray.serve.critic import Critic, Scorer
    from cai_ray.serve.policy import Policy, describe_policy

    resources = _resources(run, settings)
    engines = [need for name, need in _needs(run, settings) if name not in ("scorer", "ingress")]
    crowd = Crowd(tuple(engines), spread=True)

    def deployment(kind: Any, name: str, **options: Any) -> Any:
        actor = {"num_cpus": resources[name].get("CPU", 0), "num_gpus": resources[name].get("GPU", 0)}
        return ray_serve.deployment(
            kind,
            name=name,
            graceful_shutdown_timeout_s=settings.drain_s,
            ray_actor_options=actor | ({"runtime_env": runtime_env} if runtime_env else {}),
            **options,
        )

    critic = deployment(Critic, "critic", max_ongoing_requests=64, **settings.critic.options())
    scorer = None
    if "scorer" in resources:
        scorer = deployment(Scorer, "scorer", max_ongoing_requests=64).bind(run)
    policies = {
        role: build_llm_deployment(
            describe_policy(run, role, settings, runtime_env=runtime_env),
            deployment_cls=Policy,
            name_prefix="policy-",
            bind_kwargs={"run": run, "role": role, "settings": settings, "crowd": crowd},
        )
        for role in settings.models
    }
    ingress = deployment(
        make_ingress(settings), "ingress", max_ongoing_requests=1000, **settings.ingress.options()
    )
    return ingress.bind(
        llm_deployments=policies,
        critic=critic.bind(run, settings.judge_of(run.config), crowd),
        scorer=scorer,
        run=run,
        settings=settings,
    )


def environment(config: RunConfig, settings: ServeSettings) -> dict[str, str]:
    """Environment variables of every replica."""
    return worker_env(config) | {"RAYLLM_ENABLE_REQUEST_PROMPT_LOGS": str(int(settings.log_prompts))}


def _resources(run: Run, settings: ServeSettings) -> dict[str, dict[str, float]]:
    """The resources of one replica of each deployment."""
    gpu, engine = uses_gpu(run.config), run.config.engine
    judge_engine = run.resolve_model(settings.judge_of(run.config)).engine
    # A replica of Ray Serve LLM has a CPU of its own beside those of its engine.
    policy = {"CPU": 1 + engine.cpus_per_actor} | ({"GPU": 1.0} if gpu else {})
    resources: dict[str, dict[str, float]] = {f"policy-{role}": policy for role in settings.models}
    resources["critic"] = {"CPU": judge_engine.cpus_per_actor}
    if on_gpu(judge_engine):
        resources["critic"]["GPU"] = judge_engine.span
    if run.manifest("rm") is not None:
        resources["scorer"] = {"CPU": 1.0} | ({"GPU": 1.0} if gpu else {})
    return resources | {"ingress": {"CPU": 1}}


def _needs(run: Run, settings: ServeSettings) -> list[tuple[str, ResourceNeed]]:
    """The replicas of each deployment that the server starts with."""
    copies = {"ingress": settings.ingress.min, "critic": settings.critic.min, "scorer": 1}
    return [
        (name, ResourceNeed(replica, copies.get(name, settings.policy.min)))
        for name, replica in _resources(run, settings).items()
    ]


def _check_room(run: Run, settings: ServeSettings) -> None:
    """Stops at once if the cluster is too small; Serve would wait for ever."""
    engine, needs = run.config.engine, []
    for name, need in _needs(run, settings):
        needs.append(need)
        # Each GPU has a bundle. The replica is in the first one.
        if name.startswith("policy-") and engine.span > 1:
            more = {**need.bundle, "CPU": engine.cpus_per_actor}
            needs.append(ResourceNeed(more, need.number * (engine.span - 1)))
    remedy = "serve fewer models or replicas, or use larger nodes (ray.cpus on this machine)"
    check(run.config, f"serve {','.join(settings.models)}", needs, remedy)


def write_config(settings: ServeSettings, host: str, port: int, path: str) -> None:
    """Writes a Serve config file, for `serve deploy` and for RayService on Kubernetes.

    It holds only hashes of tokens.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    run = open_run(settings.run)
    settings = complete(run, settings).model_copy(update={"run": run.root})
    deployed = {
        "name": APPLICATION,
        "route_prefix": "/",
        "import_path": f"{application.__module__}:{application.__name__}",
        "runtime_env": {"env_vars": worker_env(run.config)},
        "args": settings.model_dump(mode="json", exclude_defaults=True),
    }
    document = {
        "proxy_location": "EveryNode",
        "http_options": {"host": host, "port": port, "request_timeout_s": settings.timeout_s + 60},
        "applications": [deployed],
    }
    text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=110)
    files.write_bytes(path, text.encode())


def update_constitution(
    file: str, run: str | None, host: str, port: int, token: str | None
) -> dict[str, Any]:
    """Gives running servers another constitution: all servers of a run, or the one at an address.

    Args:
        run: the run's directory; None for the server at the address.

    Returns:
        Name, version and hash of the constitution that is the current one now.

    Raises:
        InputError: the file is not a constitution, or the server does not answer or refuses it.
    """
    from cai_ray.serve.constitutions import identity, put

    document = constitutions.load(file)
    if run is not None:
        put(open_run(run), document)
        return identity(document)
    url = f"http://{host}:{port}/v1/constitution"
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    body = json.dumps({"document": document.model_dump(mode="json")}).encode()
    request = urllib.request.Request(url, body, headers, method="PUT")
    proxies: dict[str, str] | None = {} if is_on_this_machine(url) else None  # None: those of the environment
    opener = urllib.request.build_opener(urllib.request.ProxyHandler(proxies))
    try:
        with opener.open(request, timeout=60) as answer:
            current: dict[str, Any] = json.load(answer)["constitution"]
            return current
    except urllib.error.HTTPError as e:
        message = json.loads(e.read() or b"{}").get("error", {}).get("message", e.reason)
        raise InputError(f"{url}: {message}") from e
    except (OSError, ValueError) as e:
        raise InputError(f"{url}: no server answers there ({e}); give --host and --port, or the run") from e


def _check_free(host: str, port: int) -> None:
    import socket

    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((host, port))
        except (OSError, OverflowError, TypeError) as e:  # the last two: not a port, not a name
            reason = getattr(e, "strerror", None) or e
            raise InputError(f"--host {host} --port {port}: {reason}; choose another") from e
