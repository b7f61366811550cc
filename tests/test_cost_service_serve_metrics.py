"""Goal: what was set stays to be seen, what is over is forgotten, and names in Prometheus are the ones that are promised.

Method: gauges with what they say to Ray written down; tests/test_ray_monitoring.py has them on a real cluster.
"""

import time
from collections.abc import Mapping
from typing import Any

import pytest

from cost_service import metrics
from cost_service.metrics import ANY, METRICS, Metric, MetricKind
from cost_service.serve_metrics import LiveGauge, degraded_gauge


class Ray:
    """What a gauge says to Ray."""

    def __init__(self) -> None:
        self.said: dict[tuple[tuple[str, str], ...], float] = {}

    def set(self, value: float, tags: Mapping[str, str]) -> None:
        self.said[tuple(tags.items())] = value


def published(gauge: LiveGauge) -> dict[Any, float]:
    """What it says by its one label that has several values, or by none."""
    ray = Ray()
    gauge._gauge = ray
    gauge.publish()
    return {tags[-1][1] if tags else None: value for tags, value in ray.said.items()}


def test_a_value_is_said_again_and_again_until_it_is_set_anew() -> None:
    gauge = LiveGauge(metrics.REQUESTS, replica="r")
    gauge.set(3.0, tags={"state": "running"})
    assert [published(gauge) for _ in range(3)] == [{"running": 3.0}] * 3
    gauge.set(4.0, tags={"state": "running"})
    gauge.set(1.0, tags={"state": "waiting"})
    assert published(gauge) == {"running": 4.0, "waiting": 1.0}


def test_values_that_are_replaced_are_gone() -> None:
    gauge = LiveGauge(metrics.WAITING_PROMPT_TOKENS, replica="r")
    gauge.replace("tenant", {"a": 1.0, "b": 2.0})
    gauge.replace("tenant", {"b": 3.0})
    assert published(gauge) == {"b": 3.0}


def test_of_policies_in_force_there_is_one() -> None:
    gauge = LiveGauge(metrics.POLICY, replica="r")
    for admission in ("fair", "first-come"):
        gauge.set_alone(1.0, tags={"preemption": "swap", "admission": admission})
    assert published(gauge) == {"first-come": 1.0}


def test_a_function_is_asked_each_time() -> None:
    values = iter((1.0, 2.0))
    gauge = LiveGauge(metrics.REPORT_AGE, replica="r")
    gauge.set(lambda: next(values))
    assert [published(gauge), published(gauge)] == [{"r": 1.0}, {"r": 2.0}]


def test_what_was_not_set_for_long_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    gauge = LiveGauge(metrics.FAIRNESS_GAP, keep_s=60.0)
    gauge.set(5.0, tags={"pool": "gone"})
    now_s = 150.0
    gauge.set(6.0, tags={"pool": "here"})
    assert published(gauge) == {"gone": 5.0, "here": 6.0}
    now_s = 170.0
    assert published(gauge) == {"here": 6.0}


def test_parts_are_themselves_from_the_start() -> None:
    gauge = degraded_gauge("tenants", "weights")
    gauge.set(1.0, tags={"part": "weights"})
    assert published(gauge) == {"tenants": 0.0, "weights": 1.0}


def test_counters_begin_at_zero_for_all_labels_that_are_known() -> None:
    assert list(metrics.PREEMPTIONS.known_labels({"replica": "r"})) == [
        {"replica": "r", "action": "swap"}, {"replica": "r", "action": "recompute"}
    ]  # fmt: skip
    assert len(list(metrics.PREEMPTION_COST.known_labels({"replica": "r"}))) == 4
    assert list(metrics.FAIRNESS_REFUSED_REPORTS.known_labels({})) == [{}]
    assert list(metrics.TENANT_SERVICE.known_labels({})) == [], "tenants are not known before"
    for metric in METRICS.values():
        if metric.kind is MetricKind.COUNTER and metric is not metrics.TENANT_SERVICE:
            assert list(metric.known_labels({"replica": "r"})), metric.name


@pytest.mark.parametrize(
    ("name", "kind", "exported"),
    [
        ("a_total", MetricKind.COUNTER, "ray_a_total"),
        ("a_seconds", MetricKind.COUNTER, "ray_a_seconds_total"),
        ("a_seconds", MetricKind.GAUGE, "ray_a_seconds"),
    ],
)
def test_names_are_rays_in_prometheus(name: str, kind: MetricKind, exported: str) -> None:
    assert Metric(name=name, kind=kind, description="", labels={"x": ANY}).exported == exported
