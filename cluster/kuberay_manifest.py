"""What a RayService of KubeRay is held to before it is applied.

Rules:
- Kubernetes drops settings that it does not know without a word: names are compared with those of KubeRay 1.6's schema, as
  far as the tables here go; `tests/test_cluster_kuberay_manifest.py` holds the tables to the schema.
- Every container that runs Ray has one image, and that image's Ray is the pinned one.
- No password or token stands in the file: they come from Secrets.
"""

from collections.abc import Iterator
from typing import Any

from cluster.config import ServeFile, from_document
from cluster.kubernetes_objects import check_object
from cluster.manifest_rules import check_ray_version, check_redis_address, check_versions
from cluster.ray_start import check_start_options
from cluster.settings_errors import refuse_unknown
from cluster.yaml_text import parse

KNOWN = {
    "": {"apiVersion", "kind", "metadata", "spec", "status"},
    "spec.": {
        "deploymentUnhealthySecondThreshold", "excludeHeadPodFromServeSvc", "managedBy", "rayClusterConfig",
        "rayClusterDeletionDelaySeconds", "serveConfigV2", "serveService", "serviceUnhealthySecondThreshold",
        "upgradeStrategy",
    },
    "spec.rayClusterConfig.": {
        "authOptions", "autoscalerOptions", "enableInTreeAutoscaling", "gcsFaultToleranceOptions", "headGroupSpec",
        "headServiceAnnotations", "managedBy", "rayVersion", "suspend", "upgradeStrategy", "workerGroupSpecs",
    },
    "spec.rayClusterConfig.gcsFaultToleranceOptions.": {
        "externalStorageNamespace", "redisAddress", "redisPassword", "redisUsername",
    },
    "spec.rayClusterConfig.headGroupSpec.": {
        "enableIngress", "headService", "labels", "rayStartParams", "resources", "serviceType", "template",
    },
    "spec.rayClusterConfig.workerGroupSpecs[].": {
        "groupName", "idleTimeoutSeconds", "labels", "maxReplicas", "minReplicas", "numOfHosts", "rayStartParams",
        "replicas", "resources", "scaleStrategy", "suspend", "template",
    },
    "spec.rayClusterConfig.headGroupSpec.template.spec.containers[].": {
        "args", "command", "env", "envFrom", "image", "imagePullPolicy", "lifecycle", "livenessProbe", "name", "ports",
        "readinessProbe", "resizePolicy", "resources", "restartPolicy", "restartPolicyRules", "securityContext",
        "startupProbe", "stdin", "stdinOnce", "terminationMessagePath", "terminationMessagePolicy", "tty",
        "volumeDevices", "volumeMounts", "workingDir",
    },
}  # fmt: skip
"""Place to the names that KubeRay 1.6.2 knows there."""

SECRET_WORDS = ("PASSWORD", "TOKEN", "SECRET", "API_KEY")


def check_ray_service(document: dict[str, Any]) -> ServeFile:
    """Refuse a RayService that would not run, or not as it is meant; return its Serve config.

    Raises:
        ValueError: One sentence with the mend.
    """
    check_object(document)
    refuse_unknown(document, KNOWN[""], "")
    spec = _mapping(document, "spec", "")
    refuse_unknown(spec, KNOWN["spec."], "spec.")
    cluster = _mapping(spec, "rayClusterConfig", "spec.")
    refuse_unknown(cluster, KNOWN["spec.rayClusterConfig."], "spec.rayClusterConfig.")
    check_ray_version("spec.rayClusterConfig.rayVersion", str(cluster.get("rayVersion", "(missing)")))
    if (cluster.get("authOptions") or {}).get("mode") != "token":
        raise ValueError(
            "spec.rayClusterConfig.authOptions.mode must be token: KubeRay opens the dashboard on the pod's address, and "
            "whoever reaches it runs code."
        )
    if "gcsFaultToleranceOptions" in cluster:
        _check_redis(_mapping(cluster, "gcsFaultToleranceOptions", "spec.rayClusterConfig."))
    _check_pods(cluster)
    return _serve_config(spec)


def _mapping(parent: dict[str, Any], name: str, place: str) -> dict[str, Any]:
    value = parent.get(name)
    if not isinstance(value, dict):
        raise ValueError(f"Setting {place}{name} is missing: add it.")
    return value


def _check_redis(options: dict[str, Any]) -> None:
    place = "spec.rayClusterConfig.gcsFaultToleranceOptions."
    refuse_unknown(options, KNOWN[place], place)
    password = options.get("redisPassword") or {}
    if "value" in password:
        raise ValueError(f"{place}redisPassword.value is a password in a file: use valueFrom.secretKeyRef.")
    check_redis_address(
        f"{place}redisAddress", str(options.get("redisAddress", "")), has_password="valueFrom" in password
    )


def _groups(cluster: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    place = "spec.rayClusterConfig."
    head = _mapping(cluster, "headGroupSpec", place)
    refuse_unknown(head, KNOWN[f"{place}headGroupSpec."], f"{place}headGroupSpec.")
    yield f"{place}headGroupSpec.", head
    for index, group in enumerate(cluster.get("workerGroupSpecs") or []):
        refuse_unknown(group, KNOWN[f"{place}workerGroupSpecs[]."], f"{place}workerGroupSpecs[{index}].")
        yield f"{place}workerGroupSpecs[{index}].", group


def _check_pods(cluster: dict[str, Any]) -> None:
    images: dict[str, str] = {}
    for place, group in _groups(cluster):
        check_start_options(f"{place}rayStartParams.", group.get("rayStartParams") or {})
        pod = _mapping(_mapping(group, "template", place), "spec", f"{place}template.")
        for kind in ("initContainers", "containers"):
            for index, container in enumerate(pod.get(kind) or []):
                here = f"{place}template.spec.{kind}[{index}]."
                refuse_unknown(
                    container, KNOWN["spec.rayClusterConfig.headGroupSpec.template.spec.containers[]."], here
                )
                image = str(container.get("image", ""))
                if ":" not in image.rpartition("/")[2]:
                    raise ValueError(f"{here}image is {image or 'missing'}, without a version: name one.")
                check_versions(f"{here}image", image)
                images.setdefault(image, here)
                _check_environment(container.get("env") or [], here)
    if len(images) != 1:
        (first, _), (other, place), *_ = images.items()
        raise ValueError(f"{place}image is {other}, elsewhere {first}: all nodes must run one image.")


def _check_environment(environment: list[dict[str, Any]], place: str) -> None:
    for variable in environment:
        name = str(variable.get("name", ""))
        if any(word in name for word in SECRET_WORDS) and "value" in variable:
            raise ValueError(f"{place}env holds the value of {name}: use valueFrom.secretKeyRef.")


def _serve_config(spec: dict[str, Any]) -> ServeFile:
    text = spec.get("serveConfigV2")
    if not isinstance(text, str):
        raise ValueError("Setting spec.serveConfigV2 is missing: add it, as a text.")
    documents = parse(text, "spec.serveConfigV2", "compare it with manifests/kuberay/rayservice.yaml")
    return from_document(documents[0] if documents else None, "spec.serveConfigV2", "spec.serveConfigV2.")
