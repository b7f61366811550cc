"""A virtual link to host memory, to study slow links on CPU, where a copy would always beat a recomputation.

Rules:
- SIMULATED: it says when a transfer would end and moves nothing. Time comes in as a parameter.
- First come, first served per direction. A transfer takes latency + bytes / bytes_per_s; it occupies its direction for
  bytes / bytes_per_s only. While the other direction carries something too, it is slower by `shared_ratio`.
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
    shared_ratio: float = 0.0
    """0 for full duplex; 1 where both directions share one bandwidth."""

    def __post_init__(self) -> None:
        if not 0 < self.bytes_per_s < math.inf:
            raise ValueError("bytes_per_s of a link must be above 0 and finite.")
        if not 0 <= self.latency_s < math.inf:
            raise ValueError("latency_s of a link must be finite and not negative.")
        if not 0 <= self.shared_ratio <= 1:
            raise ValueError("shared_ratio of a link must be between 0 and 1.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """One transfer's way over the link."""

    start_s: float
    """When the link was free for it."""

    done_s: float
    shared: float
    """Share of its bytes that go while the other direction carries something too."""


class ThrottledLink:
    """Keeps the clock of both directions."""

    def __init__(self, settings: LinkSettings) -> None:
        self.settings = settings
        self._free_s = dict.fromkeys(Direction, -math.inf)

    def submit(self, direction: Direction, num_bytes: int, now_s: float) -> Passage:
        """Queue a transfer."""
        assert num_bytes >= 0, f"{num_bytes} bytes"
        start_s = max(now_s, self._free_s[direction])
        alone_s = num_bytes / self.settings.bytes_per_s
        other = Direction.IN if direction is Direction.OUT else Direction.OUT
        beside_s = min(alone_s, max(0.0, self._free_s[other] - start_s))
        self._free_s[direction] = start_s + alone_s + self.settings.shared_ratio * beside_s
        return Passage(
            start_s=start_s, done_s=self._free_s[direction] + self.settings.latency_s,
            shared=beside_s / alone_s if alone_s > 0.0 else 0.0,
        )  # fmt: skip

    def queue_s(self, direction: Direction, now_s: float) -> float:
        """Seconds until the direction is free."""
        return max(0.0, self._free_s[direction] - now_s)
