"""Goal: the real actor runs on the head node, and when it is killed it is back within seconds with what it knew; who
exchanges goes on meanwhile.

Method: a real Ray cluster of two nodes on this machine, whose head books no CPU; the product's store; replicas that are
engines' real accounts. `-s` prints after how many seconds it was back.
"""

import asyncio
import os
import random
import signal
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cluster.state import SqliteStore
from cost_service.service_messages import FairnessAnswer
from tests.test_global_scheduler_fairness_service import Replica

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

WAIT_S = 60.0


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The head node's id, in a cluster that has another node with all the CPUs."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=2)
        ray.init(address=cluster.address, log_to_driver=False)
        cluster.wait_for_nodes()
        yield cluster.head_node.node_id
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture
def store(tmp_path: Path) -> SqliteStore:
    return SqliteStore(tmp_path / "state.sqlite")


@pytest.fixture
def actor(head: str, store: SqliteStore) -> Iterator[Any]:
    import ray

    from global_scheduler.fairness_actor import start_fairness_actor

    started = start_fairness_actor(store)
    yield started
    ray.kill(started, no_restart=True)
    deadline_s = time.monotonic() + WAIT_S
    from cost_service.named_actor import find_actor
    from cost_service.service_messages import ACTOR

    while find_actor(ACTOR) is not None:
        assert time.monotonic() < deadline_s, "a killed actor keeps its name"
        time.sleep(0.1)


def exchange(actor: Any, replica: Replica) -> FairnessAnswer:
    import ray

    data = msgspec.msgpack.encode(replica.message())
    answer = msgspec.msgpack.decode(ray.get(actor.exchange.remote(data), timeout=WAIT_S), type=FairnessAnswer)
    replica.learn(answer)
    return answer


def status(actor: Any) -> dict[str, Any]:
    import ray

    told: dict[str, Any] = ray.get(actor.status.remote(), timeout=WAIT_S)
    return told


def tokens(actor: Any, tenant: str) -> int:
    (pool,) = status(actor)["pools"].values()
    return int({each["tenant"]: each["delivered"]["num_output_tokens"] for each in pool["tenants"]}[tenant])


def test_it_runs_on_the_head_node_whoever_starts_it_and_there_is_one(actor: Any, head: str, store: SqliteStore) -> None:
    from global_scheduler.fairness_actor import start_fairness_actor

    assert status(actor)["node"] == head
    assert status(start_fairness_actor(store))["pid"] == status(actor)["pid"]


def assert_it_goes_on(actor: Any, before: dict[str, Any], after: dict[str, Any], a: Replica, b: Replica) -> None:
    """In a new life it has what was stored of 211 tokens of f at weight 3, and after reports all 216, none of them twice."""
    assert after["life"] != before["life"]
    assert tokens(actor, "f") in (200, 211), "what was stored is there before any replica says so"
    (pool,) = after["pools"].values()
    assert pool["tenants"][0]["weight"] == 3.0
    for _ in range(3):
        for replica in (a, b):
            exchange(actor, replica)
    assert tokens(actor, "f") == 216
    assert a.service.tenant_key("f") == b.service.tenant_key("f") == pytest.approx(2 * 216 / 3.0)


def test_killed_it_is_back_with_its_state_and_no_token_is_lost_or_counts_twice(actor: Any, store: SqliteStore) -> None:
    import ray

    a, b = Replica("a"), Replica("b")
    ray.get(actor.set_weights.remote({"f": 3.0}))
    for replica in (a, b):
        replica.serve("f", 100)
        exchange(actor, replica)
    deadline_s = time.monotonic() + WAIT_S
    while not store.load("fairness_pools") or not store.load("fairness_weights"):
        assert time.monotonic() < deadline_s, "nothing is stored"
        time.sleep(0.1)
    a.serve("f", 11)
    exchange(actor, a)  # told, and perhaps not stored
    before = status(actor)
    b.serve("f", 5)
    after, seconds = killed(actor, before["pid"])
    print(f"\nback after {seconds:.2f} s")
    assert_it_goes_on(actor, before, after, a, b)


@pytest.mark.slow
def test_killed_twenty_times_at_any_moment_it_counts_nothing_twice_and_loses_nothing(actor: Any) -> None:
    rng, a, b, total, back_s = random.Random(0), Replica("a"), Replica("b"), 0, []
    for _ in range(20):
        for replica in (a, b):
            num = rng.randrange(1, 50)
            replica.serve("f", num)
            total += num
            if rng.random() < 0.7:
                exchange(actor, replica)
        time.sleep(rng.random())  # wherever it is between two times at which it stores
        after, seconds = killed(actor, status(actor)["pid"])
        back_s.append(seconds)
        for pool in after["pools"].values():
            assert sum(one["delivered"]["num_output_tokens"] for one in pool["tenants"]) <= total
        for _ in range(3):
            for replica in (a, b):
                exchange(actor, replica)
        assert tokens(actor, "f") == total
    print(f"\nback after {statistics.median(back_s):.2f} s in the median of 20 kills, {max(back_s):.2f} s at most")


def killed(actor: Any, pid: int) -> tuple[dict[str, Any], float]:
    """Kill it; returns its status when it is back, and after how many seconds that was."""
    import ray

    os.kill(pid, signal.SIGKILL)
    killed_s = time.monotonic()
    while True:
        try:
            return status(actor), time.monotonic() - killed_s
        except ray.exceptions.RayError:
            assert time.monotonic() - killed_s < WAIT_S, "it does not come back"
            time.sleep(0.05)


def test_who_exchanges_goes_on_through_a_kill(actor: Any) -> None:
    from cost_service.named_actor import exchange_for_ever
    from cost_service.service_messages import ACTOR

    told: list[str] = []
    pids = [status(actor)["pid"]]

    async def ask(found: Any) -> None:
        pids.append((await found.status.remote())["pid"])

    async def body() -> None:
        loop = asyncio.create_task(
            exchange_for_ever(ACTOR, ask, lambda away: told.append("away" if away else "back"),
                              interval_s=lambda: 0.05, kept="as it is")
        )  # fmt: skip
        os.kill(pids[0], signal.SIGKILL)
        deadline_s = time.monotonic() + WAIT_S
        while pids[-1] == pids[0]:
            assert time.monotonic() < deadline_s, (pids, told)
            assert not loop.done(), loop
            await asyncio.sleep(0.1)
        loop.cancel()

    asyncio.run(body())
    assert told in (["away", "back"], []), "none if no call met it dead"


def test_junk_is_refused_and_the_actor_lives_on(actor: Any) -> None:
    import ray

    with pytest.raises(ray.exceptions.RayTaskError):
        ray.get(actor.exchange.remote(b"junk"), timeout=WAIT_S)
    assert status(actor)["refused"] == 1
