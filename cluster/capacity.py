"""How many replicas a workload needs so that conditions hold, and what that costs: `python -m cluster simulate --plan`.

Method: for each policy the smallest number of replicas whose simulated run meets all conditions, by doubling and bisection:
more replicas are taken to be no worse. Seconds carry the uncertainty of the step times that the simulation runs with.
"""

import argparse
import functools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.bench_command import until_interrupted
from cluster.bench_figures import Calibration, Figures, figures
from cluster.simulate import Arms, Outcome, few_tenants, run
from cluster.simulated_replica import ReplicaKind
from cost_service.traces import TraceRequest

MOST_REPLICAS = 1024
UNITS_S = {"": 1.0, "s": 1.0, "ms": 1e-3}
NAMES = {
    "ttft_p50": "ttft_s_p50", "ttft_p99": "ttft_s_p99", "tpot_p50": "tpot_s_p50", "tpot_p99": "tpot_s_p99",
    "weighted_turnaround_mean": "weighted_turnaround_mean", "weighted_turnaround_p99": "weighted_turnaround_p99",
}  # fmt: skip
"""What a condition may name, and the figure that it is."""


@dataclass(frozen=True, slots=True)
class Condition:
    """A figure must be below a limit."""

    name: str
    most: float

    def holds(self, one: Figures) -> bool:
        """Whether it is; a figure that nothing was measured for says nothing against it."""
        value = getattr(one, NAMES[self.name])
        return one.unfinished == 0 and (value is None or value < self.most)


def parse_conditions(text: str) -> list[Condition]:
    """Read `ttft_p99<2s,tpot_p99<50ms`.

    Raises:
        ValueError: Not of that form, or a figure that cannot be planned for.
    """
    conditions = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*([a-z0-9_]+)\s*<\s*([0-9.]+)\s*(s|ms|)\s*", part)
        if found is None or found[1] not in NAMES:
            raise ValueError(f"--plan must be such as 'ttft_p99<2s,tpot_p99<50ms', of {', '.join(NAMES)}: {part!r}.")
        try:
            most = float(found[2]) * UNITS_S[found[3]]
        except ValueError:
            raise ValueError(f"{found[2]!r} in --plan must be a number.") from None
        conditions.append(Condition(found[1], most))
    return conditions


def fewest(meets: Callable[[int], bool], most: int = MOST_REPLICAS) -> int | None:
    """The smallest number from 1 to `most` for which it is so, if it is so for all above it; None where it never is."""
    low, high = 0, 1  # `low` does not suffice
    while not meets(high):
        if high == most:
            return None
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if meets(middle) else (middle, high)
    return high


def plan(options: argparse.Namespace, arms: Arms) -> tuple[dict[str, Any], dict[str, Any]]:
    """Plan for each arm; return the report's part, and whether some arms are missing.

    Raises:
        ValueError: The conditions or the price are wrong.
    """
    conditions = parse_conditions(options.plan)
    if not 0 <= options.gpu_hour_price < math.inf:
        raise ValueError(f"--gpu-hour-price must be finite and not negative: it is {options.gpu_hour_price}.")
    planned, partial = until_interrupted({
        name: functools.partial(_planned, options, conditions, kind, arms, name) for name, kind in arms.kinds.items()
    })  # fmt: skip
    return {"conditions": options.plan, "gpu_hour_price": options.gpu_hour_price, "arms": planned}, partial


def _planned(
    options: argparse.Namespace, conditions: Sequence[Condition], kind: ReplicaKind, arms: Arms, name: str
) -> dict[str, Any]:
    done: dict[int, tuple[Outcome, Figures]] = {}

    def meets(num: int) -> bool:
        done[num] = _run(options, kind, arms.requests, arms.calibration, f"{name} on {num} replicas", num)
        return all(condition.holds(done[num][1]) for condition in conditions)

    num = fewest(meets)
    if num is None:
        return {"replicas": None}
    outcome, one = done[num]
    hours = num * (outcome.end_s - arms.requests[0].arrival_s) / 3600.0
    delivered = sum(record.delivered_tokens for record in outcome.records)
    return {
        "replicas": num,
        "host_gib_per_replica": outcome.most_host_bytes / (1 << 30),
        "gpu_hours": hours,
        "price_per_million_tokens": options.gpu_hour_price * hours / (delivered / 1e6),
        **{figure: getattr(one, figure) for figure in (*NAMES.values(), "throughput_tokens_per_s", "preemptions")},
    }


def _run(
    options: argparse.Namespace,
    kind: ReplicaKind,
    requests: Sequence[TraceRequest],
    calibration: Calibration,
    name: str,
    num_replicas: int,
) -> tuple[Outcome, Figures]:
    outcome = run(argparse.Namespace(**vars(options) | {"replicas": num_replicas}), kind, requests, name)
    return outcome, figures(few_tenants(outcome.records), calibration, run_end_s=outcome.end_s)


def table(report: dict[str, Any]) -> str:
    """Render a plan for a terminal."""
    names = ("replicas", "host_gib_per_replica", "gpu_hours", "price_per_million_tokens", "ttft_s_p99", "preemptions")
    lines = [f"SIMULATED: replicas for {report['conditions']}", f"{'':<24}" + "".join(f"{name:>26}" for name in names)]
    for arm, one in report["arms"].items():
        cells = (
            ["never"]
            if one["replicas"] is None
            else [f"{one[name]:.4g}" if one[name] is not None else "-" for name in names]
        )
        lines.append(f"{arm:<24}" + "".join(f"{cell:>26}" for cell in cells))
    return "\n".join(lines)
