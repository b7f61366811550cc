"""Goal: tenants go to their replicas in their parts, and to any that is up when theirs are down."""

from collections import Counter
from typing import Any

import pytest

from cluster.routing import RoundRobin
from cluster.simulated_request import SimulatedRequest
from cluster.tenant_routing import TenantRouter, parse_pin


def router_of(places: dict[str, dict[int, float]], num: int = 4) -> TenantRouter:
    router = TenantRouter(RoundRobin(), places)
    engine: Any = None
    for number in range(num):
        router.up(number, engine, 0.0)
    return router


def sent(router: TenantRouter, tenant: str, num: int) -> list[int | None]:
    request = SimulatedRequest("1", tenant=tenant, arrival_s=0.0, prompt_tokens=1, output_tokens=1)
    return [router.choose(request, 0.0) for _ in range(num)]


def test_a_tenants_requests_go_to_its_replicas_in_their_parts_and_evenly_in_time() -> None:
    router = router_of({"a": {0: 4.0, 1: 1.0}})
    numbers = sent(router, "a", 50)
    assert Counter(numbers) == {0: 40, 1: 10}
    assert all(Counter(numbers[first : first + 5]) == {0: 4, 1: 1} for first in range(0, 50, 5))
    assert Counter(sent(router, "b", 8)) == dict.fromkeys(range(4), 2)


def test_others_stand_in_while_none_of_its_replicas_is_up() -> None:
    router = router_of({"a": {0: 1.0, 1: 1.0}}, num=3)
    router.down(0)
    assert sent(router, "a", 3) == [1, 1, 1]
    router.down(1)
    assert sent(router, "a", 3) == [2, 2, 2]
    router.down(2)
    assert sent(router, "a", 1) == [None]
    router.up(0, None, 0.0)  # type: ignore[arg-type]
    assert sent(router, "a", 2) == [0, 0]


def test_pins_are_read_and_wrong_ones_refused() -> None:
    assert parse_pin("a=0,1") == ("a", {0: 1.0, 1: 1.0})
    assert parse_pin("x=y=2:4,3:0.5") == ("x=y", {2: 4.0, 3: 0.5})
    for text in ("a", "a=", "a=b", "a=0:0", "a=-1", "a=0:nan", "a=0:1:2", "a=1.5"):
        with pytest.raises(ValueError, match="--pin must be TENANT=REPLICA"):
            parse_pin(text)
