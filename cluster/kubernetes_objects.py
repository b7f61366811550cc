"""What any object of Kubernetes beside a RayService is held to before it is applied (pure).

Rules:
- Its kind is one that Kubernetes, or KubeRay, has in the version that it names; kinds of other products are not looked into.
- A Redis has a password: whoever reaches one without it can change the cluster's state.
"""

import re
from collections.abc import Iterator
from typing import Any

from cluster.manifest_rules import texts
from cluster.settings_errors import mend_of_name

KINDS = {
    "ConfigMap": "v1", "Namespace": "v1", "PersistentVolume": "v1", "PersistentVolumeClaim": "v1", "Pod": "v1",
    "ResourceQuota": "v1", "LimitRange": "v1", "Secret": "v1", "Service": "v1", "ServiceAccount": "v1",
    "DaemonSet": "apps/v1", "Deployment": "apps/v1", "ReplicaSet": "apps/v1", "StatefulSet": "apps/v1",
    "CronJob": "batch/v1", "Job": "batch/v1",
    "HorizontalPodAutoscaler": "autoscaling/v2", "PodDisruptionBudget": "policy/v1",
    "Ingress": "networking.k8s.io/v1", "IngressClass": "networking.k8s.io/v1", "NetworkPolicy": "networking.k8s.io/v1",
    "ClusterRole": "rbac.authorization.k8s.io/v1", "ClusterRoleBinding": "rbac.authorization.k8s.io/v1",
    "Role": "rbac.authorization.k8s.io/v1", "RoleBinding": "rbac.authorization.k8s.io/v1",
    "PriorityClass": "scheduling.k8s.io/v1", "StorageClass": "storage.k8s.io/v1",
    "RayCluster": "ray.io/v1", "RayJob": "ray.io/v1", "RayService": "ray.io/v1", "RayCronJob": "ray.io/v1",
}  # fmt: skip
"""Kind to the version that it is in."""

_REDIS_IMAGE = re.compile(r"^(?:redis|valkey)(?:-stack-server|-server)?(?:[:@]|$)")
_PASSWORD = re.compile(r"requirepass|aclfile|\S+\.conf\b")


def check_object(document: dict[str, Any]) -> None:
    """Refuse an object that Kubernetes would not know, or a Redis for everybody.

    Raises:
        ValueError: One sentence with the mend.
    """
    kind, version = document.get("kind"), document.get("apiVersion")
    if kind in KINDS:
        if version != KINDS[kind]:
            raise ValueError(f"apiVersion of a {kind} is {version}: name {KINDS[kind]}.")
    elif version in KINDS.values():
        raise ValueError(f"kind {kind} is none of {version}: {mend_of_name(kind, sorted(KINDS))}")
    for place, container in _containers(document.get("spec"), "spec"):
        image = str(container.get("image", "")).rpartition("/")[2]
        said = " ".join(text for name in ("command", "args") for _, text in texts(container.get(name)))
        if _REDIS_IMAGE.match(image) and not _PASSWORD.search(said):
            raise ValueError(
                f"{place} is a Redis without a password, and whoever reaches it can change the cluster's state: "
                "give it requirepass, from a Secret."
            )


def _containers(node: Any, place: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The containers of a pod, or of the template of one."""
    if not isinstance(node, dict):
        return
    containers = node.get("containers")
    for index, container in enumerate(containers if isinstance(containers, list) else ()):
        if isinstance(container, dict):
            yield f"{place}.containers[{index}]", container
    for name in ("template", "spec", "jobTemplate"):
        yield from _containers(node.get(name), f"{place}.{name}")
