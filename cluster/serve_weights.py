"""Tells the fairness actor the tenants' weights that an ingress knows, beside requests (shell).

Rules:
- The registry of tenants is the authority. Every ingress tells what has changed in its copy; telling twice changes nothing.
- The actor may be away at any time: engines then weigh tenants by the stamps of their requests. One that comes back has
  stored what it knew, and is told everything anew.
"""

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from cost_service.named_actor import exchange_for_ever
from cost_service.serve_metrics import degraded_gauge
from cost_service.service_messages import ACTOR

INTERVAL_S = 1.0
MAX_AT_ONCE = 1000
"""Tenants of one message."""


class WeightTeller:
    """One ingress's end of the fairness scheduler."""

    def __init__(self, weights: Callable[[], Mapping[str, float]]) -> None:
        """Begin with nothing told.

        Args:
            weights: Asked for the weights of all tenants by name.
        """
        self._weights = weights
        self._told: dict[str, float] = {}
        self._life = ""
        self._degraded = degraded_gauge("weights")

    async def run(self) -> NoReturn:
        """Tell for ever."""
        await exchange_for_ever(
            ACTOR, self._tell, self._say_degraded, interval_s=lambda: INTERVAL_S, kept="weights stay as they were told"
        )

    async def _tell(self, actor: Any) -> None:
        news = [(name, weight) for name, weight in self._weights().items() if self._told.get(name) != weight]
        life = await actor.set_weights.remote(dict(news[:MAX_AT_ONCE]))
        if life != self._life:
            self._life, self._told = life, {}
        self._told.update(news[:MAX_AT_ONCE])

    def _say_degraded(self, away: bool) -> None:
        self._degraded.set(float(away), tags={"part": "weights"})
