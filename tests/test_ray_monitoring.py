"""Goal: an operator who looks sees: every dashboard and alert has data, curves move, and Ray's own pages name our parts.

Method: the service by its own command with one replica whose KV cache is far too small, two tenants that want more than it
holds under one policy after the other; a real Prometheus with our files as they are, `status --watch` in a pipe and on a
terminal, and Ray's dashboard in headless Chromium.
"""

import concurrent.futures
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from cluster.config import DEFAULT_MODEL
from tests.browser import chromium, needs_chromium
from tests.cluster_runs import MODEL, Running, environment, free_port, metrics_port, serving
from tests.monitoring import MANIFESTS, PROMETHEUS, alerts, drawn, needed_elsewhere, watched

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]

TARGETS = Path("/tmp/ray/prom_metrics_service_discovery.json")
LIMIT_S = 300.0
"""Until every expression has had data."""

POLICIES = ("swap", "recompute", "adaptive")
NUM_CLIENTS = 8
"""Of each tenant."""

SAME = "Tell me of the sea, and of all that lives in it. " * 4
"""A beginning that is in the prefix cache while another of the tenant's requests runs."""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    config = yaml.safe_load((MANIFESTS / "serve_local.yaml").read_text())
    args = config["applications"][0]["args"]
    args["replicas"] |= {
        "num_replicas": 1, "max_model_len": 512, "max_num_seqs": 32, "kv_cache_bytes": 40 << 20,
    }  # fmt: skip
    args["preemption"]["host_pool_bytes"] = 128 << 20
    file = tmp_path_factory.mktemp("config") / "serve.yaml"
    file.write_text(yaml.safe_dump(config))
    with serving({}, "--config", str(file)) as service:
        yield service


class Prometheus:
    """A Prometheus that runs."""

    def __init__(self, url: str) -> None:
        self._url = url

    def get(self, path: str, **query: str) -> Any:
        answer = httpx.get(f"{self._url}/api/v1/{path}", params=query, timeout=30)
        assert answer.status_code == 200, f"{query}: {answer.text}"
        return answer.json()["data"]

    def values(self, expression: str) -> list[float]:
        """What an expression has now, without what is not a number."""
        found = (float(series["value"][1]) for series in self.get("query", query=expression)["result"])
        return [value for value in found if value == value]


@pytest.fixture(scope="module")
def prometheus(running: Running, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not here: install Debian's package prometheus")
    wait_until(lambda: TARGETS.exists() and f":{metrics_port()}" in TARGETS.read_text(), "Ray does not list its node")
    folder, port = tmp_path_factory.mktemp("prometheus"), free_port()
    command = [
        "prometheus", f"--config.file={PROMETHEUS}", f"--storage.tsdb.path={folder}", "--log.level=warn",
        f"--web.listen-address=127.0.0.1:{port}",
    ]  # fmt: skip
    with subprocess.Popen(command, cwd=folder) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until(lambda: answers(f"{url}/-/ready"), "prometheus does not come up")
            yield Prometheus(url)
        finally:
            process.terminate()


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def wait_until(holds: Any, otherwise: str, limit_s: float = 60.0) -> None:
    deadline_s = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < deadline_s, otherwise
        time.sleep(1.0)


def command(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "cluster", *arguments], capture_output=True, text=True, env=environment(), timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class Pressure:
    """Tenants that want more than fits, for as long as it lasts."""

    def __init__(self, tenants: list[Running]) -> None:
        self._stop = threading.Event()
        self._pool = concurrent.futures.ThreadPoolExecutor(len(tenants) * NUM_CLIENTS)
        self._clients = [
            self._pool.submit(self._ask, tenant, number) for tenant in tenants for number in range(NUM_CLIENTS)
        ]

    def _ask(self, tenant: Running, number: int) -> set[int]:
        seen = set()
        while not self._stop.is_set():
            ends_itself = number == 0  # lengths are learned from those
            body = {
                "model": MODEL, "prompt": SAME + f"{time.monotonic_ns()} " * (1 + number),
                "max_tokens": 24 if ends_itself else 120, "ignore_eos": not ends_itself,
            }  # fmt: skip
            seen.add(tenant.post("/v1/completions", body).status_code)
        return seen

    def end(self) -> set[int]:
        """Statuses of all answers."""
        self._stop.set()
        with self._pool:
            return set().union(*(client.result() for client in self._clients))


@pytest.fixture(scope="module")
def tenants(running: Running) -> list[Running]:
    made = [json.loads(command("tenants", "add", f"{name}-{time.time_ns()}", "--json", "-")) for name in ("one", "two")]
    time.sleep(5.0)  # until every ingress knows them
    return [Running(running.url, each["key"], running.process, each["name"]) for each in made]


def test_counters_are_there_at_zero_before_anything_has_happened(prometheus: Prometheus) -> None:
    for name, num in (
        ("ray_adaptivellm_preemptions_total", 2),
        ("ray_adaptivellm_preemption_cost_seconds_total", 4),
        ("ray_adaptivellm_refused_requests_total", 3),
        ("ray_adaptivellm_fairness_refused_reports_total", 1),
    ):
        wait_until(lambda name=name, num=num: prometheus.values(name) == [0.0] * num, f"{name} is not there")


def test_every_expression_of_dashboards_and_alerts_has_data_while_two_tenants_want_more_than_fits(
    prometheus: Prometheus, tenants: list[Running], tmp_path: Path
) -> None:
    missing = {text: where for where, text in [*drawn(), *watched()] if needed_elsewhere(text) is None}
    assert len(missing) > 50
    pressure, began_s, policy = Pressure(tenants), time.monotonic(), -1
    stranger = replace(tenants[0], key="nobody's")
    while missing and time.monotonic() < began_s + LIMIT_S:
        now = min(int((time.monotonic() - began_s) / 30.0), len(POLICIES) - 1)
        if now != policy:
            policy = now
            command("policy", POLICIES[policy])
        assert stranger.post("/v1/completions", {}).status_code == 401
        missing = {text: where for text, where in missing.items() if not prometheus.values(text)}
        time.sleep(2.0)
    statuses = pressure.end()
    assert statuses == {200}
    assert not missing, "\n".join(f"{where}: {text}" for text, where in missing.items())
    print(f"{time.monotonic() - began_s:.0f} s until all had data")


def test_prometheus_evaluates_every_alert(prometheus: Prometheus) -> None:
    def evaluated() -> dict[str, str]:
        groups = prometheus.get("rules")["groups"]
        return {rule["name"]: rule["health"] for group in groups for rule in group["rules"]}

    wait_until(lambda: evaluated() == {rule["alert"]: "ok" for rule in alerts()}, f"not evaluated: {evaluated()}")


def test_gauges_stay_while_nothing_happens(prometheus: Prometheus) -> None:
    time.sleep(45.0)  # Ray forgets what was not set for 20 s
    for name in ("requests", "kv_blocks", "degraded", "fairness_bound", "policy", "headroom_blocks", "costs_version"):
        assert prometheus.values(f"ray_adaptivellm_{name}"), name
    assert prometheus.values("sum(ray_adaptivellm_requests)") == [0.0]


@contextmanager
def watching(stdout: int) -> Iterator["subprocess.Popen[str]"]:
    """`status --watch`, which Ctrl-C ends whatever this process does at one."""
    command = [sys.executable, "-m", "cluster", "status", "--watch", "--interval-s", "0.5"]
    process = subprocess.Popen(
        command, stdout=stdout, stderr=subprocess.STDOUT if stdout != subprocess.PIPE else subprocess.PIPE, text=True,
        env=environment(), preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait(30)


def test_whoever_pipes_the_live_view_gets_a_line_for_each_look_and_a_clean_end(running: Running) -> None:
    with watching(subprocess.PIPE) as watch:
        assert watch.stdout is not None
        lines = [watch.stdout.readline() for _ in range(3)]
        watch.send_signal(signal.SIGINT)
        _, errors = watch.communicate(timeout=60)
    assert watch.returncode == 0, errors
    assert "Traceback" not in errors
    for line in lines:
        assert "1 replica, tokens/s " in line
        assert "\033" not in line
        assert "Away" not in line, "all is well"


def test_on_a_terminal_the_live_view_is_redrawn_in_its_place(running: Running) -> None:
    ours, theirs = pty.openpty()
    with watching(theirs) as watch:
        os.close(theirs)
        shown = read_until(ours, lambda shown: shown.count("\033[H") >= 3)
        watch.send_signal(signal.SIGINT)
        read_until(ours, lambda _: watch.poll() is not None)
        assert watch.returncode == 0
    os.close(ours)
    for word in ("tokens/s", "waiting", "KV used", "preemptions", "gap/bound", "replica"):
        assert word in shown, word


def read_until(terminal: int, holds: Callable[[str], bool], limit_s: float = 60.0) -> str:
    """All that is shown on a terminal until something holds of it."""
    shown, deadline_s = "", time.monotonic() + limit_s
    while not holds(shown):
        assert time.monotonic() < deadline_s, shown
        if select.select([terminal], [], [], 0.2)[0]:
            try:
                shown += os.read(terminal, 1 << 16).decode(errors="replace")
            except OSError:  # its other end is closed
                time.sleep(0.2)
    return shown


@needs_chromium
def test_rays_dashboard_shows_the_application_its_deployments_and_our_actors_by_their_names(
    running: Running, tmp_path: Path
) -> None:
    token = (Path.home() / ".ray" / "auth_token").read_text().strip()
    with chromium(tmp_path / "browser") as page:
        page.call("Network.setCookie", name="ray-authentication-token", value=token, url=running.dashboard)
        page.open(f"{running.dashboard}/#/serve")
        page.wait_for("adaptivellm", "RUNNING", limit_s=120)
        page.picture(tmp_path / "serve.png")
        page.open(f"{running.dashboard}/#/serve/applications/adaptivellm")
        page.wait_for("AdaptiveIngress", f"AdaptiveLLMServer:{DEFAULT_MODEL}", limit_s=120)
        page.picture(tmp_path / "application.png")
        page.open(f"{running.dashboard}/#/actors")
        page.wait_for("fairness", "cost_service", limit_s=120)
        page.picture(tmp_path / "actors.png")
