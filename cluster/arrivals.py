"""When requests of one stream arrive: a renewal process through ramps and pauses.

Gaps are gamma distributed with a given coefficient of variation: 0 is a steady beat, 1 Poisson, above that bursts. They are
drawn at the stream's greatest rate; a ramp stretches them, and pauses are cut into them, so that nothing arrives in a pause.
"""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, repeat


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrivals:
    """Times of arrival; the first request comes at the start."""

    rate: float
    """Per second while the stream is on; 0 or inf: all at once."""

    rate_end: float | None = None
    """Rate at the end of the duration, which is reached along a straight line."""

    cv: float = 1.0
    """Standard deviation of a gap / its mean."""

    start_s: float = 0.0
    duration_s: float | None = None
    """None: without end."""

    on_s: float | None = None
    off_s: float = 0.0
    """The stream is on for `on_s`, then off for `off_s`, and so on; None: always on."""

    @property
    def at_once(self) -> bool:
        """Whether there are no gaps."""
        return self.rate_end is None and (self.rate == 0 or math.isinf(self.rate))

    def times_s(self, rng: random.Random) -> Iterator[float]:
        """Yield the times; a gap is drawn only when the time after it is asked for."""
        peak = max(self.rate, self.rate_end or 0.0)
        for work_s in repeat(0.0) if self.at_once else self._work_s(rng, peak):
            after_s = self._with_pauses(self._active_s(work_s, peak))
            if self.duration_s is not None and after_s >= self.duration_s:
                return
            yield self.start_s + after_s

    def _work_s(self, rng: random.Random, rate: float) -> Iterator[float]:
        """Times in a stream of that rate alone."""
        if self.cv == 0:
            yield from (number / rate for number in count())
        work_s = 0.0
        while True:
            yield work_s
            work_s += rng.expovariate(rate) if self.cv == 1 else rng.gammavariate(self.cv**-2, self.cv**2 / rate)

    def _active_s(self, work_s: float, peak: float) -> float:
        """Seconds of being on until the ramp has brought that much: the root of rate t + slope t^2 / 2 = peak work."""
        if self.rate_end is None or work_s == 0:
            return work_s
        assert self.duration_s is not None, "a ramp needs its end"
        slope = (self.rate_end - self.rate) / self._time_on(self.duration_s)
        root = self.rate**2 + 2 * slope * peak * work_s
        if root < 0:  # falling to 0, the stream never brings that much
            return math.inf
        return 2 * peak * work_s / (self.rate + math.sqrt(root))

    def _time_on(self, elapsed_s: float) -> float:
        if self.on_s is None:
            return elapsed_s
        periods, rest_s = divmod(elapsed_s, self.on_s + self.off_s)
        return periods * self.on_s + min(rest_s, self.on_s)

    def _with_pauses(self, active_s: float) -> float:
        if self.on_s is None or math.isinf(active_s):
            return active_s
        periods, rest_s = divmod(active_s, self.on_s)
        return periods * (self.on_s + self.off_s) + rest_s
