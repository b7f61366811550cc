"""How far apart the service of tenants that wait is, over the time of a run.

Definitions are those of `cluster.bench_figures`: weighted tokens, a prompt from its first token on, output spread evenly; a
tenant waits while it has requests without a first token. The gap at a moment is the greatest minus the least normalised
service since both began to wait, over all pairs that wait.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from cluster.bench_figures import OUTPUT_WEIGHT, PROMPT_WEIGHT
from cluster.records import RequestRecord

POINTS = 200
"""Moments of a curve."""

WARM_SHARE = 0.25
"""Of a time in which all wait, until the first batches are over."""


def service_gaps(
    records: Sequence[RequestRecord], weights: Mapping[str, float] | None = None
) -> list[tuple[float, float]]:
    """Pairs of time and gap, at evenly spaced moments."""
    end_s = max((one.finish_s or one.arrival_s for one in records), default=0.0)
    moments = [end_s * place / POINTS for place in range(POINTS + 1)]
    own: dict[str, list[RequestRecord]] = {}
    for record in records:
        own.setdefault(record.tenant, []).append(record)
    requests = {tenant: _Requests(of, end_s) for tenant, of in own.items()}
    curves = {
        tenant: [of.service(at_s) / (weights or {}).get(tenant, 1.0) for at_s in moments]
        for tenant, of in requests.items()
    }
    waits = {tenant: [of.wait(at_s) for at_s in moments] for tenant, of in requests.items()}
    base: dict[str, float] = {}
    gaps = []
    for place, at_s in enumerate(moments):
        waiting = [tenant for tenant in own if waits[tenant][place]]
        base = {tenant: base.get(tenant, _level(curves, base, tenant, place)) for tenant in waiting}
        since = [curves[tenant][place] - base[tenant] for tenant in waiting]
        gaps.append((at_s, max(since) - min(since) if len(since) > 1 else 0.0))
    return gaps


def shares_while_all_wait(
    replicas: Sequence[Sequence[RequestRecord]], weights: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Each tenant's share of the normalised service of all replicas, while all wait wherever they are served.

    The first quarter of that time is left out: there a replica's batch is filled by what it knows itself. Empty where there
    is no such time.

    Args:
        replicas: What happened to the requests of each of them.
    """
    everything = [one for records in replicas for one in records]
    end_s = max((one.finish_s or one.first_token_s or one.arrival_s for one in everything), default=0.0)
    until_s = end_s
    for records in replicas:
        last_s: dict[str, float] = {}
        for one in records:
            waited_s = end_s if one.first_token_s is None else one.first_token_s
            last_s[one.tenant] = max(last_s.get(one.tenant, 0.0), waited_s)
        until_s = min(until_s, *last_s.values())
    from_s = WARM_SHARE * until_s
    served: dict[str, float] = {}
    for tenant in sorted({one.tenant for one in everything}):
        own = _Requests([one for one in everything if one.tenant == tenant], end_s)
        served[tenant] = (own.service(until_s) - own.service(from_s)) / (weights or {}).get(tenant, 1.0)
    total = sum(served.values())
    return {tenant: service / total for tenant, service in served.items()} if total else {}


def _level(curves: Mapping[str, Sequence[float]], base: Mapping[str, float], tenant: str, place: int) -> float:
    """Where a tenant that begins to wait counts from: level with the one that has had the least since it waits."""
    least = min((curves[one][place] - base[one] for one in base), default=0.0)
    return curves[tenant][place] - least


class _Requests:
    """A tenant's requests in columns."""

    def __init__(self, records: Sequence[RequestRecord], end_s: float) -> None:
        def column(values: Iterable[float]) -> np.ndarray[Any, Any]:
            return np.fromiter(values, float, len(records))

        self._arrival_s = column(one.arrival_s for one in records)
        self._first_s = column(np.inf if one.first_token_s is None else one.first_token_s for one in records)
        finish_s = column(end_s if one.finish_s is None else one.finish_s for one in records)
        self._prompt = column(PROMPT_WEIGHT * one.prompt_tokens for one in records)
        self._output = column(OUTPUT_WEIGHT * one.delivered_tokens for one in records)
        self._lasts_s = np.maximum(finish_s - self._first_s, 0.0)

    def service(self, at_s: float) -> float:
        """All that they have got by then."""
        begun = self._first_s <= at_s
        since_s, lasts_s = at_s - self._first_s[begun], self._lasts_s[begun]
        shares = np.divide(since_s, lasts_s, out=np.ones_like(since_s), where=lasts_s > 0.0)
        return float((self._prompt[begun] + self._output[begun] * np.minimum(shares, 1.0)).sum())

    def wait(self, at_s: float) -> bool:
        """Whether any waits for its first token."""
        return bool(((self._arrival_s <= at_s) & (at_s < self._first_s)).any())
