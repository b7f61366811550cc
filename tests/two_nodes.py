"""Clusters of a head and one worker for tests: by `ray up` on hosts of their own, or, where there can be none, on one host.

Rule: what is run is what manifests and documents tell people to run; what a test must change in a manifest is changed in
one function, and a change that finds nothing to change is an error.
"""

import json
import os
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import yaml

from cluster import keys
from cluster.config import default_home
from tests import steady_client
from tests.cluster_runs import environment, free_port
from tests.network_hosts import HOME, Host, Network, network

ROOT = Path(__file__).parents[1]
TOOLS = Path(sys.executable).parent
MODEL = "smollm2-135m-instruct"
TENANTS = ("flood", "light")

SHELL_ENVIRONMENT = "RAY_AUTH_MODE=token"

GET = """
import sys, urllib.request
request = urllib.request.Request(sys.argv[1], headers={"Authorization": "Bearer " + sys.argv[2]} if sys.argv[2] else {})
print(urllib.request.urlopen(request, timeout=20).read().decode())
"""


def serve_config(**http_options: Any) -> dict[str, Any]:
    """The CPU manifest sized for nodes of two logical CPUs: one replica and an ingress fit a node, two replicas do not."""
    config = yaml.safe_load((ROOT / "manifests/serve_local.yaml").read_text())
    config |= {"proxy_location": "EveryNode", "http_options": {"host": "127.0.0.1", "port": 8000} | http_options}
    args = config["applications"][0]["args"]
    args["replicas"] |= {"num_cpus": 1.2, "max_model_len": 512, "max_num_seqs": 4, "kv_cache_bytes": 1 << 27}
    args["preemption"]["host_pool_bytes"] = 1 << 27
    args["ingress"] = {"num_replicas": 2, "num_cpus": 0.2, "max_replicas_per_node": 1}
    return config


def adapted(manifest: Path, head: Host, workers: list[Host]) -> dict[str, Any]:
    """A `ray up` manifest for these hosts: their addresses, user and size, and an environment that is installed already."""
    text = manifest.read_text()
    for pattern, replacement in (
        (r"192\.0\.2\.10\b", head.address),
        (r"\[192\.0\.2\.11\]", f"[{', '.join(host.address for host in workers)}]"),
        (r"ssh_user: ubuntu", "ssh_user: root"),
        (r"cd ~/adaptivellm && make setup PYTHON=python3", f"ln -sfn {sys.prefix} ~/adaptivellm/.venv"),
        (
            r"--num-cpus=8 --num-gpus=1 --object-store-memory=\d+",
            "--num-cpus=2 --num-gpus=0 --object-store-memory=150000000",
        ),
    ):
        text, count = re.subn(pattern, replacement, text)
        assert count, f"{manifest.name} holds no {pattern}"
    config: dict[str, Any] = yaml.safe_load(text)
    config["file_mounts"]["~/serve.yaml"] = f"{HOME}/serve.yaml"
    return config


class RayUp:
    """Two hosts and their operator, who has written down the cluster's file and made its token."""

    def __init__(self, spaces: Network, folder: Path) -> None:
        self.operator, (self.head, self.worker) = spaces.operator, spaces.hosts
        self._spaces, self._folder = spaces, folder
        self.keys = {tenant: keys.new_key() for tenant in TENANTS}
        file = adapted(ROOT / "manifests/ray_up/local.yaml", self.head, [self.worker])
        home = self.operator.folder / "home"
        (home / "cluster.yaml").write_text(yaml.safe_dump(file))
        (home / "serve.yaml").write_text(yaml.safe_dump(serve_config()))
        self.operator.run("bash", "-c", f"umask 077; {TOOLS}/ray get-auth-token --generate > /dev/null")
        self._token = (home / ".ray/auth_token").read_text().strip()
        # Two tenants whom every ingress knows without a store that all hosts share.
        state = self.head.folder / "home/.adaptivellm"
        state.mkdir(mode=0o700, exist_ok=True)
        hashes = {keys.hash_key(key): tenant for tenant, key in self.keys.items()}
        keys.write_secret(state / "keys.json", json.dumps(hashes))

    def ray(self, command: str, *words: str, limit_s: float = 300) -> str:
        """`ray COMMAND` of the operator, in the repository's folder, for the cluster's file."""
        line = ["bash", "-c", 'cd "$0" && exec "$@"', str(ROOT), f"{TOOLS}/ray", command, *words]
        return self.operator.run(*line, limit_s=limit_s)

    def up(self) -> None:
        self.ray("up", "-y", "--no-config-cache", f"{HOME}/cluster.yaml")

    def down(self) -> str:
        return self.ray("down", "-y", f"{HOME}/cluster.yaml")

    def deploy(self) -> None:
        command = f"cd ~/adaptivellm && {SHELL_ENVIRONMENT} .venv/bin/serve deploy ~/serve.yaml"
        self.ray("exec", f"{HOME}/cluster.yaml", command)

    def dashboard(self, path: str, *, token: bool = True) -> Any:
        """What the head's dashboard answers on the head.

        Raises:
            AssertionError: No answer, or not 200.
        """
        words = [f"{TOOLS}/python", "-c", GET, f"http://127.0.0.1:8265{path}", self._token if token else ""]
        return json.loads(self.head.run(*words))

    def status(self) -> dict[str, Any]:
        """`python -m cluster status` on the head."""
        command = f"cd ~/adaptivellm && {SHELL_ENVIRONMENT} .venv/bin/python -m cluster status --json ~/status.json"
        self.head.run("bash", "-c", command, limit_s=120)
        found: dict[str, Any] = json.loads((self.head.folder / "home/status.json").read_text())
        return found

    @contextmanager
    def load(self, host: Host, tenant: str, concurrency: int, max_tokens: int = 32) -> Iterator[Path]:
        """A steady client of a tenant on a host, through its endpoint there; yields the file of its requests."""
        program = Path(steady_client.__file__)
        output = host.folder / "home" / f"{tenant}-{secrets.token_hex(4)}.jsonl"
        command = host.command(
            sys.executable, str(program), "http://127.0.0.1:8000", MODEL, self.keys[tenant], str(concurrency),
            str(max_tokens), f"{HOME}/{output.name}",
        )  # fmt: skip
        with client(command, output):
            yield output

    def cut(self) -> None:
        """Let nothing reach the worker or come from it."""
        self._spaces.cut(self.worker)

    def mend(self) -> None:
        self._spaces.mend(self.worker)


class OneMachine:
    """Two nodes of Ray's test cluster on this machine, with one proxy: what can be tested where hosts are refused."""

    head, worker = "head", "worker"

    def __init__(self, folder: Path, ray_folder: Path) -> None:
        from ray.cluster_utils import Cluster

        self._folder, self._token = folder, os.environ["RAY_AUTH_TOKEN"]
        self._http_port, self._dashboard_port = free_port(), free_port()
        self.keys = {tenant: keys.new_key() for tenant in TENANTS}
        hashes = {keys.hash_key(key): tenant for tenant, key in self.keys.items()}
        keys.write_secret(folder / "keys.json", json.dumps(hashes))
        self._node = {"num_cpus": 2, "num_gpus": 0, "object_store_memory": 150_000_000}
        head = {"include_dashboard": True, "dashboard_port": self._dashboard_port, "temp_dir": str(ray_folder)}
        self.nodes = Cluster(initialize_head=True, head_node_args=self._node | head)
        self._worker = self.nodes.add_node(**self._node)

    def deploy(self) -> None:
        config = serve_config(port=self._http_port) | {"proxy_location": "HeadOnly"}
        config["applications"][0]["args"]["state"] = {"directory": str(self._folder)}
        (self._folder / "serve.yaml").write_text(yaml.safe_dump(config))
        address = f"http://127.0.0.1:{self._dashboard_port}"
        command = [str(TOOLS / "serve"), "deploy", str(self._folder / "serve.yaml"), "--address", address]
        subprocess.run(command, check=True, timeout=120, capture_output=True)

    def dashboard(self, path: str) -> Any:
        url = f"http://127.0.0.1:{self._dashboard_port}{path}"
        answer = httpx.get(url, headers={"Authorization": f"Bearer {self._token}"}, timeout=30)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def status(self) -> dict[str, Any]:
        command = [sys.executable, "-m", "cluster", "status", "--json", "-", "--address", self.nodes.address]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    @contextmanager
    def load(self, host: str, tenant: str, concurrency: int, max_tokens: int = 32) -> Iterator[Path]:
        """As of `RayUp`, but all through the head's proxy: two of one port cannot be on one machine."""
        output = self._folder / f"{host}-{tenant}-{secrets.token_hex(4)}.jsonl"
        url = f"http://127.0.0.1:{self._http_port}"
        words = [steady_client.__file__, url, MODEL, self.keys[tenant], str(concurrency), str(max_tokens), str(output)]
        with client([sys.executable, *words], output):
            yield output

    def cut(self) -> None:
        """Kill the worker node's processes."""
        self.nodes.remove_node(self._worker, allow_graceful=False)

    def mend(self) -> None:
        self._worker = self.nodes.add_node(**self._node)


TwoNodes = RayUp | OneMachine


@contextmanager
def client(command: list[str], output: Path) -> Iterator[None]:
    """A steady client for the duration of the block, and until its last answer."""
    output.touch()
    with subprocess.Popen(command, stdin=subprocess.PIPE) as running:
        try:
            yield
        finally:
            running.communicate(b"\n", timeout=steady_client.LIMIT_S + 30)


@contextmanager
def one_machine(folder: Path) -> Iterator[OneMachine]:
    """Two running nodes of a cluster of its own, and the folder of the models."""
    (folder / "models").symlink_to(default_home() / "models")
    before = dict(os.environ)
    # What an operator's shell has, for all that the nodes start.
    ours = environment() | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        "RAY_worker_niceness": "0",
    }
    os.environ.clear()
    os.environ.update(ours)
    made = None
    try:
        with TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as ray_folder:
            made = OneMachine(folder, Path(ray_folder))
            yield made
    finally:
        if made is not None:
            made.nodes.shutdown()
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def ray_up(folder: Path) -> Iterator[RayUp]:
    """Two hosts, not yet a cluster; all that runs there ends with the block."""
    models = default_home() / "models"
    models.mkdir(parents=True, exist_ok=True)
    with network(folder, ["head", "worker"], shared={".adaptivellm/models": models}) as spaces:
        yield RayUp(spaces, folder)


def num_alive(cluster: TwoNodes) -> int:
    """Nodes that live, as the head sees it."""
    nodes = cluster.dashboard("/api/v0/nodes")["data"]["result"]["result"]
    return sum(node["state"] == "ALIVE" for node in nodes)


def spread(cluster: TwoNodes) -> dict[str, int]:
    """Deployment's first word: on how many nodes it has a running replica; empty until there is an application.

    Raises:
        AssertionError: It failed to deploy.
    """
    application = cluster.dashboard("/api/serve/applications/")["applications"].get("adaptivellm")
    if application is None:
        return {}
    assert application["status"] != "DEPLOY_FAILED", json.dumps(application)[:3000]
    return {
        name.partition(":")[0]: len(
            {replica["node_id"] for replica in deployment["replicas"] if replica["state"] == "RUNNING"}
        )
        for name, deployment in application["deployments"].items()
    }


def requests(output: Path) -> list[dict[str, Any]]:
    """What a steady client has written."""
    return [json.loads(line) for line in output.read_text().splitlines()]


def wait_for(condition: Callable[[], Any], what: str, *, limit_s: float) -> None:
    end_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end_s, f"waited {limit_s} s for {what}"
        time.sleep(1.0)
