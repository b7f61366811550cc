"""Goal: with Redis the fairness and the cost actor survive the loss of the node that they run on, with what they knew; and a
cluster that serves goes on through every outage of Redis.

Method: a real Ray cluster of three nodes on this machine and a real `redis-server`; the node of an actor is killed. `slow`:
the product itself, `python -m cluster serve`, under requests while Redis is killed, paused and emptied. `-s` prints times.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import yaml

from cluster.bootstrap import ROOT
from cluster.redis_store import RedisStore
from cost_service.service import Kind
from tests.cluster_runs import HELLO, MODEL, environment, free_port
from tests.redis_runs import RedisServer, needs_redis, redis_server, wait_until
from tests.test_cost_service_learner import START, TRUTH, samples
from tests.test_global_scheduler_fairness_actor import assert_it_goes_on, exchange, status
from tests.test_global_scheduler_fairness_service import Replica

pytestmark = [pytest.mark.ray, needs_redis, pytest.mark.timeout(900)]

WAIT_S = 120.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


# Nodes


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head and two more nodes."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False)
        cluster.wait_for_nodes()
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def on_a_worker(cluster: Any, start: Any, node_of: Any) -> tuple[Any, Any]:
    """Start an actor until Ray puts it on a node that can be lost; returns its handle and that node."""
    import ray

    from cost_service.named_actor import NAMESPACE

    workers = {node.node_id: node for node in cluster.worker_nodes}
    for _ in range(30):
        actor = start()
        node_id = node_of(actor)
        if node_id in workers:
            return actor, workers[node_id]
        ray.kill(actor, no_restart=True)
        wait_until(lambda: NAMESPACE not in {each["namespace"] for each in ray.util.list_named_actors(True)})
    pytest.fail("Ray puts the actor on the head node alone")


def back_elsewhere(ask: Any, node_id: str) -> float:
    """Seconds until an actor answers from another node; what `ask` returns is the node that it is on."""
    import ray

    began_s = time.monotonic()
    while True:
        try:
            if ask() != node_id:  # its process may outlive its node's for a moment
                return time.monotonic() - began_s
        except ray.exceptions.RayError:
            pass
        assert time.monotonic() - began_s < WAIT_S, "it does not come back"
        time.sleep(0.1)


def test_the_fairness_actor_comes_back_on_another_node_with_its_state_and_no_token_counts_twice(
    cluster: Any, server: RedisServer
) -> None:
    import ray

    from global_scheduler.fairness_actor import start_fairness_actor

    server.client().flushall()
    store = RedisStore(server.state())
    actor, node = on_a_worker(cluster, lambda: start_fairness_actor(store), lambda actor: status(actor)["node"])
    a, b = Replica("a"), Replica("b")
    ray.get(actor.set_weights.remote({"f": 3.0}))
    for replica in (a, b):
        replica.serve("f", 100)
        exchange(actor, replica)
    wait_until(lambda: store.load("fairness_pools") and store.load("fairness_weights"))
    time.sleep(1.5)
    a.serve("f", 11)
    exchange(actor, a)  # told, and perhaps not stored
    before = status(actor)
    cluster.remove_node(node, allow_graceful=False)
    b.serve("f", 5)
    back_s = back_elsewhere(lambda: status(actor)["node"], node.node_id)
    after = status(actor)
    print(f"\nthe fairness actor is back on another node {back_s:.2f} s after its node was killed")
    assert_it_goes_on(actor, before, after, a, b)


def test_the_cost_actor_comes_back_on_another_node_with_what_it_learned(cluster: Any, server: RedisServer) -> None:
    import ray

    from cost_service.cost_actor import start_cost_actor

    server.client().flushall()
    store, kind = RedisStore(server.state()), tuple(Kind.of(START))
    actor, node = on_a_worker(cluster, lambda: start_cost_actor(store), node_of_actor)
    data = msgspec.json.encode(list(samples(TRUTH, 400)))
    assert ray.get(actor.observe.remote(START.to_json(), data), timeout=WAIT_S) == 400
    wait_until(lambda: store.load("costs"), WAIT_S)
    learned = ray.get(actor.snapshot.remote(kind), timeout=WAIT_S)
    cluster.remove_node(node, allow_graceful=False)
    back_s = back_elsewhere(lambda: node_of_actor(actor), node.node_id)
    print(f"\nthe cost actor is back on another node {back_s:.2f} s after its node was killed")
    assert ray.get(actor.snapshot.remote(kind), timeout=WAIT_S) == learned


def node_of_actor(actor: Any) -> str:
    import ray

    def node_id(_: Any) -> str:
        import ray

        return str(ray.get_runtime_context().get_node_id())

    return str(ray.get(actor.__ray_call__.remote(node_id), timeout=WAIT_S))


# The product itself


KEPT = ("tenants", "secrets", "fairness_pools", "output_lengths")


class Load:
    """Clients that send one request after another until they are stopped."""

    def __init__(self, url: str, keys: list[str]) -> None:
        self.answers: Counter[Any] = Counter()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._send, args=(url, key), daemon=True) for key in keys]
        for thread in self._threads:
            thread.start()

    def stop(self) -> Counter[Any]:
        self._stop.set()
        for thread in self._threads:
            thread.join(120)
        return self.answers

    def _send(self, url: str, key: str) -> None:
        body = {"model": MODEL, "messages": HELLO, "max_tokens": 8}
        while not self._stop.is_set():
            try:
                answer = httpx.post(
                    url + "/v1/chat/completions", json=body, headers={"authorization": f"Bearer {key}"}, timeout=120
                )
                self.answers[answer.status_code] += 1
            except httpx.HTTPError as error:
                self.answers[type(error).__name__] += 1


@pytest.fixture
def product(server: RedisServer, tmp_path: Path) -> Iterator[tuple[str, str, Path]]:
    """URL, first key and config of the product with its state in Redis."""
    server.client().flushall()
    port, config = free_port(), tmp_path / "serve.yaml"
    document = yaml.safe_load((ROOT / "manifests" / "serve_local.yaml").read_text())
    document["http_options"]["port"] = port
    state = server.state(redis_timeout_s=1.5).model_dump(exclude_none=True)
    document["applications"][0]["args"]["state"] = state
    config.write_text(yaml.safe_dump(document))
    command = ["serve", "--config", str(config), "--dashboard-port", str(free_port())]
    process = subprocess.Popen(
        [sys.executable, "-m", "cluster", *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=environment(), start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    lines, key = [], ""
    for line in process.stdout:
        lines.append(line)
        if line.startswith("API key: "):
            key = line.removeprefix("API key: ").strip()
        if line.startswith("Ctrl-C stops"):
            break
    try:
        assert key, "serve did not come up:\n" + "".join(lines[-40:])
        yield f"http://127.0.0.1:{port}", key, config
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(120)


def command(*arguments: str) -> Any:
    answer = subprocess.run(
        [sys.executable, "-m", "cluster", *arguments, "--json", "-"], capture_output=True, text=True, env=environment(),
        check=True, timeout=120,
    )  # fmt: skip
    return json.loads(answer.stdout[answer.stdout.index("{") :])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_serving_goes_on_through_every_outage_of_redis(product: tuple[str, str, Path], server: RedisServer) -> None:
    url, first_key, config = product
    acme = command("tenants", "add", "acme", "--config", str(config))["key"]
    store = RedisStore(server.state())
    headers = {"authorization": f"Bearer {acme}"}
    wait_until(lambda: httpx.get(url + "/v1/models", headers=headers).status_code == 200)
    load = Load(url, [first_key, acme])

    def is_stored(since: int) -> bool:
        try:
            found = {collection: store.load(collection) for collection in KEPT}
        except OSError:
            return False
        pools = [json.loads(pool["state"]) for pool in found["fairness_pools"].values()]
        delivered = sum(pool["ledger"]["delivered"].get("acme", [0] * 4)[2] for pool in pools)
        return all(found.values()) and "acme" in found["tenants"] and delivered >= since

    def delivered() -> int:
        (pool,) = command("status", "--interval-s", "0.2")["fairness"]["pools"].values()
        return sum(each["delivered"]["num_output_tokens"] for each in pool["tenants"] if each["tenant"] == "acme")

    def until_stored(what: str, since: int) -> None:
        back_s = wait_until(lambda: is_stored(since), 60.0)
        print(f"\n{what}: all stored {back_s:.2f} s after (asked: 5); answers so far {dict(load.answers)}")

    try:
        wait_until(lambda: is_stored(1), WAIT_S)
        since = delivered()
        server.kill()
        time.sleep(10.0)
        server.start()
        until_stored("killed for 10 s, back and empty", since)
        since = delivered()
        server.pause()
        time.sleep(60.0)
        server.resume()
        until_stored("paused for 60 s", since)
        server.pause()
        os.kill(command("status", "--interval-s", "0.2")["fairness"]["pid"], signal.SIGKILL)
        time.sleep(15.0)
        server.resume()
        until_stored("paused, and the fairness actor killed", 1)
        since = delivered()
        server.client().flushall()
        until_stored("emptied", since)
    finally:
        answers = load.stop()
    print(f"\nanswers: {dict(answers)}")
    assert set(answers) == {200}
    assert answers[200] > 50
