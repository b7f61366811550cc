"""Goal: simulated replicas and the fairness scheduler tell each other the truth, whatever is late, lost or away.

Method: small engines with the product's queues and `FairShare`; the watch beside them counts what was given by itself.
"""

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.disturbances import Disturbances
from cluster.fairness_watch import FairnessWatch
from cluster.routing import LeastLoaded, RoundRobin
from cluster.simulated_cluster import SimulatedCluster
from cluster.simulated_replica import FIRST_COME, LOCAL, ReplicaKind
from cluster.simulated_share import ShareSettings, SimulatedShare
from cluster.simulation import Simulation
from cost_service.traces import TraceRequest
from tests.test_cluster_simulation import BLOCK_BYTES, ENGINE, REQUESTS, STALLING, TIMES

FAIR = "fair"
KIND = ReplicaKind(
    settings=ENGINE, times=TIMES, costs=STALLING, block_bytes=BLOCK_BYTES, policy="adaptive", admission=FAIR,
    host_bytes=60 * BLOCK_BYTES,
)  # fmt: skip


def loads(seconds: float = 5.0, **rates: float) -> list[TraceRequest]:
    """Requests of 20 + 20 tokens by tenant, in a steady beat."""
    requests = [
        TraceRequest(arrival_s=number / rate, tenant=tenant, prompt_tokens=20, output_tokens=20)
        for tenant, rate in rates.items()
        for number in range(int(rate * seconds))
    ]
    return sorted(requests, key=lambda one: (one.arrival_s, one.tenant))


def run(
    requests: list[TraceRequest], *, kind: ReplicaKind = KIND, until_s: float = math.inf, check: bool = False,
    **options: Any,
) -> tuple[Simulation, FairnessWatch, list[Any]]:  # fmt: skip
    cluster = SimulatedCluster(**{"num_replicas": 2, "router": RoundRobin} | options)
    watch = cluster.watch(kind, requests, shares_from_s=1.0)
    records: list[Any] = []
    simulation = cluster.simulation(
        kind, done=records.append, watch=watch, credit=cluster.bound(kind, requests).credit, check=check
    )
    simulation.run(requests, until_s=until_s)
    here = Counter(request.tenant for replica in simulation.replicas for request in replica.requests)
    watch.check({one.tenant: here[one.tenant] for one in requests})
    return simulation, watch, records


def scheduler_of(simulation: Simulation) -> SimulatedShare:
    exchange = simulation._exchange
    assert isinstance(exchange, SimulatedShare)
    return exchange


def hear_all(simulation: Simulation) -> SimulatedShare:
    """Let every replica that is up report once more, and be heard."""
    scheduler = scheduler_of(simulation)
    for replica in simulation.replicas:
        if replica.up:
            for _ in range(2):  # a scheduler of a new life asks for everything first
                answer = scheduler.read(scheduler.report(replica, math.inf), math.inf)
                scheduler.learn(replica, answer)
    scheduler.check()
    return scheduler


FLOOD = loads(f=20.0, g=10.0)
PINS = {"f": dict.fromkeys(range(4), 1.0), "g": dict.fromkeys(range(2), 1.0)}


def test_a_tenant_on_half_of_the_replicas_has_its_share_with_the_clusters_counters_alone() -> None:
    options = {"num_replicas": 4, "pins": PINS, "until_s": 5.0}
    flood = loads(f=60.0, g=30.0)
    fair, local, first = (
        run(flood, kind=replace(KIND, admission=admission), **options)[1].figures(5.0)
        for admission in (FAIR, LOCAL, FIRST_COME)
    )
    assert fair.shares["f"] == pytest.approx(0.5, abs=0.02)
    assert local.shares["f"] == pytest.approx(0.75, abs=0.05)
    assert not fair.broken
    assert local.broken
    assert first.broken
    assert fair.service_per_s >= 0.98 * first.service_per_s


@pytest.mark.parametrize(
    ("share", "disturbances"),
    [
        (ShareSettings(), Disturbances()),
        (ShareSettings(interval_s=0.5), Disturbances(report_loss=0.3, report_delay_s=0.2)),
        (ShareSettings(away=(1.0, 2.0)), Disturbances()),
    ],
    ids=["on time", "late and lost", "away for a while"],
)
def test_the_ledger_holds_what_was_given_to_the_token(share: ShareSettings, disturbances: Disturbances) -> None:
    simulation, watch, records = run(FLOOD, share=share, disturbances=disturbances)
    scheduler = hear_all(simulation)
    assert len(records) == len(FLOOD)
    for tenant, served in watch.given.items():
        delivered = scheduler.share.ledger.delivered(tenant)
        assert delivered[:3] == served[:3], f"{tenant} was given {served}"
        assert served.num_output_tokens == sum(one.delivered_tokens for one in records if one.tenant == tenant)


def test_a_scheduler_that_never_comes_leaves_replicas_with_their_own_counters() -> None:
    away = run(FLOOD, share=ShareSettings(away=(0.0, 1e9)))[2]
    local = run(FLOOD, kind=replace(KIND, admission=LOCAL))[2]
    assert away == local
    assert away != run(FLOOD)[2]


def test_a_scheduler_that_has_lost_all_is_told_the_counters_and_goes_on() -> None:
    forgets = ShareSettings(away=(2.5, 2.75), store_interval_s=None)
    flood = loads(f=60.0, g=30.0)
    simulation, watch, _ = run(flood, num_replicas=4, pins=PINS, share=forgets, until_s=5.0)
    scheduler = hear_all(simulation)
    assert scheduler.life == 1
    assert not watch.checker.broken
    # g's replicas are two of four: what f took there meanwhile cannot be made up for, and that is all
    assert watch.figures(5.0).shares["f"] == pytest.approx(0.5, abs=0.05)
    for tenant, served in watch.given.items():
        assert sum(scheduler.share.ledger.delivered(tenant)[:3]) <= sum(served[:3]), "more than was given"


def test_replicas_come_and_go_and_everybody_is_served() -> None:
    disturbances = Disturbances(scale=[(1.0, 4), (3.0, 1), (5.0, 2)], crashes=[(1.5, 3), (6.0, 0)], restart_s=0.5)
    simulation, watch, records = run(FLOOD, router=LeastLoaded, disturbances=disturbances, check=True)
    scheduler = hear_all(simulation)
    assert len(records) == len(FLOOD)
    assert all(one.delivered_tokens == one.output_tokens for one in records)
    assert [replica.up for replica in simulation.replicas] == [True, True, False, False]
    assert scheduler.share.ledger.replicas == {"replica-0", "replica-1"}
    assert simulation.counts.crashes == 2
    assert not watch.checker.broken


@settings(max_examples=25, deadline=None)
@given(
    requests=REQUESTS, policy=st.sampled_from(["stock", "swap", "adaptive"]), crashes=st.booleans(),
    resubmit=st.booleans(), loss=st.sampled_from([0.0, 0.5]), stored=st.booleans(), seed=st.integers(0, 100),
    scale=st.lists(st.tuples(st.floats(0.0, 4.0), st.integers(1, 4)), max_size=3),
)  # fmt: skip
def test_nothing_is_lost_and_nothing_is_counted_twice_whatever_happens(
    requests: list[TraceRequest], policy: str, crashes: bool, resubmit: bool, loss: float, stored: bool, seed: int,
    scale: list[tuple[float, int]],
) -> None:  # fmt: skip
    requests.sort(key=lambda one: one.arrival_s)
    disturbances = Disturbances(
        seed=seed, crash_interval_s=2.0 if crashes else math.inf, restart_s=0.5, resubmit=resubmit, leave_share=0.3,
        patience_s=0.5, report_loss=loss, report_delay_s=0.1, scale=scale,
    )  # fmt: skip
    share = ShareSettings(away=(1.0, 1.5), store_interval_s=0.2 if stored else None)
    simulation, watch, records = run(
        requests, kind=replace(KIND, policy=policy), router=LeastLoaded, share=share, disturbances=disturbances,
        num_users={"a": 3}, check=True,
    )  # fmt: skip
    scheduler = hear_all(simulation)
    assert len(records) == len(requests)
    assert scheduler.share.ledger.replicas == {f"replica-{each.number}" for each in simulation.replicas if each.up}
    for tenant, served in watch.given.items():
        delivered = scheduler.share.ledger.delivered(tenant)
        assert all(a <= b for a, b in zip(delivered[:3], served[:3], strict=True)), f"{delivered} of {served}"
