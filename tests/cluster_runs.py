"""What tests that start a cluster share."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

MODEL = "smollm2-135m-instruct"
HELLO = [{"role": "user", "content": "Say hello."}]

METRICS = """
from cluster.running import connected
with connected("auto"):
    import ray
    print([node["MetricsExportPort"] for node in ray.nodes()])
"""


@dataclass
class Running:
    """A service that runs, as one of its tenants sees it."""

    url: str
    key: str
    process: subprocess.Popen[str]
    tenant: str = "default"
    dashboard: str = ""

    def post(self, path: str, body: Any = None, *, content: bytes | None = None, **headers: str) -> httpx.Response:
        sent = {"authorization": f"Bearer {self.key}", "content-type": "application/json"}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        data = content if content is not None else json.dumps(body).encode()
        return httpx.post(self.url + path, content=data, headers=sent, timeout=120)


@contextmanager
def serving(more_environment: Mapping[str, str], *arguments: str) -> Iterator[Running]:
    """The service as `make serve` starts it, on free ports; ended as Ctrl-C ends it."""
    port, dashboard_port = free_port(), free_port()
    process = subprocess.Popen(
        [
            sys.executable, "-m", "cluster", "serve", "--port", str(port), "--dashboard-port", str(dashboard_port),
            *arguments,
        ],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment() | dict(more_environment),
        start_new_session=True,
    )  # fmt: skip
    lines, key = [], ""
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if line.startswith("API key: "):
            key = line.removeprefix("API key: ").strip()
        if line.startswith("Ctrl-C stops"):
            break
    if not key:
        process.kill()
        pytest.fail("serve did not come up:\n" + "".join(lines[-40:]))
    try:
        yield Running(f"http://127.0.0.1:{port}", key, process, dashboard=f"http://127.0.0.1:{dashboard_port}")
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(90)


def metrics_port() -> int:
    """Port of the one node's metrics."""
    command = [sys.executable, "-c", METRICS]
    found = subprocess.run(command, env=environment(), check=True, timeout=120, capture_output=True, text=True)
    (port,) = json.loads(found.stdout.splitlines()[-1])
    return int(port)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment() -> dict[str, str]:
    """The tests' environment without what conftest sets for engines inside the test process."""
    ours = ("VLLM_ENABLE_V1_MULTIPROCESSING", "OMP_NUM_THREADS", "VLLM_CPU_OMP_THREADS_BIND", "VLLM_LOGGING_LEVEL")
    return {name: value for name, value in os.environ.items() if name not in ours}
