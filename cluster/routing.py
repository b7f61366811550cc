"""Which replica of a simulated cluster a request goes to."""

from typing import Protocol

import numpy as np

from cluster.simulated_engine import SimulatedEngine
from cluster.simulated_request import SimulatedRequest


class Router(Protocol):
    """Chooses among the replicas that are up."""

    def up(self, replica: int, engine: SimulatedEngine) -> None:
        """A replica has come up, with this engine."""
        ...

    def down(self, replica: int) -> None:
        """A replica has crashed."""
        ...

    def choose(self, request: SimulatedRequest) -> int | None:
        """The replica for a request; None while none is up."""
        ...

    def changed(self, replica: int) -> None:
        """The replica's engine has begun another step, or got a request."""
        ...


class RoundRobin:
    """One after the other."""

    def __init__(self) -> None:
        self._up: set[int] = set()
        self._last, self._num_places = -1, 0

    def up(self, replica: int, engine: SimulatedEngine) -> None:
        """See `Router`."""
        self._up.add(replica)
        self._num_places = max(self._num_places, replica + 1)

    def down(self, replica: int) -> None:
        """See `Router`."""
        self._up.discard(replica)

    def choose(self, request: SimulatedRequest) -> int | None:
        """See `Router`."""
        if not self._up:
            return None
        self._last = (self._last + 1) % self._num_places
        while self._last not in self._up:
            self._last = (self._last + 1) % self._num_places
        return self._last

    def changed(self, replica: int) -> None:
        """See `Router`."""


class LeastLoaded:
    """Where most KV blocks were free when a request last came to run or ended, less those that waiting ones will take."""

    def __init__(self) -> None:
        self._engines: dict[int, SimulatedEngine] = {}
        self._free = np.zeros(0)

    def up(self, replica: int, engine: SimulatedEngine) -> None:
        """See `Router`."""
        if replica >= len(self._free):
            self._free = np.append(self._free, np.full(replica + 1 - len(self._free), -np.inf))
        self._engines[replica] = engine
        self.changed(replica)

    def down(self, replica: int) -> None:
        """See `Router`."""
        del self._engines[replica]
        self._free[replica] = -np.inf

    def choose(self, request: SimulatedRequest) -> int | None:
        """See `Router`."""
        return int(np.argmax(self._free)) if self._engines else None

    def changed(self, replica: int) -> None:
        """See `Router`."""
        engine = self._engines[replica]
        self._free[replica] = engine.known_free_blocks - engine.num_waiting_tokens / engine.settings.block_size
