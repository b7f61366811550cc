"""Goal: the stated bound holds at every event of every experiment, and the same checker reports policies that are not fair.

Method: a token-level cluster (`token_server.py`) runs the product's counters, ledger, queue and bypass through VTC's suites
and the cross-replica ones. The checker sees nothing but service and who waits. Times are scaled down: a replica serves
about 4 requests of 128 + 128 tokens a second; rates are in that unit. `-s` prints the table.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from global_scheduler.max_min import max_min_levels
from tests.token_requests import Request, arrivals
from tests.token_server import STEP_S, Cluster, Scheduling

UNIT_PER_S = 4.0
"""Requests that a replica serves in a second."""

END_S = 60.0

WARM_S = 25.0
"""Shares are counted from here on: all who ask for more than their share wait, and nobody has anything to catch up."""

SLOW = pytest.mark.slow

TABLE: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    """Print what was measured when all is done."""
    yield
    print(f"\n{'experiment':34}{'policy':12}{'gap':>9}{'bound':>9}{'ratio':>7}{'stray':>7}  shares")
    print("\n".join(TABLE))


def run(
    name: str, requests: list[Request], *, scheduling: Scheduling = Scheduling.GLOBAL, until_s: float = END_S,
    events: dict[float, Callable[[Cluster], None]] | None = None, **settings: object,
) -> Cluster:  # fmt: skip
    cluster = Cluster(scheduling, **settings)  # type: ignore[arg-type]
    warm = {WARM_S: Cluster.count_from_here}
    cluster.run([replace(request) for request in requests], until_s, warm | (events or {}))
    cluster.checker.gap()
    worst = cluster.checker.worst
    shares = " ".join(f"{tenant} {share:.3f}" for tenant, share in list(cluster.shares().items())[:4])
    figures = f"{worst.gap:9.0f}{worst.bound:9.0f}{worst.ratio:7.3f}{worst.stray:7.3f}"
    TABLE.append(f"{name:34}{scheduling.name.lower():12}{figures}  {shares}")
    assert not any(engine.num_idle_offences for engine in cluster.engines.values()), "work was not conserved"
    return cluster


def hold(cluster: Cluster) -> None:
    """What holds after every run under the cluster's counters."""
    assert not cluster.checker.broken, cluster.checker.worst
    cluster.share.check()
    for engine in cluster.engines.values():
        engine.service.check()
        engine.queue.check()
        cluster.share.take(engine.report(everything=True))
    for tenant, raw in cluster.raw.items():
        delivered = cluster.share.ledger.delivered(tenant)
        assert all(a <= b for a, b in zip(delivered, raw, strict=True)), "the ledger holds more than was delivered"


def conserved(cluster: Cluster) -> None:
    hold(cluster)
    assert {tenant: cluster.share.ledger.delivered(tenant) for tenant in cluster.raw} == cluster.raw


def strayed(cluster: Cluster) -> float:
    """Service at weight 1 by which a tenant's lead has ranged at most."""
    return cluster.checker.worst.stray * cluster.checker.bound.unit


def load(tenant: str, units: float, until_s: float = END_S, **options: object) -> list[Request]:
    return arrivals(tenant, units * UNIT_PER_S, until_s, **options)  # type: ignore[arg-type]


# VTC's suites on two replicas; rates of the paper / its capacity (1.74 requests a second), times 2 replicas


def rate(per_s: float) -> float:
    return 2.0 * per_s / 1.74


SHORT = {"num_prompt": 32, "num_output": 32}
SUITES: dict[str, list[Request]] = {
    "overload": load("f", rate(1.5)) + load("g", rate(3.0)),
    "overload-multi": [each for n in range(8) for each in load(f"t{n}", rate(0.4 if n < 3 else 0.6))],
    "proportional": load("f", rate(0.25)) + load("g", rate(0.5)) + load("h", rate(1.5)),
    "on_off_less": load("f", rate(0.5), on_off_s=10.0) + load("g", rate(2.0)),
    "on_off_overload": load("f", rate(2.0), on_off_s=10.0) + load("g", rate(3.0)),
    "poisson_on_off_overload": load("f", rate(0.5), on_off_s=10.0, seed=1) + load("g", rate(2.0), seed=2),
    "poisson_short_long": load("f", rate(8.0), seed=1, **SHORT) + load("g", rate(1.5), seed=2),
    "poisson_short_long_2": load("f", rate(8.0), seed=1, num_prompt=256, num_output=16)
    + load("g", rate(1.5), seed=2, num_prompt=16, num_output=256),
    "increase": load("f", rate(0.5)) + [each for n in range(5) for each in load("g", rate(0.4), begin_s=12.0 * n)],
    "dist_shift": load("f", rate(0.5), 20.0, on_off_s=4.0) + load("g", rate(2.0), 20.0)
    + load("f", rate(1.0), 40.0, begin_s=20.0) + load("g", rate(1.0), 40.0, begin_s=20.0)
    + load("f", rate(0.5), begin_s=40.0) + load("g", rate(1.5), begin_s=40.0),
}  # fmt: skip


QUICK = {"overload", "on_off_overload", "poisson_short_long_2", "dist_shift"}


@pytest.mark.parametrize("suite", [pytest.param(name, marks=() if name in QUICK else SLOW) for name in SUITES])
def test_the_bound_holds_in_every_suite(suite: str) -> None:
    conserved(run(suite, SUITES[suite], num_replicas=2))


def test_first_come_breaks_the_bound_under_overload_and_the_checker_says_so() -> None:
    stock = run("overload", SUITES["overload"], num_replicas=2, scheduling=Scheduling.FIRST_COME)
    assert stock.checker.broken
    assert stock.ratio("g", "f") == pytest.approx(2.0, rel=0.05)


def test_shares_are_those_of_the_weights_within_two_percent_and_nothing_is_lost() -> None:
    weights = {"t1": 1.0, "t2": 2.0, "t3": 3.0, "t4": 4.0}
    requests = [each for tenant in weights for each in load(tenant, 2.0)]
    fair = run("overload-weighted", requests, num_replicas=2, weights=weights)
    stock = run("overload-weighted", requests, num_replicas=2, weights=weights, scheduling=Scheduling.FIRST_COME)
    conserved(fair)
    assert stock.checker.broken
    for tenant, weight in weights.items():
        assert fair.shares()[tenant] == pytest.approx(weight / 10.0, rel=0.02)
    assert sum(fair.served.values()) >= 0.98 * sum(stock.served.values())


# Across replicas


def least_loaded(cluster: Cluster, tenant: str, among: list[int]) -> int:
    def num_requests(number: int) -> int:
        return sum(each.tenant == tenant for each in cluster.engines[number].requests.values())

    return min(among, key=lambda number: (num_requests(number), number))


def pinned(cluster: Cluster, request: Request) -> int:
    """g has sessions on half of the replicas."""
    numbers = sorted(cluster.engines)
    return least_loaded(cluster, request.tenant, numbers[: len(numbers) // 2] if request.tenant == "g" else numbers)


def opposite_skew(cluster: Cluster, request: Request) -> int:
    """Two ingresses: f's sends four of five requests to replica 0, g's to replica 1."""
    number = int(request.name.rsplit("-", 1)[1])
    return int((number % 5 == 0) == (request.tenant == "f"))


FLOOD = load("f", 10.0) + load("g", 5.0)
LONG = load("f", 2.0, 90.0, num_prompt=32, num_output=400) + load("g", 8.0, 90.0, num_prompt=32, num_output=32)


def test_balanced_replicas_are_fair() -> None:
    cluster = run("balanced, 4 replicas", FLOOD, num_replicas=4)
    conserved(cluster)
    assert cluster.ratio("f", "g") == pytest.approx(1.0, abs=0.02)


def test_a_pinned_tenant_has_its_share_with_the_clusters_counters_alone() -> None:
    fair = run("pinned to 2 of 4", FLOOD, num_replicas=4, place=pinned)
    local = run("pinned to 2 of 4", FLOOD, num_replicas=4, place=pinned, scheduling=Scheduling.LOCAL)
    stock = run("pinned to 2 of 4", FLOOD, num_replicas=4, place=pinned, scheduling=Scheduling.FIRST_COME)
    conserved(fair)
    assert fair.shares()["f"] == pytest.approx(0.5, abs=0.02), (
        "batches of equal requests come in waves within the bound"
    )
    assert local.ratio("f", "g") == pytest.approx(3.0, abs=0.15)
    assert local.checker.broken
    assert stock.checker.broken
    assert sum(fair.served.values()) >= 0.98 * sum(stock.served.values())


def test_two_ingresses_with_opposite_skew_keep_the_weights() -> None:
    weights = {"f": 4.0, "g": 1.0}
    requests = load("f", 8.0) + load("g", 8.0)
    options = {"num_replicas": 2, "weights": weights, "place": opposite_skew}
    conserved(fair := run("two ingresses, 4:1", requests, **options))
    assert fair.ratio("f", "g") == pytest.approx(4.0, rel=0.02)
    stock = run("two ingresses, 4:1", requests, scheduling=Scheduling.FIRST_COME, **options)
    assert stock.checker.broken
    assert stock.ratio("f", "g") < 2.0


def test_under_opposite_skew_counters_of_each_replica_alone_favour_whoever_waits_at_both() -> None:
    """g's few requests at replica 0 are served at once; its share has to come from replica 1. Where both wait at both
    replicas, as above, each replica's own counters would do.
    """
    requests = load("f", 8.0, 120.0) + load("g", 1.4, 120.0)
    options = {"num_replicas": 2, "place": opposite_skew, "until_s": 120.0}
    fair = run("two ingresses, g waits at one", requests, **options)
    local = run("two ingresses, g waits at one", requests, scheduling=Scheduling.LOCAL, **options)
    conserved(fair)
    assert fair.shares()["g"] == pytest.approx(0.5, abs=0.03)
    assert local.shares()["g"] < 0.45
    assert local.checker.broken


def test_a_tenant_that_reaches_one_replica_has_its_max_min_share_and_the_others_share_the_rest() -> None:
    """g has replica 0 to itself, f and h share the others 1 : 1; compared within levels the bound holds."""
    reach = {"f": frozenset("0123"), "g": frozenset("0"), "h": frozenset("0123")}
    levels = max_min_levels(dict.fromkeys(reach, 1.0), reach, dict.fromkeys("0123", 1.0))
    groups = {name: f"level {number}" for number, level in enumerate(levels) for name in level.tenants}
    assert len(set(groups.values())) == 2

    def reachable(cluster: Cluster, request: Request) -> int:
        return least_loaded(cluster, request.tenant, sorted(map(int, reach[request.tenant])))

    requests = load("f", 6.0) + load("g", 3.0) + load("h", 9.0)
    options = {"num_replicas": 4, "place": reachable}
    fair = run("pinned to 1 of 4, by level", requests, groups=groups, **options)
    stock = run("pinned to 1 of 4, by level", requests, groups=groups, scheduling=Scheduling.FIRST_COME, **options)
    conserved(fair)
    expected = {name: level.rate / 4.0 for level in levels for name in level.tenants}
    assert fair.shares() == pytest.approx(expected, abs=0.02)
    assert stock.checker.broken


def test_with_predicted_outputs_the_bound_holds_and_what_is_left_of_predictions_is_given_back() -> None:
    """What is charged is equalised, not what is served: with unequal lengths the gap may grow by what is reserved."""
    steady = {"until_s": 90.0, "events": {WARM_S: Cluster.watch_from_here}}
    plain = run("overload, outputs 32 to 400", LONG, **steady)
    told = run("the same, outputs predicted", LONG, predicts=True, **steady)
    for cluster in (plain, told):
        conserved(cluster)
        assert cluster.shares()["f"] == pytest.approx(0.5, abs=0.01)


def test_reports_and_answers_that_are_lost_change_nothing_in_the_end() -> None:
    cluster = run("pinned, 3 of 10 lost each way", FLOOD, num_replicas=4, place=pinned, loses=0.3)
    conserved(cluster)
    assert cluster.shares()["f"] == pytest.approx(0.5, abs=0.02)


def test_refills_break_the_bound_of_pool_tokens_and_not_that_of_the_worst_case() -> None:
    """f's requests grow into what its own victims give up, while no prompt of g's fits."""
    requests = load("f", 10.0, num_prompt=1, num_output=1000) + load(
        "g", 1.0, num_prompt=1900, num_output=16, begin_s=0.5
    )
    cluster = run("long outputs, long prompts", requests, num_pool_tokens=2000, max_prompt=1900, worst_case=True)
    conserved(cluster)
    stated = cluster.bound(1)
    assert strayed(cluster) > 1.5 * stated.unit


def test_prompts_alone_need_the_staleness_of_engines_that_queue_by_themselves() -> None:
    """Between reports every replica admits the same tenant's prompts: decode tokens do not bound what is not known."""
    short = {"num_prompt": 256, "num_output": 4}
    requests = load("f", 50.0, **short) + load("g", 25.0, **short)
    cluster = run("prompts alone, sync 10 s", requests, num_replicas=4, place=pinned, sync_s=10.0)
    conserved(cluster)
    bound = cluster.bound(4)
    central = bound.memory_service + bound.decode_stale_service
    assert strayed(cluster) > central


def test_a_tenant_with_short_prompts_does_not_pass_every_head_of_one_with_long_prompts() -> None:
    requests = load("f", 5.0, num_prompt=1, num_output=100) + load(
        "g", 0.5, num_prompt=4800, num_output=16, begin_s=0.5
    )
    limited = run("heads that do not fit", requests, max_prompt=4800)
    free = run("the same, who is ahead may pass", requests, max_prompt=4800, bypass_service=1e6)
    conserved(limited)
    assert 3.0 * strayed(limited) < strayed(free)


@pytest.mark.parametrize(
    "sync_s", [pytest.param(0.05, marks=SLOW), pytest.param(0.5, marks=SLOW), 2.0, pytest.param(5.0, marks=SLOW), 20.0]
)
def test_the_bound_holds_at_every_interval(sync_s: float) -> None:
    conserved(run(f"pinned, sync {sync_s} s", FLOOD, num_replicas=4, place=pinned, sync_s=sync_s))


@pytest.mark.parametrize("store_s", [1.0, None], ids=["stored", "nothing stored"])
def test_a_scheduler_that_is_away_for_two_seconds_is_back_without_a_double_count(store_s: float | None) -> None:
    events = {15.0: Cluster.kill_scheduler, 17.0: Cluster.revive_scheduler}
    name = "scheduler away 2 s, " + ("stored" if store_s else "not stored")
    cluster = run(name, FLOOD, num_replicas=4, place=pinned, store_s=store_s, events=events)
    hold(cluster)
    assert cluster.shares()["f"] == pytest.approx(0.5, abs=0.02)
    if store_s is not None:
        conserved(cluster)


def test_a_scheduler_that_is_killed_at_every_second_keeps_bound_shares_and_every_token() -> None:
    def kill(cluster: Cluster) -> None:
        cluster.kill_scheduler()
        cluster.revive_scheduler()

    chance = random.Random(3)
    events = {number + chance.random(): kill for number in range(5, 55)}
    cluster = run("scheduler killed 50 times", FLOOD, num_replicas=4, place=pinned, loses=0.1, events=events)
    conserved(cluster)
    assert cluster.shares()["f"] == pytest.approx(0.5, abs=0.02)


def test_a_replica_that_dies_takes_one_interval_of_accounting_with_it() -> None:
    cluster = run("replica killed", FLOOD, num_replicas=4, events={15.0: lambda each: each.stop(3)})
    hold(cluster)
    lost = sum(sum(raw[:3]) for raw in cluster.raw.values()) - sum(
        sum(cluster.share.ledger.delivered(tenant)[:3]) for tenant in cluster.raw
    )
    assert 0 <= lost <= (256 + 32) / STEP_S * cluster.sync_s + 256 + 32, lost


def test_replicas_come_and_go() -> None:
    def grow(cluster: Cluster) -> None:
        cluster.start(2)
        cluster.start(3)

    def shrink(cluster: Cluster) -> None:
        cluster.stop(3)
        cluster.stop(2)

    cluster = run("2 -> 4 -> 2", FLOOD, num_replicas=2, num_bound_replicas=4, events={13.0: grow, 27.0: shrink})
    hold(cluster)
    assert cluster.ratio("f", "g") == pytest.approx(1.0, abs=0.02)


def test_who_used_little_while_nobody_waited_takes_nothing_from_others_when_both_flood() -> None:
    """Whichever of the two is reported first."""
    for heavy, light in (("f", "g"), ("g", "f")):
        quiet = load(heavy, 1.0, 30.0) + load(light, 0.2, 30.0)
        flood = load("f", 6.0, begin_s=30.0) + load("g", 6.0, begin_s=30.0)
        cluster = run(f"quiet, then both flood, {heavy} heavy", quiet + flood, num_replicas=2)
        conserved(cluster)
        assert strayed(cluster) < 0.2 * cluster.checker.bound.unit


def test_a_light_tenant_that_floods_at_last_has_saved_nothing_up() -> None:
    requests = load("f", 6.0) + load("g", 0.3, 30.0) + load("g", 6.0, begin_s=30.0)
    conserved(run("light, then floods", requests, num_replicas=2))


def test_splitting_into_twenty_users_gains_nothing() -> None:
    g = load("g", 3.0)
    one = run("f as 1 user", load("f", 3.0) + g)
    twenty = run("f as 20 users", load("f", 3.0, num_users=20) + g)
    for cluster in (one, twenty):
        conserved(cluster)
    assert twenty.shares()["f"] <= 1.02 * one.shares()["f"]


def test_a_light_tenant_hardly_notices_a_flood() -> None:
    def turnaround(cluster: Cluster, tenant: str) -> float:
        """Mean of (finish - arrival) / service time alone."""
        done = [each for each in cluster.finished if each.tenant == tenant]
        assert len(done) >= 5
        return sum((each.finish_s - each.arrival_s) / (STEP_S * each.num_output) for each in done) / len(done)

    light = load("light", 0.1)
    flood = load("f", 5.0)
    alone = run("light alone", light, num_replicas=2)
    fair = run("light beside a flood", light + flood, num_replicas=2)
    stock = run("light beside a flood", light + flood, num_replicas=2, scheduling=Scheduling.FIRST_COME)
    conserved(fair)
    figures = {
        name: round(turnaround(each, "light"), 2) for name, each in (("alone", alone), ("fair", fair), ("stock", stock))
    }
    TABLE.append(f"  light tenant's mean weighted turnaround: {figures}")
    assert turnaround(fair, "light") <= 1.2 * turnaround(alone, "light")
    assert turnaround(fair, "light") <= turnaround(stock, "light") / 3.0
