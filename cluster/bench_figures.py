"""Figures of a benchmark run from what happened to each request; the names and definitions are those of every result file.

Rules:
- Pure: values in, values out. Times are seconds after the start of a run.
- A request that did not finish, or got no token, counts as if it had at the run's end.
- Service is weighted tokens: a prompt token counts 1, from the first output token on; an output token counts 2 and is
  spread evenly from the first to the last one. Normalised service is service / the tenant's weight.
- The service alone is the same for every policy: it comes from one calibration on an idle stock engine.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations, groupby
from typing import Any, Self

PROMPT_WEIGHT, OUTPUT_WEIGHT = 1.0, 2.0

RATIO_FIGURES = (
    "throughput_tokens_per_s", "weighted_turnaround_mean", "weighted_turnaround_p99", "ttft_s_p50", "ttft_s_p99",
    "tpot_s_p50", "tpot_s_p99",
)  # fmt: skip
"""Figures for which a ratio to stock says something: positive, and not counts."""

INTERVAL = "two-sided 95 % t-interval over repeats"
# Student's t, two-sided 95 %, by degrees of freedom; beyond the table its last value, which is a little too wide.
_T_95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """What happened to one request."""

    request_id: str
    tenant: str
    arrival_s: float
    first_token_s: float | None
    finish_s: float | None
    prompt_tokens: int
    output_tokens: int
    """Asked for."""

    delivered_tokens: int
    """Delivered; fewer than asked for only when the run ended first."""

    swaps: int = 0
    recomputes: int = 0

    def __post_init__(self) -> None:
        assert (self.first_token_s is None) == (self.delivered_tokens == 0), f"{self} has tokens without a time"
        assert self.finish_s is None or self.delivered_tokens == self.output_tokens, f"{self} finished with tokens left"


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """How long a request takes on an idle stock engine with a cold prefix cache."""

    ttft_s: float
    """Time to first token of an empty prompt, by extrapolation."""

    ttft_s_per_prompt_token: float
    s_per_output_token: float

    @classmethod
    def fit(cls, measured: Sequence[RequestRecord]) -> Self:
        """Fit requests that ran one at a time: least squares through the median per prompt length; median per token.

        Raises:
            ValueError: No request has two output tokens, or none has finished.
        """
        by_length: dict[int, list[float]] = defaultdict(list)
        for record in measured:
            if record.first_token_s is not None:
                by_length[record.prompt_tokens].append(record.first_token_s - record.arrival_s)
        per_token = [tpot for record in measured if (tpot := _tpot_s(record)) is not None]
        if not by_length or not per_token:
            raise ValueError("A calibration needs finished requests of at least two output tokens.")
        medians = [statistics.median(times) for times in by_length.values()]
        slope, intercept = 0.0, statistics.fmean(medians)
        if len(by_length) > 1:
            slope, intercept = statistics.linear_regression(list(by_length), medians)
        if slope < 0 or intercept < 0:  # noise of a nearly flat line: better a constant than a negative time
            slope, intercept = 0.0, statistics.fmean(medians)
        return cls(ttft_s=intercept, ttft_s_per_prompt_token=slope, s_per_output_token=statistics.median(per_token))

    def alone_s(self, *, prompt_tokens: int, output_tokens: int) -> float:
        """Service time alone: time to first token + output tokens x time per token."""
        return self.ttft_s + self.ttft_s_per_prompt_token * prompt_tokens + self.s_per_output_token * output_tokens

    def check(self, measured: Sequence[RequestRecord]) -> dict[str, float]:
        """Median relative error and median signed error against other requests that ran one at a time."""
        errors = []
        for record in measured:
            assert record.finish_s is not None, f"{record} did not finish alone"
            alone_s = self.alone_s(prompt_tokens=record.prompt_tokens, output_tokens=record.output_tokens)
            errors.append(alone_s / (record.finish_s - record.arrival_s) - 1)
        return {
            "requests": len(errors),
            "median_relative_error": statistics.median(map(abs, errors)),
            "median_signed_error": statistics.median(errors),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Figures of one run, or of one tenant's requests in it."""

    throughput_tokens_per_s: float
    """Delivered output tokens / (last finish - first arrival)."""

    weighted_turnaround_mean: float
    """Weighted turnaround of a request = (finish - arrival) / service time alone; 1 is ideal."""

    weighted_turnaround_p99: float
    ttft_s_p50: float
    ttft_s_p99: float
    tpot_s_p50: float | None
    """(last token - first token) / (tokens - 1); None when no request has two tokens."""

    tpot_s_p99: float | None
    preemptions: int
    swaps: int
    recomputes: int
    jain_index: float
    """Of the tenants' normalised service up to the moment when the first of them has nothing left to finish; 1 is
    equal. (At the end of a run that serves everything, totals are the same for every policy.) 1 for one tenant."""

    max_service_gap: float
    """Greatest difference between the normalised service of two tenants over any interval in which both had requests
    that waited for their first token. Of one tenant: among the pairs that it is in."""

    requests: int
    unfinished: int
    tenants: dict[str, "Figures"] = field(default_factory=dict)


def figures(
    records: Sequence[RequestRecord],
    calibration: Calibration,
    *,
    run_end_s: float,
    weights: Mapping[str, float] | None = None,
) -> Figures:
    """Compute the figures of one run.

    Args:
        run_end_s: When the run ended; what is unfinished counts up to it.
        weights: Share of each tenant; 1 where none is given.

    Raises:
        ValueError: There is no request, or a weight is not positive.
    """
    if not records:
        raise ValueError("A run without requests has no figures: run at least one.")
    tenants = sorted({record.tenant for record in records})
    weight = {tenant: (weights or {}).get(tenant, 1.0) for tenant in tenants}
    if bad := [tenant for tenant in tenants if not weight[tenant] > 0]:
        raise ValueError(f"The weight of tenant {bad[0]} must be positive.")
    gaps = service_gaps(records, weight, run_end_s=run_end_s)
    own = {tenant: [record for record in records if record.tenant == tenant] for tenant in tenants}
    first_done_s = min(max(_finish_s(record, run_end_s) for record in own[tenant]) for tenant in tenants)
    served = [
        sum(_service_until(record, first_done_s) for record in own[tenant]) / weight[tenant] for tenant in tenants
    ]
    by_tenant = {
        tenant: _figures(own[tenant], calibration, run_end_s, jain=1.0, gap=gaps[tenant], tenants={})
        for tenant in tenants
    }
    return _figures(records, calibration, run_end_s, jain=jain_index(served), gap=max(gaps.values()), tenants=by_tenant)


def _figures(
    records: Sequence[RequestRecord],
    calibration: Calibration,
    run_end_s: float,
    *,
    jain: float,
    gap: float,
    tenants: dict[str, Figures],
) -> Figures:
    finishes_s = [_finish_s(record, run_end_s) for record in records]
    span_s = max(finishes_s) - min(record.arrival_s for record in records)
    turnarounds = [
        (finish_s - record.arrival_s)
        / calibration.alone_s(prompt_tokens=record.prompt_tokens, output_tokens=record.output_tokens)
        for record, finish_s in zip(records, finishes_s, strict=True)
    ]
    ttfts_s = [_first_token_s(record, run_end_s) - record.arrival_s for record in records]
    tpots_s = [tpot for record in records if (tpot := _tpot_s(record)) is not None]
    swaps, recomputes = sum(record.swaps for record in records), sum(record.recomputes for record in records)
    return Figures(
        throughput_tokens_per_s=sum(record.delivered_tokens for record in records) / span_s,
        weighted_turnaround_mean=statistics.fmean(turnarounds),
        weighted_turnaround_p99=quantile(turnarounds, 0.99),
        ttft_s_p50=quantile(ttfts_s, 0.5),
        ttft_s_p99=quantile(ttfts_s, 0.99),
        tpot_s_p50=quantile(tpots_s, 0.5) if tpots_s else None,
        tpot_s_p99=quantile(tpots_s, 0.99) if tpots_s else None,
        preemptions=swaps + recomputes,
        swaps=swaps,
        recomputes=recomputes,
        jain_index=jain,
        max_service_gap=gap,
        requests=len(records),
        unfinished=sum(record.finish_s is None for record in records),
        tenants=tenants,
    )


def service_gaps(
    records: Iterable[RequestRecord], weight: Mapping[str, float], *, run_end_s: float
) -> dict[str, float]:
    """Greatest difference of normalised service per tenant, in the sense of `Figures.max_service_gap`."""
    changes = sorted(
        (change for record in records for change in _changes(record, weight[record.tenant], run_end_s)),
        key=lambda change: change[0],
    )
    served, rate, waiting = dict.fromkeys(weight, 0.0), dict.fromkeys(weight, 0.0), dict.fromkeys(weight, 0)
    seen: dict[tuple[str, str], tuple[float, float]] = {}  # least and greatest difference while both wait
    gaps = dict.fromkeys(weight, 0.0)

    def look() -> None:
        for pair in combinations(sorted(weight), 2):
            if all(waiting[tenant] for tenant in pair):
                difference = served[pair[0]] - served[pair[1]]
                low, high = seen.get(pair, (difference, difference))
                seen[pair] = low, high = min(low, difference), max(high, difference)
                for tenant in pair:
                    gaps[tenant] = max(gaps[tenant], high - low)
            else:
                seen.pop(pair, None)

    last_s = 0.0
    for at_s, group in groupby(changes, key=lambda change: change[0]):
        now = list(group)
        for tenant in served:
            served[tenant] += rate[tenant] * (at_s - last_s)
        last_s = at_s
        # Who arrives waits already, who gets its first token waits still, while the service of this moment is given.
        for _, tenant, _, _, arrivals in now:
            waiting[tenant] += max(arrivals, 0)
        look()
        for _, tenant, jump, rate_change, _ in now:
            served[tenant] += jump
            rate[tenant] += rate_change
        look()
        for _, tenant, _, _, arrivals in now:
            waiting[tenant] += min(arrivals, 0)
        look()
    return gaps


def _changes(record: RequestRecord, weight: float, run_end_s: float) -> list[tuple[float, str, float, float, int]]:
    """(time, tenant, jump of service, change of its rate, change of the number that waits)."""
    tenant, first_s = record.tenant, _first_token_s(record, run_end_s)
    changes = [(record.arrival_s, tenant, 0.0, 0.0, 1)]
    if record.first_token_s is None:
        return [*changes, (first_s, tenant, 0.0, 0.0, -1)]
    finish_s = _finish_s(record, run_end_s)
    jump, output = PROMPT_WEIGHT * record.prompt_tokens / weight, OUTPUT_WEIGHT * record.delivered_tokens / weight
    if finish_s <= first_s:
        return [*changes, (first_s, tenant, jump + output, 0.0, -1)]
    rate = output / (finish_s - first_s)
    return [*changes, (first_s, tenant, jump, rate, -1), (finish_s, tenant, 0.0, -rate, 0)]
