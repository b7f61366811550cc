"""Goal: the watch counts what engines give and who waits, by itself, and the bound is that of the replicas it is told of."""

from collections import Counter

import pytest

from cluster.fairness_watch import FairnessWatch, bound_of
from cluster.simulated_request import SimulatedRequest
from cluster.simulated_step import SimulatedSettings
from cluster.simulated_time import LinearTimes
from cost_service.charges import Served

SETTINGS = SimulatedSettings(num_blocks=101, block_size=16, max_num_seqs=8, max_num_batched_tokens=64)
TIMES = LinearTimes(fixed_s=0.1)
BOUND = bound_of(SETTINGS, TIMES, num_replicas=2, lengths={(10, 20), (30, 5)}, interval_s=0.1, round_trip_s=0.0)


def request(name: str, tenant: str) -> SimulatedRequest:
    return SimulatedRequest(name, tenant=tenant, arrival_s=0.0, prompt_tokens=10, output_tokens=20)


def test_the_bound_has_the_pools_tokens_and_the_fastest_steps() -> None:
    assert BOUND.num_memory_tokens == 2 * 1600
    assert BOUND.prompt_service == 30.0
    # 0.1 s a step, whatever is in it: at best 6 prompts of 10 tokens with their first output, and 2 decodes
    fastest = 2 * (6 * (10 + 2) + 2 * 2) / 0.1
    assert BOUND.stale_service <= 0.2 * fastest
    assert BOUND.stale_service >= 0.2 * 0.8 * fastest


def test_service_and_waiting_are_counted_once_whatever_happens_to_a_request() -> None:
    watch = FairnessWatch(BOUND, weights={"a": 1.0, "b": 2.0})
    one, two, other = request("1", "a"), request("2", "a"), request("3", "b")
    for each in (one, two, other):
        watch.arrived(each.tenant)
    one.num_computed = 4  # of its prompt, from the prefix cache
    watch.stepped(0, [one, other], [], 0.1)
    assert watch.given == {"a": Served(6, 4), "b": Served(10)}
    watch.check({"a": 2, "b": 1})

    one.num_output, one.num_computed = 3, 12
    watch.stepped(0, [other], [], 0.2)  # it has given way
    one.num_computed = 0
    watch.stepped(0, [other, one], [], 0.3)  # and is computed again, which is nobody's
    assert watch.given["a"] == Served(6, 4, 3)

    one.num_output = 20
    watch.stepped(0, [other], [one], 0.4)
    assert watch.given["a"] == Served(6, 4, 20)
    watch.check({"a": 1, "b": 1})

    watch.crashed(0, [other])
    watch.stepped(1, [other], [], 0.5)  # sent again: its prompt is served again
    assert watch.given["b"] == Served(20)
    watch.gone(two)
    watch.check({"a": 0, "b": 1})


def test_a_lead_beyond_the_bound_is_found_while_both_wait_and_only_then() -> None:
    for waits in (True, False):
        watch = FairnessWatch(BOUND, weights={"a": 1.0, "b": 1.0})
        served = [request(str(number), "a") for number in range(200)]
        for each in served:
            watch.arrived(each.tenant)
        if waits:
            watch.arrived("b")
        for number, each in enumerate(served):
            watch.stepped(0, [each], served[max(0, number - 1) : number], 0.1 * number)
            each.num_output = 20
        figures = watch.figures(20.0)
        assert figures.broken == waits
        assert (figures.worst_stray > 1.0) == waits
        assert figures.shares == ({"a": 1.0, "b": 0.0} if waits else {})


def test_shares_count_from_their_time_on_and_while_all_wait() -> None:
    watch = FairnessWatch(BOUND, weights={"a": 1.0, "b": 1.0}, shares_from_s=1.0)
    requests = {tenant: [request(f"{tenant}{number}", tenant) for number in range(9)] for tenant in "ab"}
    for tenant, count in Counter(a=9, b=9).items():
        for _ in range(count):
            watch.arrived(tenant)
    watch.stepped(0, requests["a"][:3], [], 0.5)
    watch.stepped(0, requests["a"][3:4], requests["a"][:3], 1.5)
    watch.stepped(1, requests["b"][:3], [], 1.5)
    assert watch.figures(2.0).shares == pytest.approx({"a": 0.25, "b": 0.75})
