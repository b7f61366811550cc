"""Goal: every replica that is up gets its share, and none that is down gets anything."""

import pytest

from cluster.routing import LeastLoaded, RoundRobin
from cluster.simulated_engine import SimulatedEngine
from cluster.simulated_request import SimulatedRequest
from cluster.simulated_step import SimulatedSettings
from cluster.simulated_time import LinearTimes


def engine() -> SimulatedEngine:
    return SimulatedEngine(SimulatedSettings(num_blocks=100), LinearTimes(fixed_s=1.0))


def request(num_tokens: int = 16) -> SimulatedRequest:
    return SimulatedRequest("0", tenant="", arrival_s=0.0, prompt_tokens=num_tokens, output_tokens=1)


@pytest.mark.parametrize("num_replicas", [1, 2, 3, 5])
def test_round_robin_serves_all_replicas_in_turn(num_replicas: int) -> None:
    router = RoundRobin()
    for replica in range(num_replicas):
        router.up(replica, engine())
    assert [router.choose(request()) for _ in range(3 * num_replicas)] == 3 * list(range(num_replicas))


def test_round_robin_passes_over_a_replica_that_is_down_and_comes_back_to_it() -> None:
    router = RoundRobin()
    for replica in range(3):
        router.up(replica, engine())
    router.down(2)
    assert [router.choose(request()) for _ in range(4)] == [0, 1, 0, 1]
    router.up(2, engine())
    assert [router.choose(request()) for _ in range(3)] == [2, 0, 1]


@pytest.mark.parametrize("router", [RoundRobin(), LeastLoaded()])
def test_nobody_is_chosen_while_all_are_down(router: RoundRobin | LeastLoaded) -> None:
    router.up(0, engine())
    router.down(0)
    assert router.choose(request()) is None


def test_the_least_loaded_counts_what_waits_there() -> None:
    router = LeastLoaded()
    engines = [engine(), engine()]
    for number, one in enumerate(engines):
        router.up(number, one)
    chosen = []
    for num_tokens in (160, 32, 32, 160):
        replica = router.choose(request())
        assert replica is not None
        engines[replica].add(request(num_tokens), 0.0)
        router.changed(replica)
        chosen.append(replica)
    assert chosen == [0, 1, 1, 1]
