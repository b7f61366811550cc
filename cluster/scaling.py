"""How many replicas there are, are to be, and why: what `status` says of scaling (pure).

Rule: what the load asks for is what the policy makes of the replicas' last reports (`global_scheduler.autoscaling.demand`).
When the number changes, the policy says so in the controller's log, cool-downs among the reasons.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from cost_service.service_messages import AutoscalingStats
from global_scheduler.autoscaling import AutoscalerSettings, Observed, demand
from replicas.messages import EngineTotals


def scaling_rows(
    deployments: Sequence[Mapping[str, Any]], now: Mapping[str, Mapping[str, Any]],
    before: Mapping[str, Mapping[str, Any]],
) -> list[dict[str, Any]]:  # fmt: skip
    """Return one row per deployment of ours.

    Args:
        deployments: As `cluster.running.ask_deployments` returns them.
        now: By replica, what it said (`AdaptiveLLMServer.status`) and when; so before, for rates.
    """
    rows = []
    for one in deployments:
        states = Counter(str(state).lower() for state in one["states"])
        row: dict[str, Any] = {
            "application": one["application"], "deployment": one["deployment"], "wanted": one["target"],
            "running": states.pop("running", 0), "others": dict(sorted(states.items())),
        }  # fmt: skip
        if one["autoscaling"] is not None:
            row |= _asked(one, row["running"], now, before)
        rows.append(row)
    return rows


def scaling_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Render the rows for a terminal."""
    lines = []
    for row in rows:
        others = "".join(f", {num} {state}" for state, num in row["others"].items())
        line = f"{row['deployment']}: {row['running']} replicas running{others}, {row['wanted']} wanted"
        if "asked" in row:
            line += f"; {row['least']} to {row['most']} are allowed, the load asks for {row['asked']}: {row['why']}"
        lines.append(line + ".")
    return "\n".join(lines)


def _asked(
    one: Mapping[str, Any], num_running: int, now: Mapping[str, Mapping[str, Any]],
    before: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:  # fmt: skip
    """What the load asks for, and why."""
    settings = AutoscalerSettings(**one["autoscaling"])
    seen = [
        _observed(each, before.get(name)) for name, each in now.items() if each["application"] == one["application"]
    ]
    heard = [each for each in seen if not each.is_silent(settings.max_report_age_s)]
    limits = {"least": settings.min_replicas, "most": settings.max_replicas}
    if not heard:
        return limits | {"asked": one["target"], "why": "no replica says how full it is"}
    asked = demand(heard, num_running=max(num_running, len(heard)), settings=settings)
    return limits | {"asked": asked.num_replicas, "why": asked.why}


def _observed(now: Mapping[str, Any], before: Mapping[str, Any] | None) -> Observed:
    """A replica as its status says; one that has said nothing yet has nothing to do."""
    totals = now["totals"]
    if totals is None:
        return Observed(stats=AutoscalingStats())
    stats = msgspec.convert(totals, EngineTotals).autoscaling(now["age_s"])
    rate = 0.0
    if before and before["totals"] and before["totals"]["epoch"] == totals["epoch"]:
        num_before = before["totals"]["swaps"] + before["totals"]["recomputes"]
        rate = (stats.preemptions - num_before) / max(1e-3, now["seen_s"] - before["seen_s"])
    return Observed(stats=stats, preemptions_per_s=rate)
