"""The files that clusters are made from, checked by what will read them: Ray's launcher, the Kubernetes operator."""

from __future__ import annotations

import copy
import gzip
import json
import re
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from cai_ray.config.load import load_config

ROOT = Path(__file__).parents[3]
CLUSTERS = ("cluster.yaml", "cluster-gcp.yaml")
MANIFESTS = {"rayjob.yaml": "rayjobs", "rayservice.yaml": "rayservices"}
SCHEMAS = Path(__file__).parent / "kuberay"
IMAGE = f"rayproject/ray:{version('ray')}-py311-gpu"


def cluster(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / name).read_text())


@pytest.mark.parametrize("name", CLUSTERS)
def test_ray_takes_the_cluster_as_it_is(name: str) -> None:
    """As `ray up` does before it asks the cloud: defaults filled in, then the schema."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    given = cluster(name)
    prepared = prepare_config(given)
    validate_config(prepared)
    assert set(prepared["available_node_types"]) == set(given["available_node_types"])
    assert prepared["worker_setup_commands"] and prepared["docker"]["image"] == IMAGE
    wrong = {**given, "idle_timeout": 3}
    with pytest.raises(Exception, match="idle_timeout"):
        validate_config(prepare_config(wrong))


@pytest.mark.parametrize("name", CLUSTERS)
def test_the_autoscaler_reads_pools_from_zero_out_of_it(name: str) -> None:
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig

    read = AutoscalingConfig(cluster(name), skip_content_hash=True)
    assert read.get_idle_timeout_s() == 600
    kinds = read.get_node_type_configs()
    head = kinds.pop(read.get_head_node_type())
    assert head.resources["CPU"] == head.resources["GPU"] == 0
    assert set(kinds) == {"cpu", "training", "generation"}
    assert all(kind.min_worker_nodes == 0 < kind.max_worker_nodes for kind in kinds.values())
    assert read.get_max_num_worker_nodes() == sum(kind.max_worker_nodes for kind in kinds.values())


def test_the_launcher_prepares_its_start_on_aws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Roles, keys, networks and each kind of machine, as `ray up` asks for them: of an imitation of the cloud."""
    boto3, moto = pytest.importorskip("boto3"), pytest.importorskip("moto")
    given = {
        "HOME": str(tmp_path),
        "MOTO_IAM_LOAD_MANAGED_POLICIES": "true",
        "AWS_DEFAULT_REGION": "us-west-2",
    }
    for name, value in (
        given | dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "test")
    ).items():
        monkeypatch.setenv(name, value)
    from ray.autoscaler._private.util import prepare_config

    with moto.mock_aws():
        from ray.autoscaler._private.aws.config import bootstrap_aws
        from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

        config = prepare_config(cluster("cluster.yaml"))
        # What a machine has is in the cloud's own table, from which Ray fills in what is not declared.
        bare = copy.deepcopy(config)
        for kind in bare["available_node_types"].values():
            kind["resources"] = {}
        found = AWSNodeProvider.fillout_available_node_types_resources(bare)["available_node_types"]
        for name, kind in config["available_node_types"].items():
            for resource in ("CPU", "GPU") if name != "head" else ():
                assert kind["resources"].get(resource) == found[name]["resources"].get(resource), name
        cloud = boto3.client("ec2")
        image = cloud.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
        bought = {}
        for name, kind in bootstrap_aws(config)["available_node_types"].items():
            node = {**kind["node_config"], "ImageId": image}
            node["SubnetId"] = node.pop("SubnetIds")[0]
            (made,) = cloud.run_instances(MinCount=1, MaxCount=1, **node)["Instances"]
            bought[name] = made.get("InstanceLifecycle", "on demand")
    assert bought == dict.fromkeys(("head", "cpu", "training"), "on demand") | {"generation": "spot"}


def spot(node: dict[str, Any]) -> bool:
    return "InstanceMarketOptions" in node or node.get("scheduling", {}).get("provisioningModel") == "SPOT"


@pytest.mark.parametrize("name", CLUSTERS)
def test_only_generation_is_spot_and_the_pools_are_marked(name: str) -> None:
    types = cluster(name)["available_node_types"]
    assert {n for n, kind in types.items() if spot(kind["node_config"])} == {"generation"}
    for pool in ("training", "generation"):
        assert {n for n, kind in types.items() if pool in kind["resources"]} == {pool}


@pytest.mark.parametrize("name", CLUSTERS)
def test_objects_spill_to_a_folder_of_the_machine(name: str) -> None:
    config = cluster(name)
    start = [c for k in ("head", "worker") for c in config[f"{k}_start_ray_commands"] if "ray start" in c]
    assert len(start) == 2
    folders = {
        word for c in start for word in shlex.split(c) if word.startswith("--object-spilling-directory=")
    }
    assert folders == {"--object-spilling-directory=/spill"}
    assert "-v /spill:/spill" in config["docker"]["run_options"]
    assert any("mkdir -p /spill" in c for c in config["initialization_commands"])


@pytest.mark.parametrize("name", CLUSTERS)
def test_an_8b_run_has_room_when_all_pools_are_full(name: str) -> None:
    """The configuration and the clusters are made for each other: by each stage's own need."""
    from cai_ray.cluster.placement import Cluster, Nodes, ResourceNeed, bundle, count_placed, worker_kinds

    config = load_config("jobs/configs/llama-8b-8gpu.yaml", [])
    full = Cluster([Nodes({}, 1)], list(worker_kinds(cluster(name)).values()))
    engine = config.engine
    stages = {
        "engines": [
            ResourceNeed(bundle(engine.cpus_per_actor, engine.span, "generation"), engine.min_actors)
        ],
        **{
            stage: [ResourceNeed(bundle(section.cpus_per_worker, 1, "training"), section.workers)]
            for stage, section in (("sft", config.sft), ("rm", config.rm), ("dpo", config.dpo))
        },
        "ppo": [
            ResourceNeed(bundle(engine.cpus_per_actor, 1, "training"), config.ppo.rollout_engines),
            ResourceNeed(bundle(config.ppo.cpus_per_worker, 1, "training"), config.ppo.workers),
        ],
    }
    for stage, needs in stages.items():
        assert count_placed(needs, full) == [need.number for need in needs], stage


# -------------------------------------------------------------------------------------------------- Kubernetes


def manifest(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "jobs/kubernetes" / name).read_text())


def spec_of(given: dict[str, Any]) -> dict[str, Any]:
    return given["spec"].get("rayClusterSpec") or given["spec"]["rayClusterConfig"]


def closed(schema: Any) -> Any:
    """The operator's API drops fields that it does not know without a word; here they are faults."""
    if isinstance(schema, list):
        return [closed(s) for s in schema]
    if not isinstance(schema, dict):
        return schema
    made = {k: closed(v) for k, v in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


def faults(name: str, given: dict[str, Any]) -> list[str]:
    import jsonschema

    packed = (SCHEMAS / f"{MANIFESTS[name]}.v1.schema.json.gz").read_bytes()
    schema = json.loads(gzip.decompress(packed))
    schema["properties"]["metadata"] = {"type": "object"}  # Kubernetes' own
    found = jsonschema.Draft202012Validator(closed(schema)).iter_errors(given)
    return [f"{e.json_path}: {e.message}" for e in found]


@pytest.mark.parametrize("name", MANIFESTS)
def test_the_operators_schema_holds_for_the_manifest(name: str) -> None:
    given = manifest(name)
    assert not faults(name, given)
    assert given["apiVersion"] == "ray.io/v1" and given["kind"].lower() + "s" == MANIFESTS[name]
    # The check finds what the API would drop, and what it would refuse.
    spec_of(given)["workerGroupSpecs"][0]["maxReplica"] = 3
    spec_of(given)["headGroupSpec"]["template"]["spec"]["containers"][0]["image"] = 3
    assert len(faults(name, given)) == 2


@pytest.mark.parametrize("name", MANIFESTS)
def test_the_autoscaler_reads_groups_from_zero_and_a_head_without_work(name: str) -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    from cai_ray.cluster.placement import Nodes, worker_kinds

    spec = spec_of(manifest(name))
    assert spec["enableInTreeAutoscaling"] and spec["rayVersion"] == version("ray")
    autoscaling = _derive_autoscaling_config_from_ray_cr(
        {"metadata": {"name": "x", "namespace": "y"}, "spec": spec}
    )
    assert autoscaling["idle_timeout_minutes"] == 10
    types = autoscaling["available_node_types"]
    assert types["headgroup"]["resources"]["CPU"] == types["headgroup"]["resources"]["GPU"] == 0
    kinds = worker_kinds(autoscaling)
    assert all(types[k]["min_workers"] == 0 < kinds[k].number for k in kinds)
    if name == "rayjob.yaml":
        training = kinds["training"]
        assert training == Nodes({**training.resources, "CPU": 90, "GPU": 8, "training": 1}, 1)
        assert kinds["generation"].resources["generation"] == 1 and "GPU" not in kinds["cpu"].resources


@pytest.mark.parametrize("name", MANIFESTS)
def test_of_the_groups_generation_alone_may_run_on_spot(name: str) -> None:
    spec = spec_of(manifest(name))
    groups = {"head": spec["headGroupSpec"], **{g["groupName"]: g for g in spec["workerGroupSpecs"]}}
    pods = {n: g["template"]["spec"] for n, g in groups.items()}
    on_spot = {n for n, pod in pods.items() if "gke-spot" in json.dumps(pod)}
    assert on_spot == ({"generation"} if name == "rayjob.yaml" else set())
    assert pods["head"]["nodeSelector"] == {"cloud.google.com/gke-provisioning": "standard"}
    for group, pod in pods.items():
        assert groups[group]["rayStartParams"]["object-spilling-directory"] == "/spill"
        mounted = {m["name"] for m in pod["containers"][0]["volumeMounts"]}
        assert mounted == {v["name"] for v in pod["volumes"]} and "spill" in mounted


def test_the_rayjob_runs_a_job_that_there_is_with_settings_that_there_are() -> None:
    spec = manifest("rayjob.yaml")["spec"]
    python, script, _, *rest = shlex.split(spec["entrypoint"])
    assert python == "python" and (ROOT / script.removeprefix("/home/ray/cai_ray/")).exists()
    settings = [rest[i + 1] for i, word in enumerate(rest) if word == "--set"]
    config = load_config("errand-town", settings)
    assert (config.ray.training_nodes, config.ray.generation_nodes) == ("training", "generation")
    assert yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"] == runtime_env()["env_vars"]


def test_the_rayservice_names_an_application_that_serve_takes() -> None:
    from ray.serve.schema import ServeDeploySchema

    config = yaml.safe_load(manifest("rayservice.yaml")["spec"]["serveConfigV2"])
    (application,) = ServeDeploySchema.model_validate(config).applications
    assert application.import_path == "cai_ray.serve.app:application"
    assert {"run", "models", "token_file"} <= set(application.args)


def test_the_image_is_of_the_pinned_ray_and_installs_the_package_as_the_readme_says() -> None:
    text = (ROOT / "jobs/kubernetes/Dockerfile").read_text()
    assert re.findall(r"^FROM (.+)$", text, re.MULTILINE) == [IMAGE]
    copied = [w for line in re.findall(r"^COPY --\S+ (.+)$", text, re.MULTILINE) for w in line.split()[:-1]]
    assert copied and all((ROOT / name).exists() for name in copied)
    assert 'pip install --no-cache-dir -e ".[gpu]"' in text
    assert 'pip install -e ".[gpu]"' in (ROOT / "README.md").read_text()


# --------------------------------------------------------------------------------------------------------- jobs


def runtime_env() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "jobs/runtime-env.yaml").read_text())


def test_ray_takes_the_runtime_environment_and_it_installs_nothing() -> None:
    from ray.runtime_env import RuntimeEnv

    given = runtime_env()
    assert RuntimeEnv(**given)["env_vars"] == given["env_vars"]
    assert not {"pip", "uv", "conda"} & set(given)
