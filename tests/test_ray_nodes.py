"""Goal: on a plain Ray cluster of two nodes, `serve deploy` brings the application up on both, and it answers.

Method: what an operator types: `ray start --head`, `ray start --address` in a folder that is not the project's, each with
one logical CPU so that only one replica fits a node, and `serve deploy` of the manifest with only its port changed.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import pytest
import yaml

from cluster import keys
from cluster.config import default_home
from tests.cluster_runs import HELLO, MODEL, environment, free_port

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

TOKEN = secrets.token_hex(16)
"""What Ray's processes, and clients of its dashboard, show one another (`RAY_AUTH_MODE=token`)."""

MANIFEST = Path(__file__).parents[1] / "manifests" / "serve_local.yaml"
TOOLS = Path(sys.executable).parent
START_LIMIT_S = 600


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """URLs of the endpoint and of the dashboard."""
    subprocess.run([sys.executable, "-m", "cluster.models"], env=environment(), check=True, timeout=600)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    gcs_port, dashboard_port, http_port = free_port(), free_port(), free_port()
    config = yaml.safe_load(MANIFEST.read_text())
    config["http_options"]["port"] = http_port
    file = elsewhere / "serve.yaml"
    file.write_text(yaml.safe_dump(config))
    dashboard = f"http://127.0.0.1:{dashboard_port}"
    with ExitStack() as nodes:
        # Short, for the sockets in it; and not Ray's own, where this cluster's address would outlive it.
        ray_folder = nodes.enter_context(TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True))
        nodes.enter_context(
            node(
                elsewhere,
                "--head",
                f"--temp-dir={ray_folder}",
                f"--port={gcs_port}",
                "--include-dashboard=true",
                f"--dashboard-port={dashboard_port}",
            )
        )
        wait_for(lambda: answers(dashboard + "/api/version"), "the head's dashboard", limit_s=60)
        nodes.enter_context(node(elsewhere, f"--address=127.0.0.1:{gcs_port}"))
        deploy = [str(TOOLS / "serve"), "deploy", str(file), "--address", dashboard]
        subprocess.run(deploy, cwd=elsewhere, env=plain_environment(), check=True, timeout=120, capture_output=True)
        url = f"http://127.0.0.1:{http_port}"
        wait_for(lambda: application(dashboard)["status"] == "RUNNING", "the application", limit_s=START_LIMIT_S)
        yield url, dashboard


def test_each_node_has_a_replica(deployed: tuple[str, str]) -> None:
    _, dashboard = deployed
    (server,) = (
        deployment for name, deployment in application(dashboard)["deployments"].items() if "LLMServer" in name
    )
    assert [replica["state"] for replica in server["replicas"]] == ["RUNNING", "RUNNING"]
    assert len({replica["node_id"] for replica in server["replicas"]}) == 2


def test_both_replicas_answer(deployed: tuple[str, str]) -> None:
    url, _ = deployed
    key = keys.bootstrap_key_path(default_home()).read_text().strip()
    headers = {"Authorization": f"Bearer {key}"}
    body = {"model": MODEL, "messages": HELLO, "max_tokens": 4}
    for _ in range(8):  # placed at random among two: all on one node once in 128 runs
        answer = httpx.post(url + "/v1/chat/completions", headers=headers, json=body, timeout=120)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == 4
    assert httpx.post(url + "/v1/chat/completions", json=body, timeout=30).status_code == 401


@contextmanager
def node(folder: Path, *arguments: str) -> Iterator[None]:
    """A Ray node in the foreground, ended by its own handle."""
    command = [
        str(TOOLS / "ray"), "start", "--block", "--num-cpus=1", "--node-ip-address=127.0.0.1", *arguments,
        f"--dashboard-agent-listen-port={free_port()}", f"--dashboard-agent-grpc-port={free_port()}",
        "--disable-usage-stats",
    ]  # fmt: skip
    if "--head" not in arguments:
        command.remove("--disable-usage-stats")  # an option of heads
    with (folder / "ray.log").open("ab") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=plain_environment(), stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def plain_environment() -> dict[str, str]:
    """What an operator's shell has: a token, and no path that lets processes import the project from its folder."""
    ours = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    return ours | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}


def application(dashboard: str) -> dict[str, Any]:
    """The application as the dashboard knows it.

    Raises:
        AssertionError: It failed to deploy.
    """
    answer = ask(dashboard + "/api/serve/applications/")
    found: dict[str, Any] = answer.json().get("applications", {}).get("adaptivellm", {"status": "NOT_STARTED"})
    assert found["status"] not in ("DEPLOY_FAILED", "UNHEALTHY"), json.dumps(found)[:2000]
    return found


def ask(url: str) -> httpx.Response:
    return httpx.get(url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=30)


def answers(url: str) -> bool:
    try:
        return ask(url).status_code == 200
    except httpx.HTTPError:
        return False


def wait_for(condition: Any, what: str, *, limit_s: float) -> None:
    end_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end_s, f"waited {limit_s} s for {what}"
        time.sleep(0.5)
