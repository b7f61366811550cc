"""What the tests of dashboards and alerts share: every expression that they hold, and what it takes to have data."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

MANIFESTS = Path(__file__).parents[1] / "manifests"
DASHBOARDS = sorted((MANIFESTS / "grafana").glob("*.json"))
PROMETHEUS = MANIFESTS / "prometheus" / "prometheus.yaml"
ALERTS = MANIFESTS / "prometheus" / "alerts.yaml"

NEEDED_ELSEWHERE = {
    "ray_node_gpus_utilization": "a GPU",
    "ray_node_gram_used": "a GPU",
    'ray_serve_num_http_error_requests_total{error_code=~"5.."}': "a failure: an error of the server's",
}
"""What has no data on a healthy cluster without GPUs, and what that needs; in expressions with these it is not asked for."""

NUMBER = r"-?\d+(?:\.\d+)?"


def dashboard(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def alerts() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


def drawn() -> Iterator[tuple[str, str]]:
    """Where, and what: all expressions of dashboards as Grafana sends them."""
    for path in DASHBOARDS:
        for panel in dashboard(path)["panels"]:
            for target in panel["targets"]:
                expression = target["expr"].replace("$__rate_interval", "1m").replace("$replica", ".*")
                assert "$" not in expression, f"{path.name}: {expression} has a variable that is not known here"
                yield f"{path.name}: {panel['title']}", expression


def watched() -> Iterator[tuple[str, str]]:
    """The same of alerts, without their thresholds: the series that must be there for an alert to come."""
    for rule in alerts():
        yield rule["alert"], without_threshold(rule["expr"])


def without_threshold(expression: str) -> str:
    if inner := re.fullmatch(r"absent\((.*)\)", expression):
        return inner[1]
    return re.sub(rf"\s+(?:==|!=|>=|<=|>|<)\s+{NUMBER}(?=\s|$)", "", expression)


def needed_elsewhere(expression: str) -> str | None:
    return next((need for part, need in NEEDED_ELSEWHERE.items() if part in expression), None)
