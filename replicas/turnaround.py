"""Weighted turnaround of requests that have ended: how many times longer they took than they would have alone; 1 is ideal.

Rules:
- Turnaround is from a request's arrival at the ingress to its last token; its service time alone is predicted: its prefill
  on an idle engine, and as many of the fastest steps that this engine was seen to take as it had output tokens.
- Sums and numbers since the engine started, by tenant: a lost report costs nothing.
- The mean that is shown is over the last `WINDOW` requests of a tenant or so, exponentially.
"""

from collections.abc import Iterable

import msgspec

from cost_service.tenant_labels import TenantLabels

WINDOW = 100


class Ended(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Requests of a tenant that have ended, and the sum of their weighted turnarounds."""

    num: int
    weighted_turnaround: float


NONE = Ended(num=0, weighted_turnaround=0.0)


class Turnarounds:
    """Sums by tenant in one engine."""

    def __init__(self) -> None:
        self._ended: dict[str, Ended] = {}
        self._least_step_s = 0.0

    @property
    def alone_step_s(self) -> float:
        """Seconds of a step of a request alone; 0 when nothing is known yet."""
        return self._least_step_s

    def note_step(self, step_s: float) -> None:
        """Take how long steps take, as of late; 0 is not known."""
        if step_s > 0.0 and not 0.0 < self._least_step_s <= step_s:
            self._least_step_s = step_s

    def add(self, tenant: str, *, turnaround_s: float, alone_s: float) -> None:
        """Count a request that has ended; one of which nothing is known alone is left out."""
        if alone_s > 0.0:
            before = self._ended.get(tenant, NONE)
            total = before.weighted_turnaround + turnaround_s / alone_s
            self._ended[tenant] = Ended(num=before.num + 1, weighted_turnaround=total)

    def of(self, tenants: Iterable[str]) -> dict[str, Ended]:
        """Return those of some tenants, where any request has ended."""
        return {name: self._ended[name] for name in dict.fromkeys(tenants) if name in self._ended}


class TurnaroundMeans:
    """Means by label, from the sums that an engine reports."""

    def __init__(self) -> None:
        self._labels = TenantLabels()
        self._ended: dict[str, Ended] = {}
        self._means: dict[str, Ended] = {}
        self._epoch = ""

    @property
    def means(self) -> dict[str, Ended]:
        """Label to its mean, over how many requests."""
        return dict(self._means)

    def read(self, epoch: str, ended: dict[str, Ended]) -> dict[str, float]:
        """Take an engine's sums, and return the means that have changed."""
        if epoch != self._epoch:
            self._epoch, self._ended = epoch, {}
        changed: dict[str, float] = {}
        for tenant, total in ended.items():
            before = self._ended.get(tenant, NONE)
            num, added = total.num - before.num, total.weighted_turnaround - before.weighted_turnaround
            if num > 0:
                self._ended[tenant] = total
                label = self._labels.label(tenant)
                changed[label] = self._add(label, num, added)
        return changed

    def _add(self, label: str, num: int, added: float) -> float:
        mean = self._means.get(label, NONE)
        seen = min(mean.num + num, WINDOW)
        share = min(1.0, num / seen)
        value = mean.weighted_turnaround + share * (added / num - mean.weighted_turnaround)
        self._means[label] = Ended(num=seen, weighted_turnaround=value)
        return value
