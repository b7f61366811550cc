"""A virtual link to host memory, to study slow links on CPU, where a copy would always beat a recomputation.

Rules:
- SIMULATED: it says when a transfer would end and moves nothing. Time comes in as a parameter.
- Full duplex, first come, first served per direction. A transfer takes latency + bytes / bytes_per_s; it occupies its
  direction for bytes / bytes_per_s only.
"""

import math
from dataclasses import dataclass
from enum import StrEnum


class Direction(StrEnum):
    """Seen from the device."""

    OUT = "out"
    """Device to host."""

    IN = "in"
    """Host to device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSettings:
    """What the link can do."""

    bytes_per_s: float
    latency_s: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.bytes_per_s < math.inf:
            raise ValueError("bytes_per_s of a link must be above 0 and finite.")
        if not 0 <= self.latency_s < math.inf:
            raise ValueError("latency_s of a link must be finite and not negative.")


class ThrottledLink:
    """Keeps the clock of both directions."""

    def __init__(self, settings: LinkSettings) -> None:
        self.settings = settings
        self._free_s = dict.fromkeys(Direction, -math.inf)

    def submit(self, direction: Direction, num_bytes: int, now_s: float, *, not_before_s: float = -math.inf) -> float:
        """Queue a transfer; return the time at which it is complete."""
        assert num_bytes >= 0, f"{num_bytes} bytes"
        start_s = max(now_s, not_before_s, self._free_s[direction])
        self._free_s[direction] = start_s + num_bytes / self.settings.bytes_per_s
        return self._free_s[direction] + self.settings.latency_s

    def queue_s(self, direction: Direction, now_s: float) -> float:
        """Seconds until the direction is free."""
        return max(0.0, self._free_s[direction] - now_s)
