"""Goal: while replicas come and go, and while a changed config is deployed, no request fails and tenants keep their shares.

Method: a plain Ray cluster and `serve deploy`, as an operator types it, with a tiny random model. Two tenants of one weight
ask for more than there is all the time, one of them with three times as many requests under way: first come would give it
three quarters. Half of the answers are streamed, and each must end as it should. The share is that of delivered tokens.
"""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp
import pytest
import yaml

from cluster.config import DEFAULT_MODEL, default_home
from tests.cluster_runs import environment, free_port
from tests.test_ray_nodes import answers, ask, node, plain_environment, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]

TOOLS = Path(sys.executable).parent
MODEL, SERVER = "tiny", "AdaptiveLLMServer:tiny"
CLIENTS = {"f": 150, "g": 50}
"""Enough of both that requests of both wait at every replica, whatever time they spend elsewhere on a busy machine."""
OUTPUT_TOKENS = 24
LIMIT_S = 300
IN_FORCE_S = 5.0
"""Within which every ingress knows a new tenant."""

LARGEST_GAP = 0.05
"""By which a tenant's share of a run may differ from a half."""

TINY = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 128, "intermediate_size": 256,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 49152,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
    "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32",
}  # fmt: skip


class Cluster:
    """A Ray cluster of one node, and the application that is deployed there."""

    def __init__(self, folder: Path, dashboard: str) -> None:
        self.folder, self.dashboard, self.port = folder, dashboard, free_port()
        self.keys: dict[str, str] = {}

    def deploy(self, *, num_replicas: int | None = None, **replicas: Any) -> None:
        """`serve deploy` of a file.

        Args:
            num_replicas: Set for the deployment, beside `args`.
            replicas: What differs in `args.replicas`.
        """
        args = {
            "model": {"id": MODEL, "source": str(self.folder / "model")},
            "replicas": {
                "num_replicas": 2, "num_cpus": 0.8, "max_model_len": 256, "max_num_seqs": 4,
                "kv_cache_bytes": 8 << 20,
                "engine_kwargs": {"block_size": 32, "enforce_eager": True, "load_format": "dummy"},
            } | replicas,
            "preemption": {"host_pool_bytes": 8 << 20},
            "state": {"directory": str(self.folder / "home")},
        }  # fmt: skip
        one = {"name": "adaptivellm", "route_prefix": "/", "import_path": "cluster.app:build", "args": args}
        if num_replicas is not None:
            one["deployments"] = [{"name": SERVER, "num_replicas": num_replicas}]
        config = {
            "proxy_location": "HeadOnly", "http_options": {"host": "127.0.0.1", "port": self.port}, "applications": [one]
        }  # fmt: skip
        file = self.folder / "serve.yaml"
        file.write_text(yaml.safe_dump(config))
        command = [str(TOOLS / "serve"), "deploy", str(file), "--address", self.dashboard]
        subprocess.run(command, cwd=self.folder, env=self.environment(), check=True, timeout=120, capture_output=True)

    def environment(self) -> dict[str, str]:
        return plain_environment() | {"ADAPTIVELLM_HOME": str(self.folder / "home")}

    def command(self, *arguments: str) -> Any:
        """What one of our commands says with `--json -`."""
        done = subprocess.run(
            [sys.executable, "-m", "cluster", *arguments, "--json", "-"], cwd=self.folder, env=self.environment(),
            check=True, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        return json.loads(done.stdout[done.stdout.index("{") :])

    def application(self) -> dict[str, Any]:
        """As the dashboard knows it; unhealthy it may be for a while, where a test has killed something."""
        found: dict[str, Any] = (
            ask(self.dashboard + "/api/serve/applications/").json()["applications"].get("adaptivellm")
        )
        found = found or {"status": "NOT_STARTED", "deployments": {}}
        assert found["status"] != "DEPLOY_FAILED", json.dumps(found)[:2000]
        return found

    def replicas(self) -> dict[str, str]:
        """State by replica."""
        deployments = self.application()["deployments"]
        return {each["replica_id"]: each["state"] for each in deployments[SERVER]["replicas"]}

    def wait_for_replicas(self, num: int, *, without: set[str] | None = None, limit_s: float = LIMIT_S) -> None:
        """Wait until so many run and there is no other one, and the application says that it is done."""

        def there() -> bool:
            if self.application()["status"] != "RUNNING":
                return False
            found = self.replicas()
            return list(found.values()) == ["RUNNING"] * num and not (without or set()) & set(found)

        wait_for(there, f"{num} replicas", limit_s=limit_s)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two replicas with four seats each, and two tenants."""
    subprocess.run([sys.executable, "-m", "cluster.models"], env=environment(), check=True, timeout=600)
    folder = tmp_path_factory.mktemp("scaling")
    source, model = default_home() / "models" / DEFAULT_MODEL, folder / "model"
    model.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(source / name, model / name)
    (model / "config.json").write_text(json.dumps(TINY))
    dashboard_port = free_port()
    with ExitStack() as stack:
        # Short, for the sockets in it; and not Ray's own, where this cluster's address would outlive it.
        ray_folder = stack.enter_context(TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True))
        stack.enter_context(
            node(
                folder, "--head", "--num-cpus=4", f"--temp-dir={ray_folder}", f"--port={free_port()}",
                "--include-dashboard=true", f"--dashboard-port={dashboard_port}",
            )
        )  # fmt: skip
        one = Cluster(folder, f"http://127.0.0.1:{dashboard_port}")
        wait_for(lambda: answers(one.dashboard + "/api/version"), "the head's dashboard", limit_s=60)
        one.deploy()
        wait_for(lambda: one.application()["status"] == "RUNNING", "the application", limit_s=LIMIT_S)
        for tenant in CLIENTS:
            one.keys[tenant] = one.command("tenants", "add", tenant)["key"]
        time.sleep(IN_FORCE_S)
        yield one


class Load:
    """Clients that send one request after the other, and what came back."""

    def __init__(self, cluster: Cluster, clients: dict[str, int]) -> None:
        self.cluster, self.clients = cluster, clients
        self.tokens: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self._tasks: list[asyncio.Task[None]] = []
        self._ending = False

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Load"]:
        """Send until the end of the block, then let what is under way end."""
        timeout, connector = aiohttp.ClientTimeout(total=LIMIT_S), aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            for tenant, num in self.clients.items():
                self._tasks += [asyncio.create_task(self._ask(session, tenant, number)) for number in range(num)]
            try:
                yield self
            finally:
                self._ending = True
                await asyncio.gather(*self._tasks)

    async def _ask(self, session: aiohttp.ClientSession, tenant: str, number: int) -> None:
        url = f"http://127.0.0.1:{self.cluster.port}/v1/completions"
        headers = {"authorization": f"Bearer {self.cluster.keys[tenant]}"}
        round_number = 0
        while not self._ending:
            round_number += 1
            body: dict[str, Any] = {
                "model": MODEL, "prompt": f"{tenant} {number} {round_number} says", "max_tokens": OUTPUT_TOKENS,
                "ignore_eos": True, "temperature": 0,
            }  # fmt: skip
            if number % 2:
                body |= {"stream": True, "stream_options": {"include_usage": True}}
            try:
                async with session.post(url, json=body, headers=headers) as answer:
                    outcome = self._read(tenant, answer.status, await answer.text(), streamed=bool(number % 2))
            except (aiohttp.ClientError, TimeoutError) as error:
                outcome = type(error).__name__
            self.outcomes[outcome] += 1
            if outcome != "served":
                await asyncio.sleep(1.0)

    def _read(self, tenant: str, status: int, text: str, *, streamed: bool) -> str:
        if status != 200:
            return f"{status} {text[:200]}"
        if streamed:
            events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
            if events[-1:] != ["[DONE]"]:
                return f"a stream that ends with {events[-1:]}"
            usage = json.loads(events[-2])["usage"]
        else:
            usage = json.loads(text)["usage"]
        if usage["completion_tokens"] != OUTPUT_TOKENS:
            return f"{usage['completion_tokens']} tokens"
        self.tokens[tenant] += OUTPUT_TOKENS
        return "served"

    def share(self, since: Counter[str]) -> float:
        """Of f, of what both had since then."""
        had = {tenant: self.tokens[tenant] - since[tenant] for tenant in self.clients}
        return had["f"] / sum(had.values())


def report(what: str, load: Load, began_s: float, since: Counter[str]) -> None:
    seconds = time.monotonic() - began_s
    print(
        f"\n{what}: {dict(load.outcomes)} in {seconds:.0f} s, {load.tokens.total() / seconds:.0f} tokens/s,"
        f" share of f {load.share(since):.3f}"
    )


def test_replicas_come_and_go_under_load_and_nothing_fails(cluster: Cluster) -> None:
    async def scenario() -> None:
        async with Load(cluster, CLIENTS).running() as load:
            await asyncio.sleep(10.0)  # until both tenants wait
            began_s, since = time.monotonic(), load.tokens.copy()
            for num in (4, 2):
                await asyncio.to_thread(cluster.deploy, num_replicas=num)
                await asyncio.to_thread(cluster.wait_for_replicas, num)
                await asyncio.sleep(10.0)
                report(f"{num} replicas", load, began_s, since)
            share = load.share(since)
        assert set(load.outcomes) == {"served"}, load.outcomes
        assert abs(share - 0.5) <= LARGEST_GAP, share

    before = set(cluster.replicas())
    asyncio.run(scenario())
    assert len(before & set(cluster.replicas())) >= 1, "a change of the number alone restarts nobody"


def test_a_changed_config_is_deployed_under_load_and_nothing_fails(cluster: Cluster) -> None:
    async def scenario() -> None:
        async with Load(cluster, CLIENTS).running() as load:
            await asyncio.sleep(10.0)
            began_s, since = time.monotonic(), load.tokens.copy()
            await asyncio.to_thread(cluster.deploy, max_num_seqs=6)
            await asyncio.to_thread(cluster.wait_for_replicas, 2, without=before)
            await asyncio.sleep(5.0)
            report("a changed config", load, began_s, since)
            share = load.share(since)
        assert set(load.outcomes) == {"served"}, load.outcomes
        assert abs(share - 0.5) <= LARGEST_GAP, share

    before = set(cluster.replicas())
    asyncio.run(scenario())
    assert {one["max_num_seqs"] for one in cluster.command("status")["replicas"]} == {6}


def test_a_request_whose_replica_is_killed_before_it_answers_is_answered_by_another(cluster: Cluster) -> None:
    async def scenario() -> None:
        async with Load(cluster, CLIENTS).running() as load:
            await asyncio.sleep(8.0)
            victim = (await asyncio.to_thread(cluster.command, "status"))["replicas"][0]["pid"]
            os.kill(victim, signal.SIGKILL)
            await asyncio.sleep(8.0)
        print(f"\na killed replica: {dict(load.outcomes)}")
        broken = sum(num for outcome, num in load.outcomes.items() if "stream" in outcome)
        assert broken == load.outcomes.total() - load.outcomes["served"], "streams that had begun, and nothing else"
        assert broken <= 6, "as many as had seats"

    asyncio.run(scenario())
    cluster.wait_for_replicas(2)


def test_the_load_says_how_many_replicas_there_are(cluster: Cluster) -> None:
    aims = {
        "min_replicas": 1, "max_replicas": 3, "target_queued_s": 0.5, "max_step_up": 1, "up_delay_s": 2.0,
        "up_cooldown_s": 5.0, "down_delay_s": 5.0, "down_cooldown_s": 8.0,
    }  # fmt: skip
    before = set(cluster.replicas())
    cluster.deploy(autoscaling=aims)
    cluster.wait_for_replicas(1, without=before)

    async def scenario() -> None:
        async with Load(cluster, CLIENTS).running() as load:
            await asyncio.to_thread(cluster.wait_for_replicas, 3)
            (scaling,) = (await asyncio.to_thread(cluster.command, "status"))["scaling"]
            assert (scaling["wanted"], scaling["least"], scaling["most"], scaling["asked"]) == (3, 1, 3, 3)
            assert "are aimed at" in scaling["why"] or "is aimed at" in scaling["why"]
        assert set(load.outcomes) == {"served"}, load.outcomes

    asyncio.run(scenario())
    cluster.wait_for_replicas(1)
