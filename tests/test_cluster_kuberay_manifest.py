"""Goal: the RayService is one that Kubernetes takes as it stands, and that the rules refuse once it is spoilt.

Method: KubeRay's own schema (tests/data), made strict, because Kubernetes drops what it does not know without a word; what
the schema does not say (one image, who may reach what) as rules over the documents; one change at a time.
"""

import gzip
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from cluster.bootstrap import ROOT
from cluster.kuberay_manifest import KNOWN, check_ray_service
from cluster.manifest_rules import pinned

FILE = ROOT / "manifests/kuberay/rayservice.yaml"
SCHEMA = Path(__file__).parent / "data/kuberay-1.6.2-rayservice.json.gz"


@cache
def crd() -> dict[str, Any]:
    read: dict[str, Any] = json.loads(gzip.decompress(SCHEMA.read_bytes()))
    return read


def strict(node: Any) -> Any:
    """The schema with all that it does not know forbidden, as `kubectl --validate=strict` does."""
    if isinstance(node, list):
        return [strict(each) for each in node]
    if not isinstance(node, dict):
        return node
    made = {key: strict(value) for key, value in node.items()}
    if node.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
    if isinstance(node.get("properties"), dict) and node.get("type") == "object":
        free = node.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in node
        if not free and node["properties"]:
            made["additionalProperties"] = False
    return made


def service() -> dict[str, Any]:
    document: dict[str, Any] = next(yaml.safe_load_all(FILE.read_text()))
    return document


def pods(document: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = document["spec"]["rayClusterConfig"]
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def test_the_service_is_one_of_kuberays_and_nothing_in_it_would_be_dropped() -> None:
    jsonschema.Draft202012Validator(_top(strict(crd()))).validate(service())


def _top(schema: dict[str, Any]) -> dict[str, Any]:
    """`metadata` is Kubernetes' own, which a resource's schema leaves open."""
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


@pytest.mark.parametrize(
    "edit",
    [
        lambda document: document["spec"].update(serveConfig=""),
        lambda document: pods(document)[1]["containers"][0].update(resource={}),
        lambda document: pods(document)[0]["containers"][0]["env"].append({"value": "nameless"}),
        lambda document: document["spec"]["rayClusterConfig"]["workerGroupSpecs"][0].update(replicas="two"),
    ],
)
def test_the_strict_schema_finds_what_is_wrong(edit: Callable[[Any], None]) -> None:
    document = service()
    edit(document)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(_top(strict(crd()))).validate(document)


@pytest.mark.parametrize("place", KNOWN)
def test_the_names_that_the_rules_know_are_the_schemas(place: str) -> None:
    node = crd()
    for part in place.split(".")[:-1]:
        node = node["properties"][part.removesuffix("[]")]
        if part.endswith("[]"):
            node = node["items"]
    names = set(node["properties"]) | ({"status"} if not place else set())
    assert names == set(KNOWN[place])


def test_the_serve_config_inside_is_ours_and_fits_the_workers() -> None:
    document = service()
    args = check_ray_service(document).args
    (group,) = document["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert args.replicas.num_replicas * args.replicas.tensor_parallel_size <= group["minReplicas"] * int(
        limits["nvidia.com/gpu"]
    )
    assert args.replicas.num_cpus + args.ingress.num_cpus <= int(limits["cpu"])
    assert args.preemption.host_pool_bytes < int(limits["memory"].removesuffix("Gi")) * 2**30 / 2
    assert args.ingress.max_replicas_per_node == 1
    assert args.ingress.num_replicas <= group["minReplicas"]


def test_the_head_has_no_work_of_replicas_and_serves_nothing() -> None:
    spec = service()["spec"]
    head = spec["rayClusterConfig"]["headGroupSpec"]
    assert (head["rayStartParams"]["num-cpus"], head["rayStartParams"]["num-gpus"]) == ("0", "0")
    assert "nvidia.com/gpu" not in head["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert spec["excludeHeadPodFromServeSvc"]


def test_every_container_has_the_image_of_the_pinned_ray() -> None:
    document = service()
    images = {
        each["image"] for pod in pods(document) for kind in ("initContainers", "containers") for each in pod[kind]
    }
    (image,) = images
    assert f"-ray{pinned()['ray']}-" in image
    assert document["spec"]["rayClusterConfig"]["rayVersion"] == pinned()["ray"]


def test_workers_wait_for_a_head_that_is_gone_and_are_ready_when_they_serve() -> None:
    (worker,) = pods(service())[1]["containers"]
    environment = {variable["name"]: variable.get("value") for variable in worker["env"]}
    assert environment["RAY_gcs_rpc_server_reconnect_timeout_s"] == "600"
    assert worker["readinessProbe"]["httpGet"] == {"path": "/-/healthz", "port": 8000}


def test_containers_have_no_privileges_and_bounded_resources() -> None:
    for pod in pods(service()):
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["automountServiceAccountToken"] is False
        for container in (*pod["initContainers"], *pod["containers"]):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["limits"].keys() >= {"cpu", "memory"}


def test_only_named_networks_reach_the_pods_and_none_reaches_redis_but_they() -> None:
    documents = list(yaml.safe_load_all(FILE.read_text()))
    redis = list(yaml.safe_load_all((ROOT / "manifests/kuberay/redis.yaml").read_text()))
    (policy,) = (each for each in documents if each["kind"] == "NetworkPolicy")
    labels = policy["spec"]["podSelector"]["matchLabels"]
    cluster = service()["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert labels.items() <= group["template"]["metadata"]["labels"].items()
    for rule in policy["spec"]["ingress"]:
        assert rule["from"], "an empty list lets in everybody"
        assert all(peer for peer in rule["from"])
        outside = [peer for peer in rule["from"] if "podSelector" not in peer]
        names = {name for peer in outside for name in peer["namespaceSelector"]["matchLabels"].values()}
        assert "ports" in rule or names == {"kuberay-system"}, "the operator alone reaches all ports"
    (policy,) = (each for each in redis if each["kind"] == "NetworkPolicy")
    assert policy["spec"]["ingress"] == [
        {"from": [{"podSelector": {"matchLabels": labels}}], "ports": [{"protocol": "TCP", "port": 6379}]}
    ]


def cluster_of(document: Any) -> Any:
    return document["spec"]["rayClusterConfig"]


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda d: d["spec"].update(serveConfigv2=""), r"spec\.serveConfigv2: did you mean serveConfigV2\?"),
        (lambda d: cluster_of(d).update(rayVersions="2"), r"rayVersions: did you mean rayVersion\?"),
        (lambda d: pods(d)[1]["containers"][0].update(imag=1), r"containers\[0\]\.imag: did you mean image\?"),
        (lambda d: cluster_of(d).update(rayVersion="2.59.0"), r"rayVersion is Ray 2\.59\.0"),
        (lambda d: cluster_of(d).pop("rayVersion"), r"rayVersion is Ray \(missing\)"),
        (lambda d: cluster_of(d).pop("authOptions"), r"authOptions\.mode must be token"),
        (lambda d: cluster_of(d)["authOptions"].update(mode="disabled"), r"authOptions\.mode must be token"),
        (lambda d: cluster_of(d)["gcsFaultToleranceOptions"].pop("redisPassword"), "without a password"),
        (
            lambda d: cluster_of(d)["gcsFaultToleranceOptions"].update(redisPassword={"value": "hunter2"}),
            r"redisPassword\.value is a password in a file",
        ),
        (lambda d: pods(d)[1]["containers"][0].update(image="adaptivellm:0.2.0"), "all nodes must run one image"),
        (lambda d: pods(d)[1]["containers"][0].update(image="adaptivellm"), "without a version"),
        (lambda d: pods(d)[1]["containers"][0].update(image="host:5000/adaptivellm"), "without a version"),
        (lambda d: pods(d)[1]["containers"][0].update(image="adaptivellm:latest"), "moves"),
        (
            lambda d: pods(d)[0]["containers"][0]["env"].append({"name": "HF_TOKEN", "value": "x"}),
            "env holds the value of HF_TOKEN",
        ),
        (lambda d: d["spec"].pop("serveConfigV2"), r"spec\.serveConfigV2 is missing"),
        (lambda d: d["spec"].update(serveConfigV2="a: ["), r"spec\.serveConfigV2 is not valid YAML"),
        (
            lambda d: d["spec"].update(serveConfigV2="applications: []"),
            r"spec\.serveConfigV2 must have exactly one entry",
        ),
        (
            lambda d: d.update(apiVersion="ray.io/v1alpha1"),
            r"apiVersion of a RayService is ray\.io/v1alpha1: name ray\.io/v1",
        ),
        (
            lambda d: cluster_of(d)["headGroupSpec"]["rayStartParams"].update({"num-cpu": "0"}),
            r"headGroupSpec\.rayStartParams\.num-cpu is no option of `ray start`: did you mean num-cpus\?",
        ),
        (
            lambda d: d["spec"].update(
                serveConfigV2=d["spec"]["serveConfigV2"].replace("num_replicas", "num_replica", 1)
            ),
            r"Unknown setting spec\.serveConfigV2\.applications\[0\]\.args\.replicas\.num_replica: did you mean",
        ),
        (lambda d: d["spec"].pop("rayClusterConfig"), r"spec\.rayClusterConfig is missing"),
    ],
)
def test_a_spoilt_service_is_refused_with_the_mend(edit: Callable[[Any], None], said: str) -> None:
    document = service()
    edit(document)
    with pytest.raises(ValueError, match=said):
        check_ray_service(document)
