"""Goal: every replica that is up gets its share, and none that is down gets anything."""

import pytest

from cluster.routing import LeastLoaded, Placed, RoundRobin, Router
from cluster.simulated_blocks import PrefixPart
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
        router.up(replica, engine(), 0.0)
    assert [router.choose(request(), 0.0) for _ in range(3 * num_replicas)] == 3 * list(range(num_replicas))


def test_round_robin_passes_over_a_replica_that_is_down_and_comes_back_to_it() -> None:
    router = RoundRobin()
    for replica in range(3):
        router.up(replica, engine(), 0.0)
    router.down(2)
    assert [router.choose(request(), 0.0) for _ in range(4)] == [0, 1, 0, 1]
    router.up(2, engine(), 0.0)
    assert [router.choose(request(), 0.0) for _ in range(3)] == [2, 0, 1]


@pytest.mark.parametrize("router", [RoundRobin(), LeastLoaded(), Placed()])
def test_nobody_is_chosen_while_all_are_down(router: Router) -> None:
    router.up(0, engine(), 0.0)
    router.down(0)
    assert router.choose(request(), 0.0) is None


def test_the_least_loaded_counts_what_waits_there() -> None:
    router = LeastLoaded()
    engines = [engine(), engine()]
    for number, one in enumerate(engines):
        router.up(number, one, 0.0)
    chosen = []
    for num_tokens in (160, 32, 32, 160):
        replica = router.choose(request(), 0.0)
        assert replica is not None
        engines[replica].add(request(num_tokens), 0.0)
        router.changed(replica, 0.0)
        chosen.append(replica)
    assert chosen == [0, 1, 1, 1]


def placed(num_replicas: int) -> tuple[Placed, list[SimulatedEngine]]:
    router, engines = Placed(), [engine() for _ in range(num_replicas)]
    for number, one in enumerate(engines):
        router.up(number, one, 0.0)
        router.changed(number, 0.0)
    return router, engines


def asked(number: int, num_tokens: int = 16, *, prefix: tuple[PrefixPart, ...] = ()) -> SimulatedRequest:
    return SimulatedRequest(
        str(number), tenant="t", arrival_s=0.0, prompt_tokens=num_tokens, output_tokens=1, prefix=prefix
    )


def test_placement_sees_replicas_as_they_were_at_their_last_report_and_what_was_sent_since() -> None:
    router, engines = placed(2)
    assert router.choose(asked(0), 0.6) == 0
    engines[1].add(asked(1, 800), 0.7)
    router.changed(1, 0.7)
    assert router.choose(asked(2), 0.9) == 1, "it has not reported yet what waits there"
    assert router.choose(asked(3), 0.95) == 0
    assert router.choose(asked(4), 1.1) == 0, "it has"
    router.placement.check()


def test_placement_forgets_what_a_crashed_replica_had() -> None:
    router, _ = placed(2)
    assert router.choose(asked(0, 160), 0.6) == 0
    router.down(0)
    assert router.choose(asked(1), 0.6) == 1
    router.up(0, engine(), 0.7)
    assert router.choose(asked(0, 160), 0.7) == 0
    router.placement.check()


def test_placement_keeps_prompts_with_the_same_beginning_together() -> None:
    router, _ = placed(3)
    parts = {key: (PrefixPart(key, 4), PrefixPart(key + 1, 4)) for key in (10, 20)}
    homes = {key: router.choose(asked(key, 160, prefix=parts[key]), 0.6) for key in parts}
    assert homes == {10: 0, 20: 1}
    for number in range(4):
        for key in (10, 20):
            router.ended(asked(key if number == 0 else number * 100 + key))
        for key in (10, 20):
            assert router.choose(asked((number + 1) * 100 + key, 160, prefix=parts[key]), 0.6) == homes[key]
