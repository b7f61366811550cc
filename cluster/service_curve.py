"""How far apart the service of tenants that wait is, over the time of a run.

Definitions are those of `cluster.bench_figures`: weighted tokens, a prompt from its first token on, output spread evenly; a
tenant waits while it has requests without a first token. The gap at a moment is the greatest minus the least normalised
service since both began to wait, over all pairs that wait.
"""

from collections.abc import Mapping, Sequence

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
    curves = {
        tenant: [_service(of, at_s, end_s) / (weights or {}).get(tenant, 1.0) for at_s in moments]
        for tenant, of in own.items()
    }
    waits = {tenant: [_waits(of, at_s) for at_s in moments] for tenant, of in own.items()}
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
        own = [one for one in everything if one.tenant == tenant]
        service = _service(own, until_s, end_s) - _service(own, from_s, end_s)
        served[tenant] = service / (weights or {}).get(tenant, 1.0)
    total = sum(served.values())
    return {tenant: service / total for tenant, service in served.items()} if total else {}


def _level(curves: Mapping[str, Sequence[float]], base: Mapping[str, float], tenant: str, place: int) -> float:
    """Where a tenant that begins to wait counts from: level with the one that has had the least since it waits."""
    least = min((curves[one][place] - base[one] for one in base), default=0.0)
    return curves[tenant][place] - least


def _service(records: Sequence[RequestRecord], at_s: float, end_s: float) -> float:
    total = 0.0
    for one in records:
        if one.first_token_s is None or one.first_token_s > at_s:
            continue
        finish_s = end_s if one.finish_s is None else one.finish_s
        share = (
            1.0
            if finish_s <= one.first_token_s
            else min(1.0, (at_s - one.first_token_s) / (finish_s - one.first_token_s))
        )
        total += PROMPT_WEIGHT * one.prompt_tokens + OUTPUT_WEIGHT * one.delivered_tokens * share
    return total


def _waits(records: Sequence[RequestRecord], at_s: float) -> bool:
    return any(
        one.arrival_s <= at_s and (one.first_token_s is None or at_s < one.first_token_s) for one in records
    )  # fmt: skip
