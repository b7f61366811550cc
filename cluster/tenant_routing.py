"""A router that keeps tenants to replicas: sessions, prefixes and ingresses with an affinity do that.

Rules:
- A tenant's requests go to its replicas in turns, in proportion to the numbers beside them (smooth weighted round robin).
- A tenant without any goes where another router says.
- When none of a tenant's replicas is up, all that are stand in for them.
"""

from collections.abc import Mapping

from cluster.routing import Router
from cluster.simulated_engine import SimulatedEngine
from cluster.simulated_request import SimulatedRequest

Places = Mapping[int, float]
"""Replicas of a tenant, each with its part of the requests."""


class TenantRouter:
    """Sends tenants to their replicas."""

    def __init__(self, others: Router, places: Mapping[str, Places]) -> None:
        """Begin with no replica up.

        Args:
            others: For tenants that are not in `places`.
        """
        self._others, self._places = others, places
        self._up: dict[int, None] = {}
        self._credits: dict[str, dict[int, float]] = {tenant: dict.fromkeys(of, 0.0) for tenant, of in places.items()}

    def up(self, replica: int, engine: SimulatedEngine, now_s: float) -> None:
        """See `Router`."""
        self._up[replica] = None
        self._others.up(replica, engine, now_s)

    def down(self, replica: int) -> None:
        """See `Router`."""
        del self._up[replica]
        self._others.down(replica)

    def changed(self, replica: int, now_s: float) -> None:
        """See `Router`."""
        self._others.changed(replica, now_s)

    def ended(self, request: SimulatedRequest) -> None:
        """See `Router`."""
        self._others.ended(request)

    def choose(self, request: SimulatedRequest, now_s: float) -> int | None:
        """See `Router`."""
        places = self._places.get(request.tenant)
        if places is None:
            return self._others.choose(request, now_s)
        here: Places = {number: part for number, part in places.items() if number in self._up}
        here = here or dict.fromkeys(self._up, 1.0)
        if not here:
            return None
        shares = self._credits[request.tenant]
        for number, part in here.items():
            shares[number] = shares.get(number, 0.0) + part
        number = max(here, key=lambda each: (shares[each], -each))
        shares[number] -= sum(here.values())
        return number


def parse_pin(text: str) -> tuple[str, dict[int, float]]:
    """Read `TENANT=0,1` or `TENANT=0:4,1:1`.

    Raises:
        ValueError: It is neither.
    """
    tenant, separator, rest = text.rpartition("=")
    places: dict[int, float] = {}
    try:
        for each in rest.split(","):
            number, _, part = each.partition(":")
            places[int(number)] = float(part or 1.0)
    except ValueError:
        places = {}
    if not separator or not places or min(places) < 0 or not all(0.0 < part < 1e9 for part in places.values()):
        raise ValueError(f"--pin must be TENANT=REPLICA[:PART],..., such as a=0,1 or a=0:4,1:1: it is {text!r}.")
    return tenant, places
