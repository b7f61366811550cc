"""Goal: whatever happens to Redis, what serves goes on, and state is in Redis again within seconds of its return.

Method: a real `redis-server`; beside it the real actors' classes and an ingress's tenants, as they run in a cluster but
without Ray, and a replica's real accounts that exchange all the time. Redis is killed, paused, emptied, filled, closed to us
and damaged. `-s` prints after how many seconds all was stored again.
"""

import asyncio
import json
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from cluster.bootstrap import ROOT
from cluster.config import StateArgs
from cluster.redis_store import RedisStore
from cluster.serve_tenants import LiveTenants
from cluster.tenant_limits import TenantLimits
from cluster.tenant_registry import TenantRegistry
from cost_service import cost_actor, serve_state
from cost_service.cost_actor import CostActor
from cost_service.service import KEY, Kind
from cost_service.service_messages import FairnessAnswer
from global_scheduler.fairness_actor import FairnessActor
from tests.redis_runs import PASSWORD, PREFIX, RedisServer, needs_redis, redis_server, wait_until
from tests.test_cost_service_learner import START, TRUTH, samples
from tests.test_cost_service_length_service import finished, report
from tests.test_global_scheduler_fairness_service import Replica

pytestmark = [needs_redis, pytest.mark.timeout(300)]

BACK_S = 5.0
"""Within which all is stored again; tests wait longer, for a busy machine."""

COLLECTIONS = ("tenants", "secrets", "fairness_pools", "fairness_weights", KEY, "output_lengths")


class Gauge:
    """Notes what it is set to."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def set(self, value: float, tags: dict[str, str]) -> None:
        self.values[tags["part"]] = value


class Serving:
    """Actors, an ingress's tenants and a replica, at work in threads of their own until `stop`."""

    def __init__(self, state: StateArgs, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fairness_gauge, self.cost_gauge = Gauge(), Gauge()
        self.store = RedisStore(state)
        self.registry = TenantRegistry(self.store, {})
        self.key = self.registry.add("acme", weight=2.0, limits=TenantLimits())
        monkeypatch.setattr(serve_state, "degraded_gauge", lambda *_: self.fairness_gauge)
        self.fairness = FairnessActor(RedisStore(state))
        monkeypatch.setattr(serve_state, "degraded_gauge", lambda *_: self.cost_gauge)
        monkeypatch.setattr(cost_actor, "SAVE_INTERVAL_S", 1.0)  # 10 s is long for a test
        self.costs = CostActor(RedisStore(state))
        self.tenants = LiveTenants(RedisStore(state), {}, num_ingresses=1)
        self.secrets = self.store.load("secrets")
        self.replica, self.num_tokens, self.num_reports = Replica("a"), 0, 0
        self.slowest_s = 0.0
        self.problems: list[BaseException] = []
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._serve, daemon=True),
            threading.Thread(target=lambda: asyncio.run(read_anew(self.tenants, self._stop)), daemon=True),
        ]
        self.fairness.set_weights({"acme": 2.0})
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End, and fail if anything has gone wrong meanwhile."""
        self._stop.set()
        for thread in self._threads:
            thread.join(30)
        self.fairness._state.close()
        self.costs._state.close()
        assert not self.problems, self.problems
        assert self.num_reports > 10

    def is_stored(self, *, since: int) -> bool:
        """Whether Redis holds everything, and of what was served at least so much."""
        try:
            found = {collection: self.store.load(collection) for collection in COLLECTIONS}
        except OSError:
            return False
        if not all(found.values()):
            return False
        (pool,) = found["fairness_pools"].values()
        delivered = json.loads(pool["state"])["ledger"]["delivered"].get("acme", [0, 0, 0, 0])
        snapshot = self.costs.snapshot(tuple(Kind.of(START)))
        return (
            sum(delivered) >= since
            and found["tenants"]["acme"]["revision"] == 0
            and found["fairness_weights"]["all"]["weights"] == {"acme": 2.0}
            and snapshot is not None
            and list(found[KEY].values()) == [json.loads(snapshot)]
            and found["output_lengths"]["all"]["newest"] > 0
            and found["secrets"] == self.secrets
            and self.fairness_gauge.values == self.cost_gauge.values == {"state": 0.0}
        )

    def until_stored(self, what: str) -> None:
        """Wait until Redis holds everything that was served until now."""
        since = self.num_tokens
        back_s = wait_until(lambda: self.is_stored(since=since), 30.0)
        print(f"\n{what}: all stored {back_s:.2f} s later (asked: {BACK_S:g}); slowest answer {self.slowest_s:.3f} s")

    def _serve(self) -> None:
        number = 0
        while not self._stop.wait(0.05):
            number += 1
            began_s = time.monotonic()
            try:
                self._serve_once(number)
            except BaseException as problem:
                self.problems.append(problem)
                return
            self.slowest_s = max(self.slowest_s, time.monotonic() - began_s)

    def _serve_once(self, number: int) -> None:
        tenant = self.tenants.tenant_of(self.key)
        assert tenant is not None, "a known key is refused"
        self.replica.serve(tenant.name, 1)
        self.num_tokens += 1
        told = self.fairness.exchange(msgspec.msgpack.encode(self.replica.message()))
        self.replica.learn(msgspec.msgpack.decode(told, type=FairnessAnswer))
        self.costs.exchange_lengths(report(number, finished(number, tenant=tenant.name)))
        if number % 20 == 1:
            assert self.costs.observe(START.to_json(), msgspec.json.encode(list(samples(TRUTH, 50, seed=number)))) == 50
        self.num_reports += 1


async def read_anew(tenants: LiveTenants, stop: threading.Event) -> None:
    reading = asyncio.create_task(tenants.run())
    while not stop.is_set():
        await asyncio.sleep(0.05)
        assert not reading.done(), reading
    reading.cancel()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with redis_server(tmp_path) as server:
        yield server


@pytest.fixture
def serving(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serving]:
    serving = Serving(server.state(redis_timeout_s=1.5), monkeypatch)
    serving.until_stored("at first")
    serving.slowest_s = 0.0
    yield serving
    serving.stop()


def is_degraded(serving: Serving) -> bool:
    return serving.fairness_gauge.values == {"state": 1.0}


def test_killed_and_started_again_empty(
    serving: Serving, server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.kill()
    wait_until(lambda: is_degraded(serving))
    time.sleep(3.0)
    server.start()
    serving.until_stored("killed, back and empty")
    for name in ("fairness", "cost_service"):
        assert caplog.text.count(f"{name}: its state is not stored") == 1, "said once, not each second"
        assert caplog.text.count(f"{name}: its state is stored again") == 1


@pytest.mark.parametrize("pause_s", [4.0, pytest.param(60.0, marks=pytest.mark.slow)])
def test_paused(serving: Serving, server: RedisServer, pause_s: float) -> None:
    server.pause()
    began_s = time.monotonic()
    wait_until(lambda: is_degraded(serving))
    time.sleep(max(0.0, pause_s - (time.monotonic() - began_s)))
    server.resume()
    serving.until_stored(f"paused for {pause_s:g} s")


def test_emptied(serving: Serving, server: RedisServer) -> None:
    server.client().flushall()
    serving.until_stored("emptied")
    assert not is_degraded(serving)


def test_full(serving: Serving, server: RedisServer) -> None:
    client = server.client()
    client.config_set("maxmemory", 1)
    wait_until(lambda: is_degraded(serving))
    client.config_set("maxmemory", 0)
    serving.until_stored("full")


def test_another_password(serving: Serving, server: RedisServer) -> None:
    client = server.client()
    client.config_set("requirepass", "another")
    client.client_kill_filter(skipme=True, _type="normal")
    wait_until(lambda: is_degraded(serving))
    server.password_file.write_text("another")
    serving.until_stored("another password, and then the right one")
    assert PASSWORD not in (server.folder / "redis.log").read_text()


def test_records_that_are_damaged_or_hold_a_pickle(serving: Serving, server: RedisServer, tmp_path: Path) -> None:
    exploded = tmp_path / "exploded"
    bomb = pickle.dumps(Bomb(exploded))
    client = server.client()
    for collection in COLLECTIONS:
        for number, name in enumerate(client.hkeys(PREFIX + collection)):
            client.hset(PREFIX + collection, name, bomb if number == 0 else b"junk")
    serving.until_stored("damaged")
    assert not exploded.exists()


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return (open, (str(self.path), "w"))


# Starting in an outage


def test_an_ingress_that_starts_in_an_outage_lets_nobody_in_and_knows_all_soon_after_it(server: RedisServer) -> None:
    state = server.state()
    key = TenantRegistry(RedisStore(state), {}).add("acme", weight=1.0, limits=TenantLimits())
    server.pause()
    tenants = LiveTenants(RedisStore(state), {}, num_ingresses=1)
    assert tenants.tenant_of(key) is None
    assert not tenants.may_know_all, "the answer is 503, not 401"
    stop = threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(read_anew(tenants, stop)))
    thread.start()
    server.resume()
    try:
        back_s = wait_until(lambda: tenants.tenant_of(key) is not None)
    finally:
        stop.set()
        thread.join()
    print(f"\nall tenants known after {back_s:.2f} s (asked: {BACK_S:g})")
    assert tenants.may_know_all


def test_actors_that_start_in_an_outage_serve_and_do_not_overwrite_what_is_stored(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(serve_state, "START_WAIT_S", 0.1)
    before = Serving(server.state(), monkeypatch)
    before.until_stored("before")
    before.stop()
    time.sleep(1.0)  # until the last round has ended
    (stored,) = before.store.load(KEY).values()
    num_lengths = before.store.load("output_lengths")["all"]["newest"]
    server.pause()
    fairness, costs = FairnessActor(RedisStore(server.state())), CostActor(RedisStore(server.state()))
    request.addfinalizer(fairness._state.close)
    request.addfinalizer(costs._state.close)
    replica = Replica("a", epoch="another life")
    replica.serve("acme", 5)
    for _ in range(3):
        told = fairness.exchange(msgspec.msgpack.encode(replica.message()))
        replica.learn(msgspec.msgpack.decode(told, type=FairnessAnswer))
    costs.exchange_lengths(report(1, finished(), source="another"))
    server.resume()
    wait_until(lambda: costs.lengths_status()["learned"] == num_lengths + 1)
    assert json.loads(costs.snapshot(tuple(Kind.of(START))) or "") == stored
    wait_until(lambda: before.store.load("output_lengths")["all"]["newest"] == num_lengths + 1)


def tenants_command(config: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cluster", "tenants", *arguments, "--config", str(config)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_an_operators_command_works_on_redis_and_fails_with_one_sentence_while_it_is_away(
    server: RedisServer, tmp_path: Path
) -> None:
    document = yaml.safe_load((ROOT / "manifests" / "serve_local.yaml").read_text())
    settings = server.state().model_dump(exclude_none=True) | {"directory": str(tmp_path / "home")}
    document["applications"][0]["args"]["state"] = settings
    config = tmp_path / "serve.yaml"
    config.write_text(yaml.safe_dump(document))
    made = tenants_command(config, "add", "acme")
    assert made.returncode == 0, made.stderr
    assert "acme" in tenants_command(config, "list").stdout
    assert set(TenantRegistry(RedisStore(server.state()), {}).stored()) == {"acme"}
    server.pause()
    failed = tenants_command(config, "revoke", "acme")
    server.resume()
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.startswith("Error: The Redis at redis://127.0.0.1:")
    assert failed.stderr.count("\n") == 1
    server.password_file.chmod(0o644)
    refused = tenants_command(config, "list")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "run chmod 600 on it" in refused.stderr
    assert PASSWORD not in refused.stderr + failed.stderr
