"""Goal: an object that Kubernetes would not know, and a Redis for everybody, are refused before they are applied.

Method: our own objects pass; each bad one is one of them with one change.
"""

from collections.abc import Callable
from typing import Any

import pytest
import yaml

from cluster.bootstrap import ROOT
from cluster.kubernetes_objects import check_object

OBJECTS = [
    document
    for name in ("redis", "rayservice")
    for document in yaml.safe_load_all((ROOT / f"manifests/kuberay/{name}.yaml").read_text())
]


def of_kind(kind: str) -> dict[str, Any]:
    found = next(document for document in OBJECTS if document["kind"] == kind)
    copy: dict[str, Any] = yaml.safe_load(yaml.safe_dump(found))
    return copy


def redis(document: dict[str, Any]) -> dict[str, Any]:
    container: dict[str, Any] = document["spec"]["template"]["spec"]["containers"][0]
    return container


def test_our_own_pass() -> None:
    for document in OBJECTS:
        check_object(document)


@pytest.mark.parametrize(
    ("kind", "edit", "said"),
    [
        (
            "NetworkPolicy",
            lambda d: d.update(kind="NetworkPolic"),
            r"^kind NetworkPolic is none of networking\.k8s\.io/v1: did you mean NetworkPolicy\?$",
        ),
        (
            "RayService",
            lambda d: d.update(kind="RayServic"),
            r"^kind RayServic is none of ray\.io/v1: did you mean RayService\?$",
        ),
        (
            "RayService",
            lambda d: d.update(apiVersion="ray.io/v1alpha1"),
            r"^apiVersion of a RayService is ray\.io/v1alpha1: name ray\.io/v1\.$",
        ),
        ("StatefulSet", lambda d: d.update(apiVersion="v1"), r"^apiVersion of a StatefulSet is v1: name apps/v1\.$"),
        (
            "StatefulSet",
            lambda d: redis(d).update(args=[redis(d)["args"][0].replace("requirepass", "")]),
            r"^spec\.template\.spec\.containers\[0\] is a Redis without a password.* give it requirepass, from a Secret",
        ),
        (
            "StatefulSet",
            lambda d: [redis(d).pop(name) for name in ("command", "args")],
            "is a Redis without a password",
        ),
    ],
)
def test_a_spoilt_one_is_refused_with_the_mend(kind: str, edit: Callable[[Any], Any], said: str) -> None:
    document = of_kind(kind)
    edit(document)
    with pytest.raises(ValueError, match=said):
        check_object(document)


@pytest.mark.parametrize("image", ["redis_exporter:1.0", "example.com/my-redis-client:1", "busybox:1"])
def test_what_is_no_redis_needs_no_password(image: str) -> None:
    document = of_kind("StatefulSet")
    redis(document).update(image=image, args=[])
    check_object(document)


def test_kinds_of_other_products_are_not_looked_into() -> None:
    check_object({"apiVersion": "monitoring.coreos.com/v1", "kind": "PodMonitor", "spec": {}})
