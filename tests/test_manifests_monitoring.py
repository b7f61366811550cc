"""Goal: dashboards and alerts ask for metrics that exist, say what they show, and alert when and only when they should.

Method: every expression is held to the list of metrics (`cost_service/metrics.py`) and parsed by promtool; alerts are given
made-up series, as they are when all is well and when it is not. tests/test_ray_monitoring.py has a real Prometheus.
"""

import ast
import json
import re
import shutil
import subprocess
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from cost_service.metrics import METRICS
from tests.monitoring import (
    ALERTS,
    DASHBOARDS,
    MANIFESTS,
    NEEDED_ELSEWHERE,
    PROMETHEUS,
    alerts,
    dashboard,
    drawn,
    watched,
    without_threshold,
)
from tests.test_manifests import SECRETS

ROOT = MANIFESTS.parent
EXPORTED = {metric.exported: metric for metric in METRICS.values()}
EXPRESSIONS = [*drawn(), *((rule["alert"], rule["expr"]) for rule in alerts())]
NAMES = [path.stem for path in DASHBOARDS]

CONTRACT = {
    "adaptivellm_preemptions_total": {"action"}, "adaptivellm_preemption_cost_seconds": {"action", "kind"},
    "adaptivellm_host_pool_blocks": {"state"}, "adaptivellm_tenant_service_total": {"tenant"},
    "adaptivellm_fairness_gap": set(), "adaptivellm_fairness_bound": set(), "adaptivellm_weighted_turnaround": set(),
    "adaptivellm_cost_model_error_ratio": set(), "adaptivellm_degraded": {"part"},
}  # fmt: skip
"""Names, and labels that they have at least, as users and scripts were promised."""

RAY_LABELS = {
    "instance", "job", "replica", "deployment", "application", "route", "method", "error_code", "le",
}  # fmt: skip

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not here: install Debian's package prometheus"
)


def ours_in(expression: str) -> set[str]:
    return set(re.findall(r"\bray_adaptivellm_\w+", expression))


def labels_in(expression: str) -> set[str]:
    """Labels that an expression selects or groups by."""
    selected = re.findall(r'([a-zA-Z_]\w*)\s*(?:=~|!=|!~|=)\s*"', expression)
    grouped = re.findall(r"\b(?:by|on|without|ignoring)\s*\(([^)]*)\)", expression)
    return {*selected, *(name.strip() for names in grouped for name in names.split(",") if name.strip())}


def promtool(*arguments: str | Path) -> str:
    done = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_list_has_every_metric_that_was_promised() -> None:
    for name, labels in CONTRACT.items():
        assert labels <= METRICS[name].labels.keys(), name


@pytest.mark.parametrize(("place", "expression"), EXPRESSIONS, ids=[place for place, _ in EXPRESSIONS])
def test_an_expression_asks_for_metrics_and_labels_that_there_are(place: str, expression: str) -> None:
    names = ours_in(expression)
    assert names <= EXPORTED.keys(), f"{names - EXPORTED.keys()} is no metric of ours"
    known = RAY_LABELS.union(*(EXPORTED[name].labels for name in names))
    assert labels_in(expression) <= known, f"{labels_in(expression) - known} is no label there"


def test_every_metric_of_the_contract_is_drawn_and_every_other_one_too_or_an_alert_watches_it() -> None:
    shown = set().union(*(ours_in(expression) for _, expression in drawn()))
    assert {METRICS[name].exported for name in CONTRACT} <= shown
    assert EXPORTED.keys() <= shown | set().union(*(ours_in(expression) for _, expression in EXPRESSIONS))


def test_every_metric_in_the_list_is_made_by_somebody() -> None:
    from cost_service import metrics

    used = {
        node.id
        for folder in ("cost_service", "replicas", "global_scheduler", "cluster")
        for path in (ROOT / folder).glob("*.py")
        if path.name != "metrics.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Name)
    }
    names = {name for name, value in vars(metrics).items() if value in METRICS.values()}
    assert len(names) == len(METRICS)
    assert names <= used


# Dashboards


def test_the_dashboards_are_the_four_that_answer_an_operators_questions() -> None:
    assert NAMES == ["cost_model", "fairness", "memory_and_preemption", "overview"]
    assert len({dashboard(path)["uid"] for path in DASHBOARDS}) == 4


@pytest.mark.parametrize("path", DASHBOARDS, ids=NAMES)
def test_a_dashboard_is_one_of_grafana_10_with_a_data_source_to_choose(path: Path) -> None:
    document = dashboard(path)
    assert document["schemaVersion"] >= 38
    assert document["description"]
    assert document["templating"]["list"][0]["type"] == "datasource"
    for panel in document["panels"]:
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert not SECRETS.search(path.read_text())


@pytest.mark.parametrize("path", DASHBOARDS, ids=NAMES)
def test_a_panel_says_what_it_shows_in_a_unit_and_has_a_place_of_its_own(path: Path) -> None:
    panels = dashboard(path)["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert re.fullmatch(r"[A-Z].*[.]", panel["description"]), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert all(target["legendFormat"] for target in panel["targets"]), panel["title"]
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24, panel["title"]
    for one, other in combinations(panels, 2):
        assert not overlap(one["gridPos"], other["gridPos"]), f"{one['title']} lies upon {other['title']}"


def overlap(one: dict[str, int], other: dict[str, int]) -> bool:
    return all(
        one[at] < other[at] + other[size] and other[at] < one[at] + one[size] for at, size in (("x", "w"), ("y", "h"))
    )


@pytest.mark.parametrize("path", DASHBOARDS, ids=NAMES)
def test_what_a_legend_names_is_a_label_of_the_result(path: Path) -> None:
    for panel in dashboard(path)["panels"]:
        for target in panel["targets"]:
            named = set(re.findall(r"{{\s*(\w+)\s*}}", target["legendFormat"]))
            names = ours_in(target["expr"])
            kept = set(re.findall(r"\bby \(([^)]*)\)", target["expr"]))
            labels = {name.strip() for each in kept for name in each.split(",")}
            if not kept:
                labels = RAY_LABELS.union(*(EXPORTED[name].labels for name in names))
            assert named <= labels, panel["title"]


# Alerts


def test_every_alert_says_how_bad_it_is_what_is_the_matter_and_where_to_read_what_to_do() -> None:
    headings = {
        match[1].lower() for match in re.finditer(r"^#### (\w+)$", (ROOT / "docs/operate.md").read_text(), re.MULTILINE)
    }
    for rule in alerts():
        assert rule["labels"]["severity"] in ("critical", "warning", "info"), rule["alert"]
        assert rule["annotations"]["summary"].endswith("."), rule["alert"]
        page, anchor = rule["annotations"]["runbook"].split("#")
        assert page == "docs/operate.md"
        assert anchor == rule["alert"].lower()
        assert anchor in headings, f"docs/operate.md has no heading {rule['alert']}"
    assert headings == {rule["alert"].lower() for rule in alerts()}, "a heading without its alert"


def test_what_needs_a_gpu_or_a_failure_is_in_some_expression() -> None:
    for part in NEEDED_ELSEWHERE:
        assert any(part in expression for _, expression in EXPRESSIONS), part


@pytest.mark.parametrize(
    ("expression", "left"),
    [
        ("a > 0.5", "a"),
        ('max by (x) (a{b="c"}) == 1', 'max by (x) (a{b="c"})'),
        ("a > 30 and on (x) b > 0", "a and on (x) b"),
        ('absent(a{b=~"5.."})', 'a{b=~"5.."}'),
        ("a / b <= 1", "a / b"),
    ],
)
def test_a_threshold_is_taken_off(expression: str, left: str) -> None:
    assert without_threshold(expression) == left


@needs_promtool
def test_promtool_accepts_the_config_and_the_rules() -> None:
    promtool("check", "config", PROMETHEUS)
    assert f"{len(alerts())} rules found" in promtool("check", "rules", ALERTS)


@needs_promtool
def test_promtool_can_read_every_expression(tmp_path: Path) -> None:
    rules = [{"record": f"r:{number}", "expr": text} for number, (_, text) in enumerate([*drawn(), *watched()])]
    file = tmp_path / "rules.yaml"
    file.write_text(json.dumps({"groups": [{"name": "all", "rules": rules}]}))
    promtool("check", "rules", file)


UP = "ray_adaptivellm_"
WELL: dict[str, str] = {
    'up{job="ray", instance="a"}': "1+0x120",
    f'{UP}report_age_seconds{{replica="r"}}': "0+0x120",
    f'{UP}requests{{replica="r", state="running"}}': "9+0x120",
    f'{UP}requests{{replica="r", state="waiting"}}': "0+0x120",
    f'{UP}kv_blocks{{replica="r", state="used"}}': "95+0x120",
    f'{UP}kv_blocks{{replica="r", state="free"}}': "5+0x120",
    f'{UP}host_pool_blocks{{replica="r", state="used"}}': "50+0x120",
    f'{UP}host_pool_blocks{{replica="r", state="free"}}': "50+0x120",
    f'{UP}degraded{{part="fairness"}}': "0+0x120",
    f'{UP}preemption_cost_seconds_total{{replica="r", action="swap", kind="measured"}}': "0+1x120",
    f'{UP}cost_model_error_ratio{{replica="r", action="swap"}}': "0.2+0x120",
    f'{UP}fairness_gap_of_bound{{pool="p"}}': "0.4+0x120",
    f"{UP}fairness_refused_reports_total": "0+0x120",
    f'{UP}refused_requests_total{{cap="max_queued_tokens"}}': "0+0x120",
    f"{UP}output_length_coverage": "0.8+0x120",
    'ray_serve_deployment_replica_healthy{replica="r", deployment="d"}': "1+0x120",
    "ray_serve_num_http_requests_total": "0+1000x120",
    'ray_serve_num_http_error_requests_total{error_code="500"}': "0+1x120",
    'ray_serve_num_http_error_requests_total{error_code="429"}': "0+500x120",
    'ray_vllm_time_to_first_token_seconds_bucket{le="1"}': "0+100x120",
    'ray_vllm_time_to_first_token_seconds_bucket{le="+Inf"}': "0+100x120",
    'ray_node_mem_used{instance="a"}': "50+0x120",
    'ray_node_mem_total{instance="a"}': "100+0x120",
}
"""Values of all series a minute apart, over two hours in which all is well: `begin+step x times`."""

BROKEN: dict[str, dict[str, str | None]] = {
    "NodeNotScraped": {'up{job="ray", instance="a"}': "0+0x120"},
    "NoReplica": {f'{UP}report_age_seconds{{replica="r"}}': None},
    "ReplicaUnhealthy": {'ray_serve_deployment_replica_healthy{replica="r", deployment="d"}': "0+0x120"},
    "EngineSilent": {f'{UP}report_age_seconds{{replica="r"}}': "0+60x120"},
    "ServerErrors": {'ray_serve_num_http_error_requests_total{error_code="500"}': "0+20x120"},
    "PartDegraded": {f'{UP}degraded{{part="fairness"}}': "1+0x120"},
    "FirstTokenSlow": {
        'ray_vllm_time_to_first_token_seconds_bucket{le="1"}': "0+0x120",
        'ray_vllm_time_to_first_token_seconds_bucket{le="60"}': "0+100x120",
    },
    "MemoryShort": {f'{UP}requests{{replica="r", state="waiting"}}': "3+0x120"},
    "PreemptionsCostMuch": {
        f'{UP}preemption_cost_seconds_total{{replica="r", action="swap", kind="measured"}}': "0+20x120"
    },
    "HostPoolFull": {
        f'{UP}host_pool_blocks{{replica="r", state="used"}}': "99+0x120",
        f'{UP}host_pool_blocks{{replica="r", state="free"}}': "1+0x120",
    },
    "HostMemoryShort": {'ray_node_mem_used{instance="a"}': "97+0x120"},
    "FairnessBoundBroken": {f'{UP}fairness_gap_of_bound{{pool="p"}}': "1.2+0x120"},
    "FairnessReportsRefused": {f"{UP}fairness_refused_reports_total": "0+1x120"},
    "TenantsOverTheirCaps": {f'{UP}refused_requests_total{{cap="max_queued_tokens"}}': "0+120x120"},
    "CostsWrong": {f'{UP}cost_model_error_ratio{{replica="r", action="swap"}}': "0.8+0x120"},
    "OutputLengthsWrong": {f"{UP}output_length_coverage": "0.3+0x120"},
}
"""What is otherwise when something is the matter; None is not there."""


@needs_promtool
def test_no_alert_comes_while_all_is_well_and_of_each_trouble_its_own_alone(tmp_path: Path) -> None:
    assert BROKEN.keys() == {rule["alert"] for rule in alerts()}
    tests = [scenario({}, None), *(scenario(change, alert) for alert, change in BROKEN.items())]
    file = tmp_path / "alerts.yaml"
    file.write_text(yaml.safe_dump({"rule_files": [str(ALERTS)], "evaluation_interval": "1m", "tests": tests}))
    promtool("test", "rules", file)


def scenario(change: dict[str, str | None], expected: str | None) -> dict[str, Any]:
    """That of all alerts the expected one fires alone, after an hour."""
    series = {name: values for name, values in (WELL | change).items() if values is not None}
    firing = [f'ALERTS{{alertname="{expected}", alertstate="firing"}}'] if expected else []
    return {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [
            {
                "expr": 'max by (alertname, alertstate) (ALERTS{alertstate="firing"})',
                "eval_time": "1h",
                "exp_samples": [{"labels": name.removeprefix("ALERTS"), "value": 1} for name in firing],
            }
        ],
    }
