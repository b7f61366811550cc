"""The most that something rose by in a second, from readings of its total; no clock of its own.

Rule: a rate is over `WINDOW_S` at least, so that two readings in quick succession are no peak, and of all times from one
reading to another the highest counts: what is given within a stale interval is what the fairness bound asks for. Times of
more than two windows are left out where they can be divided, for a part has at least two thirds of their rate.
"""

from collections import deque

WINDOW_S = 0.5


class PeakRate:
    """Highest rate of a total that only grows."""

    def __init__(self) -> None:
        self.per_s = 0.0
        self._readings: deque[tuple[float, float]] = deque()

    def read(self, now_s: float, total: float) -> None:
        """Take a reading; a total that fell has begun anew."""
        readings = self._readings
        if readings and total < readings[-1][1]:
            readings.clear()
        readings.append((now_s, total))
        while len(readings) > 2 and now_s - readings[1][0] >= 2.0 * WINDOW_S:
            readings.popleft()
        highest = max((total - before) / max(WINDOW_S, now_s - then_s) for then_s, before in readings)
        self.per_s = max(self.per_s, highest)
