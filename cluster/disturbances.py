"""What goes wrong in a simulated cluster, by chance or at given times.

Rule: values alone; chance is drawn where time passes (`cluster.simulation`), from a generator with this seed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Disturbances:
    """What goes wrong."""

    seed: int = 0
    crash_interval_s: float = math.inf
    """Seconds that a replica runs until it crashes, in the mean."""

    restart_s: float = 60.0
    """Until it is back."""

    resubmit: bool = True
    """Whether what a crashed replica had is sent again; else it stays unfinished."""

    leave_share: float = 0.0
    """Share of requests whose client leaves after an exponential time, if it has no answer by then."""

    patience_s: float = 60.0
    """That time's mean."""

    report_delay_s: float = 0.0
    """Until a report or an answer arrives, in the mean; half of it is the same for all."""

    report_loss: float = 0.0
    """Share of reports, and of answers, that never arrive."""

    crashes: Sequence[tuple[float, int]] = ()
    """Seconds at which a replica crashes beside that, and its number."""

    scale: Sequence[tuple[float, int]] = ()
    """Seconds from which on there are to be so many replicas."""

    def __post_init__(self) -> None:
        for name in ("crash_interval_s", "restart_s", "patience_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0: it is {getattr(self, name)}.")
        for name in ("leave_share", "report_loss"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1: it is {getattr(self, name)}.")
        if not 0 <= self.report_delay_s < math.inf:
            raise ValueError(f"report_delay_s must be finite and not negative: it is {self.report_delay_s}.")
        if any(num < 1 for _, num in self.scale):
            raise ValueError("scale must leave at least 1 replica.")
