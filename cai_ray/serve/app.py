"""Puts policy, critic and reward model of a run on Ray Serve, as one application behind one address."""

from __future__ import annotations

import signal
import sys
import threading
from typing import Any

from cai_ray import cluster
from cai_ray.config import RunConfig
from cai_ray.errors import InputError
from cai_ray.storage import Run

APPLICATION = "cai-ray"


def serve(run: Run, host: str, port: int, token: str | None, blocking: bool = True) -> str:
    """Serves a run until interrupted, or, not blocking, returns the address once everything answers.

    Args:
        token: the bearer token that every request needs; None switches authentication off.

    Raises:
        InputError: the run has no policy, or the address is taken.
    """
    role = policy_role(run)
    _check_free(host, port)
    cluster.connect(run.config)
    from ray import serve as ray_serve

    ray_serve.start(http_options={"host": host, "port": port})
    ray_serve.run(build(run, role, token), name=APPLICATION, route_prefix="/")
    address = f"http://{host}:{port}"
    print(f"serving {run.config.name} ({role}) at {address}/v1", file=sys.stderr)
    if blocking:
        stop = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        try:
            stop.wait()
        finally:
            ray_serve.shutdown()
            cluster.disconnect()
    return address


def policy_role(run: Run) -> str:
    """The policy furthest in training.

    Raises:
        InputError: the run has none yet.
    """
    for role, stage in {"rl": run.config.method, "sl": "sft"}.items():
        if run.manifest(stage) is not None:
            return role
    raise InputError(
        f"{run.root}: no policy is trained yet; run `cai-ray run` up to sft or {run.config.method} first"
    )


def build(run: Run, role: str, token: str | None) -> Any:
    """The Serve application."""
    from ray import serve as ray_serve
    from ray.serve.llm import build_llm_deployment

    from cai_ray.prompts import load_templates, load_tokenizer
    from cai_ray.serve.auth import hash_token
    from cai_ray.serve.critic import Critic, Scorer
    from cai_ray.serve.ingress import make_ingress

    config = run.config
    templates = load_templates(config.templates)
    constitution = run.constitution()
    environment = {"env_vars": _environment(config)}
    feedback = run.feedback().config
    gpus = {"num_gpus": feedback.engine.span} if cluster.uses_gpu(feedback) else {}
    critic = ray_serve.deployment(
        Critic,
        name="critic",
        max_ongoing_requests=64,
        ray_actor_options={"num_cpus": feedback.engine.cpus_per_actor, "runtime_env": environment, **gpus},
    ).bind(run.feedback())
    scorer = None
    if run.manifest("rm") is not None:
        scorer = ray_serve.deployment(
            Scorer,
            name="scorer",
            ray_actor_options={
                "num_cpus": 1,
                "runtime_env": environment,
                **({"num_gpus": 1} if cluster.uses_gpu(config) else {}),
            },
        ).bind(run)
    llm = policy_config(run, role)
    tokenizer = load_tokenizer(run.model(role))
    ingress = make_ingress(hash_token(token) if token is not None else None)
    return ray_serve.deployment(ingress, name="ingress", max_ongoing_requests=1000).bind(
        llm_deployments={role: build_llm_deployment(llm)},
        model_cards={role: _card(role, run, llm)},
        critic=critic,
        scorer=scorer,
        templates=templates,
        control=sorted({t.content for t in tokenizer.added_tokens_decoder.values() if t.special}),
        about={
            "constitution": {
                "name": constitution.name,
                "version": constitution.version,
                "sha": constitution.sha,
            },
            "models": _models(run, role),
        },
        constitution=constitution.model_dump(mode="json"),
    )


def policy_config(run: Run, role: str) -> Any:
    """Ray Serve LLM's description of the policy, with the engine settings of the run."""
    from ray.serve.llm import LLMConfig

    from cai_ray.engine.vllm import engine_args
    from cai_ray.prompts import load_templates

    config, model = run.config, run.model(role)
    gpu = cluster.uses_gpu(config)
    engine = engine_args(model, config.engine, gpu)
    del engine["model"]
    engine.pop("distributed_executor_backend", None)  # Ray Serve LLM chooses it
    template = load_templates(config.templates).chat_template
    if template:
        engine["chat_template"] = template
    bundle = {"CPU": config.engine.cpus_per_actor, **({"GPU": 1} if gpu else {})}
    return LLMConfig(
        model_loading_config={"model_id": role, "model_source": model},
        accelerator_config={"kind": "gpu" if gpu else "cpu"},
        placement_group_config={"bundles": [bundle] * config.engine.span},
        engine_kwargs=engine,
        deployment_config={"num_replicas": 1, "max_ongoing_requests": 4 * config.engine.max_num_seqs},
        runtime_env={"env_vars": _environment(config)},
        log_engine_metrics=False,
    )


def _environment(config: RunConfig) -> dict[str, str]:
    env = cluster.worker_env(config)
    if not cluster.uses_gpu(config):
        # vLLM's log-probabilities would be compiled at the first request that asks for them: half a minute on CPU.
        env["TORCH_COMPILE_DISABLE"] = "1"
    return env


def _card(role: str, run: Run, llm: Any) -> Any:
    # Its class is in no public module of Ray 2.60; the ingress's constructor is documented with it all the same.
    from ray.llm._internal.serve.core.configs.openai_api_models import to_model_metadata

    return to_model_metadata(role, llm, overrides={"run": run.config.name})


def _models(run: Run, role: str) -> dict[str, Any]:
    """Name and content hash of every model that answers."""
    from cai_ray.storage import model_sha

    roles = {"policy": role, "feedback": run.config.label.model}
    if run.manifest("rm") is not None:
        roles["reward"] = "rm"
    asked = {"feedback": run.feedback()}
    return {k: {"name": v, "sha": model_sha(asked.get(k, run).model(v))} for k, v in roles.items()}


def _check_free(host: str, port: int) -> None:
    import socket

    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((host, port))
        except (OSError, OverflowError, TypeError) as e:  # the last two: no port, no name
            why = getattr(e, "strerror", None) or e
            raise InputError(f"--host {host} --port {port}: {why}; choose another") from e
