"""Figures of a benchmark run from what happened to each request; the names and definitions are those of every result file.

Rules:
- Pure: values in, values out. Times are seconds after the start of a run.
- A request that did not finish, or got no token, counts as if it had at the run's end.
- Service is weighted tokens: a prompt token counts 1, from the first output token on; an output token counts 2 and is
  spread evenly from the first to the last one. Normalised service is service / the tenant's weight.
- The service time alone is the same for every policy: it comes from one calibration on an idle stock engine.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from typing import Any, Self

import numpy as np

from cluster.records import RequestRecord

PROMPT_WEIGHT, OUTPUT_WEIGHT = 1.0, 2.0

RATIO_FIGURES = (
    "throughput_tokens_per_s", "weighted_turnaround_mean", "weighted_turnaround_p99", "ttft_s_p50", "ttft_s_p99",
    "tpot_s_p50", "tpot_s_p99",
)  # fmt: skip
"""Figures for which a ratio to stock says something."""

INTERVAL = "two-sided 95 % t-interval over repeats; of ratios, on their logarithms"
T_95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""Student's t, two-sided 95 %, by degrees of freedom; the last value serves beyond (a little too wide)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """How long a request takes on an idle stock engine with a cold prefix cache."""

    ttft_s: float
    """Time to first token of an empty prompt, by extrapolation."""

    ttft_s_per_prompt_token: float
    s_per_output_token: float

    @classmethod
    def fit(cls, measured: Sequence[RequestRecord]) -> Self:
        """Fit requests that ran one at a time: a line through the median per prompt length, the median time per token.

        Raises:
            ValueError: None has finished with at least two output tokens.
        """
        ttfts_s: dict[int, list[float]] = defaultdict(list)
        tpots_s = []
        for record in measured:
            if record.first_token_s is not None and record.finish_s is not None and record.delivered_tokens > 1:
                ttfts_s[record.prompt_tokens].append(record.first_token_s - record.arrival_s)
                tpots_s.append((record.finish_s - record.first_token_s) / (record.delivered_tokens - 1))
        if not tpots_s:
            raise ValueError("A calibration needs finished requests with at least two output tokens.")
        medians_s = [statistics.median(times_s) for times_s in ttfts_s.values()]
        slope, intercept = 0.0, statistics.fmean(medians_s)
        if len(medians_s) > 1:
            lengths = list(ttfts_s)
            line = statistics.linear_regression(lengths, medians_s)
            if line.intercept < 0:  # attention bends it upwards: no negative times
                slope, intercept = statistics.linear_regression(lengths, medians_s, proportional=True).slope, 0.0
            elif line.slope >= 0:  # else noise around a flat line
                slope, intercept = line.slope, line.intercept
        return cls(ttft_s=intercept, ttft_s_per_prompt_token=slope, s_per_output_token=statistics.median(tpots_s))

    def alone_s(self, record: RequestRecord) -> float:
        """Service time alone: time to first token + output tokens x time per token."""
        ttft_s = self.ttft_s + self.ttft_s_per_prompt_token * record.prompt_tokens
        return ttft_s + self.s_per_output_token * record.output_tokens

    def check(self, measured: Sequence[RequestRecord]) -> dict[str, float]:
        """Relative errors of `alone_s` against other requests that ran one at a time: median size, and median with sign."""
        errors = []
        for record in measured:
            assert record.finish_s is not None, f"{record} did not finish alone"
            errors.append(self.alone_s(record) / (record.finish_s - record.arrival_s) - 1)
        return {
            "requests": len(errors),
            "median_error": statistics.median(map(abs, errors)),
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
    """Of the tenants' normalised service up to the moment when the first of them has nothing left to finish; 1 is equal.
    (After a run that serves everything the totals are the same for every policy.) One tenant: 1."""

    max_service_gap: float
    """Greatest difference of two tenants' normalised service over any interval in which both have requests that wait for
    their first token. One tenant: among the pairs that it is in."""

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
    own: dict[str, list[RequestRecord]] = defaultdict(list)
    for record in records:
        own[record.tenant].append(record)
    weight = {tenant: (weights or {}).get(tenant, 1.0) for tenant in sorted(own)}
    if bad := [tenant for tenant in weight if not weight[tenant] > 0]:
        raise ValueError(f"The weight of tenant {bad[0]} must be positive.")
    gaps, served = _fairness(own, weight, run_end_s)
    tenants = {
        tenant: _figures(own[tenant], calibration, run_end_s, jain_index=1.0, max_service_gap=gaps[tenant])
        for tenant in weight
    }
    jain, gap = jain_index(served), max(gaps.values())
    return _figures(records, calibration, run_end_s, jain_index=jain, max_service_gap=gap, tenants=tenants)


def _figures(records: Sequence[RequestRecord], calibration: Calibration, run_end_s: float, **fairness: Any) -> Figures:
    finishes_s = [_or(record.finish_s, run_end_s) for record in records]
    turnarounds = [
        (finish_s - record.arrival_s) / calibration.alone_s(record)
        for record, finish_s in zip(records, finishes_s, strict=True)
    ]
    ttfts_s = [_or(record.first_token_s, run_end_s) - record.arrival_s for record in records]
    tpots_s = [
        (finish_s - record.first_token_s) / (record.delivered_tokens - 1)
        for record, finish_s in zip(records, finishes_s, strict=True)
        if record.first_token_s is not None and record.delivered_tokens > 1
    ]
    span_s = max(finishes_s) - min(record.arrival_s for record in records)
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
        requests=len(records),
        unfinished=sum(record.finish_s is None for record in records),
        **fairness,
    )


def _fairness(
    own: Mapping[str, Sequence[RequestRecord]], weight: Mapping[str, float], run_end_s: float
) -> tuple[dict[str, float], list[float]]:
    """Per tenant its greatest gap, and its normalised service when the first tenant has nothing left to finish."""
    first_done_s = min(max(_or(record.finish_s, run_end_s) for record in own[tenant]) for tenant in weight)
    places, weights = {tenant: place for place, tenant in enumerate(weight)}, list(weight.values())
    gaps, served, rate, served_then = np.zeros((4, len(places)))
    waiting = np.zeros(len(places), dtype=int)
    # Per pair of tenants: the least difference of their services since both wait, and the greatest.
    least = np.full((len(places), len(places)), np.inf)
    most = -least
    last_s = 0.0
    events = sorted(event for records in own.values() for record in records for event in _events(record, run_end_s))
    for (at_s, _), moment in groupby(events, key=itemgetter(0, 1)):
        served += rate * (at_s - last_s)
        last_s = at_s
        for _, _, tenant, jump, rise, waits in moment:
            place = places[tenant]
            served[place] += jump / weights[place]
            rate[place] += rise / weights[place]
            waiting[place] += waits
            if waits < 0 and not waiting[place]:
                least[place], least[:, place], most[place], most[:, place] = np.inf, np.inf, -np.inf, -np.inf
        both = np.flatnonzero(waiting)
        if len(both) > 1:
            pairs = np.ix_(both, both)
            difference = served[both, None] - served[both]
            least[pairs] = low = np.minimum(least[pairs], difference)
            most[pairs] = high = np.maximum(most[pairs], difference)
            gaps[both] = np.maximum(gaps[both], (high - low).max(axis=1))
        if at_s == first_done_s:
            served_then = served.copy()
    return dict(zip(places, gaps.tolist(), strict=True)), served_then.tolist()


def _events(record: RequestRecord, run_end_s: float) -> Iterator[tuple[float, int, str, float, float, int]]:
    """(time, phase, tenant, jump of service, rise of its rate per second, change of the number that waits).

    Phases order what happens at one time: 0, arrivals, and the moment before a jump; 1, service; 2, the end of waiting.
    """
    first_s, finish_s = _or(record.first_token_s, run_end_s), _or(record.finish_s, run_end_s)
    jump = PROMPT_WEIGHT * record.prompt_tokens if record.delivered_tokens else 0.0
    output = OUTPUT_WEIGHT * record.delivered_tokens
    rate = output / (finish_s - first_s) if finish_s > first_s else 0.0
    yield record.arrival_s, 0, record.tenant, 0.0, 0.0, 1
    yield first_s, 0, record.tenant, 0.0, 0.0, 0
    yield first_s, 1, record.tenant, jump if rate else jump + output, rate, 0
    yield first_s, 2, record.tenant, 0.0, 0.0, -1
    yield finish_s, 1, record.tenant, 0.0, -rate, 0


def _or(at_s: float | None, run_end_s: float) -> float:
    return run_end_s if at_s is None else at_s


def quantile(values: Sequence[float], fraction: float) -> float:
    """The value below which that fraction lies, linear between neighbours (numpy's default)."""
    ordered = sorted(values)
    place = fraction * (len(ordered) - 1)
    low, high = math.floor(place), math.ceil(place)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def jain_index(values: Sequence[float]) -> float:
    """Jain's index: (sum)^2 / (n x sum of squares); 1 when all are equal, all zero included."""
    squares = sum(value**2 for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 1.0


def ratio_to_stock(runs: Sequence[Figures], stock: Sequence[Figures]) -> dict[str, dict[str, Any]]:
    """Per figure: ratio to stock of every repeat, their median, and `interval` of their logarithms."""
    ratios = {}
    for name in RATIO_FIGURES:
        ours, theirs = [getattr(run, name) for run in runs], [getattr(base, name) for base in stock]
        if all(ours) and all(theirs):
            ratios[name] = ratios_of(ours, theirs)
    return ratios


def ratios_to_stock(runs: Mapping[str, Sequence[Figures]], stock: str | None) -> dict[str, dict[str, dict[str, Any]]]:
    """`ratio_to_stock` of every arm but the one that is stock; empty where none is."""
    return {arm: ratio_to_stock(of, runs[stock]) for arm, of in runs.items() if stock is not None and arm != stock}


def ratios_of(values: Sequence[float], base: Sequence[float]) -> dict[str, Any]:
    """Ratio of every repeat, their median, and `interval` of their logarithms."""
    ratios = [ours / theirs for ours, theirs in zip(values, base, strict=True)]
    low, high = interval([math.log(ratio) for ratio in ratios]) or (None, None)
    return {
        "median": statistics.median(ratios),
        "low": None if low is None else math.exp(low),
        "high": None if high is None else math.exp(high),
        "repeats": ratios,
    }


def difference_to_stock(values: Sequence[float], stock: Sequence[float]) -> dict[str, Any]:
    """Difference to stock of every repeat, their median, and their `interval`."""
    differences = [ours - theirs for ours, theirs in zip(values, stock, strict=True)]
    low, high = interval(differences) or (None, None)
    return {"median": statistics.median(differences), "low": low, "high": high, "repeats": differences}


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Two-sided 95 % t-interval of the mean; None for fewer than two values."""
    if len(values) < 2:
        return None
    half = T_95[min(len(values) - 1, len(T_95)) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values) - half, statistics.fmean(values) + half


def table(report: Mapping[str, Any]) -> str:
    """Render a report for a terminal: medians over repeats; ratios to stock with their intervals."""
    width = max(12, *(len(policy) + 2 for policy in report["arms"]))

    def row(name: str, values: Sequence[float | None], width: int) -> str:
        return f"{name:<28}" + "".join(f"{'-' if one is None else format(one, '.4g'):>{width}}" for one in values)

    lines = [f"{'median of repeats':<28}" + "".join(f"{policy:>{width}}" for policy in report["arms"])]
    for name in (*RATIO_FIGURES, "preemptions", "swaps", "recomputes", "jain_index", "max_service_gap", "unfinished"):
        arms = [[repeat[name] for repeat in arm["repeats"]] for arm in report["arms"].values()]
        lines.append(row(name, [None if None in of else statistics.median(of) for of in arms], width))
    for policy, ratios in report["ratio_to_stock"].items():
        lines += ["", f"{f'{policy} / stock':<28}{'median':>12}{'95 % from':>12}{'to':>12}"]
        added = {}
        if (added_us := report.get("added_scheduler_us_per_step", {}).get(policy)) is not None:
            most = report["arms"][policy]["repeats"][0]["scheduler"]["most_running"]
            added = {f"added us/step, {most} running": added_us}
        for name, ratio in (ratios | added).items():
            lines.append(row(name, [ratio["median"], ratio["low"], ratio["high"]], 12))
    return "\n".join(lines)
