"""Which replica of a simulated cluster a request goes to.

Rule: `Placed` is the product's placement (`global_scheduler.placement`), which sees of replicas what they were like at the
last of its reports, `ROUTING_STATS_PERIOD_S` apart. The others see all at once.
"""

from typing import Protocol

import numpy as np

from cluster.simulated_engine import SimulatedEngine
from cluster.simulated_request import SimulatedRequest
from cost_service.service_messages import ROUTING_STATS_PERIOD_S, ReplicaLoad, heaviest
from global_scheduler.placement import Placement, PlacementSettings
from global_scheduler.prefix_homes import Mark, mark_places


class Router(Protocol):
    """Chooses among the replicas that are up."""

    def up(self, replica: int, engine: SimulatedEngine, now_s: float) -> None:
        """A replica has come up, with this engine."""
        ...

    def down(self, replica: int) -> None:
        """A replica has crashed."""
        ...

    def choose(self, request: SimulatedRequest, now_s: float) -> int | None:
        """The replica for a request; None while none is up."""
        ...

    def changed(self, replica: int, now_s: float) -> None:
        """The replica's engine has begun another step, or got a request."""
        ...

    def ended(self, request: SimulatedRequest) -> None:
        """A request is over, wherever it was."""
        ...


class RoundRobin:
    """One after the other."""

    def __init__(self) -> None:
        self._up: set[int] = set()
        self._last, self._num_places = -1, 0

    def up(self, replica: int, engine: SimulatedEngine, now_s: float) -> None:
        """See `Router`."""
        self._up.add(replica)
        self._num_places = max(self._num_places, replica + 1)

    def down(self, replica: int) -> None:
        """See `Router`."""
        self._up.discard(replica)

    def choose(self, request: SimulatedRequest, now_s: float) -> int | None:
        """See `Router`."""
        if not self._up:
            return None
        self._last = (self._last + 1) % self._num_places
        while self._last not in self._up:
            self._last = (self._last + 1) % self._num_places
        return self._last

    def changed(self, replica: int, now_s: float) -> None:
        """See `Router`."""

    def ended(self, request: SimulatedRequest) -> None:
        """See `Router`."""


class LeastLoaded:
    """Where most KV blocks were free when a request last came to run or ended, less those that waiting ones will take."""

    def __init__(self) -> None:
        self._engines: dict[int, SimulatedEngine] = {}
        self._free = np.zeros(0)

    def up(self, replica: int, engine: SimulatedEngine, now_s: float) -> None:
        """See `Router`."""
        if replica >= len(self._free):
            self._free = np.append(self._free, np.full(replica + 1 - len(self._free), -np.inf))
        self._engines[replica] = engine
        self.changed(replica, now_s)

    def down(self, replica: int) -> None:
        """See `Router`."""
        del self._engines[replica]
        self._free[replica] = -np.inf

    def choose(self, request: SimulatedRequest, now_s: float) -> int | None:
        """See `Router`."""
        return int(np.argmax(self._free)) if self._engines else None

    def changed(self, replica: int, now_s: float) -> None:
        """See `Router`."""
        engine = self._engines[replica]
        self._free[replica] = engine.known_free_blocks - engine.num_waiting_tokens / engine.settings.block_size

    def ended(self, request: SimulatedRequest) -> None:
        """See `Router`."""


class Placed:
    """By the product's placement."""

    def __init__(self, settings: PlacementSettings | None = None) -> None:
        self.placement = Placement(settings)
        self._engines: dict[int, SimulatedEngine] = {}
        self._latest: dict[int, ReplicaLoad] = {}
        """Of replicas that have not reported it yet."""

        self._due_s = ROUTING_STATS_PERIOD_S
        self._num_loads = 0

    def up(self, replica: int, engine: SimulatedEngine, now_s: float) -> None:
        """See `Router`."""
        self._report(now_s)
        self._engines[replica] = engine
        self.placement.up(_name(replica))

    def down(self, replica: int) -> None:
        """See `Router`."""
        del self._engines[replica]
        self._latest.pop(replica, None)
        self.placement.down(_name(replica))

    def choose(self, request: SimulatedRequest, now_s: float) -> int | None:
        """See `Router`."""
        if not self._engines:
            return None
        self._report(now_s)
        decision = self.placement.place(
            request.request_id, tenant=request.tenant, num_tokens=request.prompt_tokens, marks=self._marks(request),
            now_s=now_s,
        )  # fmt: skip
        return int(decision.replica)

    def changed(self, replica: int, now_s: float) -> None:
        """See `Router`."""
        self._report(now_s)
        engine = self._engines[replica]
        self._num_loads += 1
        self._latest[replica] = ReplicaLoad(
            epoch="", sequence=self._num_loads, num_running=len(engine.running),
            num_waiting=engine.num_requests - len(engine.running), num_blocks=engine.settings.num_blocks,
            num_free_blocks=engine.known_free_blocks, block_size=engine.settings.block_size,
            num_waiting_tokens=engine.num_waiting_tokens, backlog=heaviest(engine.waiting_tokens),
        )  # fmt: skip

    def ended(self, request: SimulatedRequest) -> None:
        """See `Router`."""
        self.placement.ended(request.request_id)

    def _report(self, now_s: float) -> None:
        """Let replicas report what they were like when that was due, if they have changed since."""
        if now_s < self._due_s:
            return
        due_s = now_s // ROUTING_STATS_PERIOD_S * ROUTING_STATS_PERIOD_S
        for replica, load in self._latest.items():
            self.placement.report(_name(replica), load, as_of_s=due_s, now_s=due_s)
        self._latest.clear()
        self._due_s = due_s + ROUTING_STATS_PERIOD_S

    def _marks(self, request: SimulatedRequest) -> list[Mark]:
        parts, ends, num_tokens = request.holding.parts, [], 0
        for part in parts:
            num_tokens += part.num_blocks * self._block_size
            ends.append(num_tokens)
        return [Mark(parts[place - 1].key, ends[place - 1]) for place in mark_places(len(parts))]

    @property
    def _block_size(self) -> int:
        return next(iter(self._engines.values())).settings.block_size


def _name(replica: int) -> str:
    """Its id: in the order of numbers."""
    return f"{replica:06}"
