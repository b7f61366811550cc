"""In which order a simulated engine admits those who wait."""

from collections import deque
from typing import Protocol

from cluster.simulated_request import SimulatedRequest


class WaitingQueue(Protocol):
    """Requests that wait for admission; one that was preempted comes back with `prepend`."""

    def __len__(self) -> int: ...

    def add(self, request: SimulatedRequest, now_s: float) -> None:
        """Take in a request that has arrived."""
        ...

    def prepend(self, request: SimulatedRequest, now_s: float) -> None:
        """Take back a request that was admitted before, ahead of all others."""
        ...

    def peek(self, now_s: float) -> SimulatedRequest:
        """Whose turn it is; the queue is not empty."""
        ...

    def pop(self, now_s: float) -> SimulatedRequest:
        """Remove and return the one that `peek` returned."""
        ...

    def remove(self, request: SimulatedRequest) -> None:
        """The request is not wanted any more; it is in the queue."""
        ...


class FirstCome:
    """The order of arrival, as vLLM's `FCFSRequestQueue`."""

    def __init__(self) -> None:
        self._requests: deque[SimulatedRequest] = deque()

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, request: SimulatedRequest, now_s: float) -> None:
        """See `WaitingQueue`."""
        self._requests.append(request)

    def prepend(self, request: SimulatedRequest, now_s: float) -> None:
        """See `WaitingQueue`."""
        self._requests.appendleft(request)

    def peek(self, now_s: float) -> SimulatedRequest:
        """See `WaitingQueue`."""
        return self._requests[0]

    def pop(self, now_s: float) -> SimulatedRequest:
        """See `WaitingQueue`."""
        return self._requests.popleft()

    def remove(self, request: SimulatedRequest) -> None:
        """See `WaitingQueue`."""
        self._requests.remove(request)
