"""`python -m cluster status`: what every replica of a running application last reported, and what tenants were served.

Rules:
- It asks the replicas, not the engines; a replica answers from its engine's last report and never waits for a step.
- It asks the fairness actor for tenants; one that is away is said, and the replicas are shown all the same.
- `--watch` goes on whatever is away: on a terminal a picture that is redrawn in its place (`cluster.live_view`), else a line
  for every look.
"""

import argparse
import shutil
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, NoReturn

from cluster.live_view import LiveView, Look, blocks_for, plain_line, redrawn
from cluster.running import ask_actor, ask_deployments, ask_replicas, connected, not_running
from cluster.scaling import scaling_rows, scaling_text
from cost_service.result_file import write_json
from cost_service.service import ACTOR as COST_ACTOR
from cost_service.service_messages import ACTOR as FAIRNESS_ACTOR
from cost_service.tenant_labels import UNNAMED

COLUMNS = (
    ("replica", 12), ("policy", 20), ("admission", 12), ("running", 8), ("waiting", 8), ("kv used", 8), ("swaps", 8),
    ("recomputes", 11), ("host pool", 12), ("tokens/s", 9), ("age s", 6),
)  # fmt: skip
TENANT_COLUMNS = (("tenant", 32), ("service", 14), ("share", 8), ("waiting", 8), ("weight", 8), ("turnaround", 12))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--watch", action="store_true", help="look again until Ctrl-C, with curves on a terminal")
    parser.add_argument("--interval-s", type=float, default=1.0, help="seconds between two looks (default: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE (- for standard output)")
    parser.add_argument("--address", default="auto", help="Ray cluster (default: the one on this machine)")


def main(options: argparse.Namespace) -> int:
    """Print the table; 0, or 2 with one sentence when there is nothing to ask."""
    if options.interval_s <= 0:
        print("Error: --interval-s must be above 0.", file=sys.stderr)
        return 2
    try:
        with connected(options.address):
            return _show(options)
    except LookupError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0


def _show(options: argparse.Namespace) -> int:
    if options.watch and options.json is None:
        _watch(options.interval_s)
    before = fetch()
    while True:
        # A rate takes two looks.
        time.sleep(options.interval_s)
        now = fetch()
        rows, fairness, scaling = (
            summarise_all(now, before),
            with_turnarounds(fetch_fairness(), now),
            scaling_rows(ask_deployments(), now, before),
        )
        if options.json is None:
            print(scaling_text(scaling) + "\n\n" + table(rows) + "\n\n" + fairness_table(fairness), flush=True)
        else:
            write_json({"scaling": scaling, "replicas": rows, "fairness": fairness}, options.json)
        if not options.watch:
            return 0
        before = now


def _watch(interval_s: float) -> NoReturn:
    view, before = LiveView(blocks=blocks_for(sys.stdout.encoding)), fetch_what_answers()[0]
    while True:
        time.sleep(interval_s)
        now, away = fetch_what_answers()
        rows, fairness = summarise_all(now, before), with_turnarounds(fetch_fairness(), now)
        look, at = Look.of(rows, fairness, away), time.strftime("%H:%M:%S")
        if sys.stdout.isatty():
            view.add(look)
            width, height = shutil.get_terminal_size()
            scaling = scaling_text(scaling_rows(_deployments(), now, before))
            text = "\n\n".join(part for part in (scaling, table(rows), fairness_table(fairness)) if part)
            lines = view.frame(text, time=at, width=width, height=height)
            print(redrawn(lines), end="", flush=True)
        else:
            print(plain_line(look, time=at), flush=True)
        before = now or before


def _deployments() -> list[dict[str, Any]]:
    """What Serve says of deployments; nothing while it is away, which the view says by other means."""
    try:
        return ask_deployments()
    except LookupError:
        return []


def fetch_what_answers() -> tuple[dict[str, dict[str, Any]], list[str]]:
    """What `fetch` returns, nothing where it would fail, and a sentence for each part that is away."""
    now, away = {}, []
    try:
        away += not_running()
        now = fetch()
    except LookupError as error:
        away.append(f"Replicas: {error}")
    try:
        ask_actor(COST_ACTOR, "status")
    except LookupError as error:
        away.append(f"Costs: {error}")
    return now, away


def summarise_all(now: dict[str, dict[str, Any]], before: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Figures of all replicas, in the order of their names."""
    return [summarise(replica, before.get(name)) for name, replica in sorted(now.items())]


def fetch() -> dict[str, dict[str, Any]]:
    """Replica name to its status."""
    return {answer["replica"]: answer for answer in ask_replicas("status")}


def fetch_fairness() -> dict[str, Any]:
    """What the fairness actor knows (`FairnessService.status`), or why it does not say."""
    try:
        status: dict[str, Any] = ask_actor(FAIRNESS_ACTOR, "status")
    except LookupError as error:
        return {"away": str(error)}
    return status


def with_turnarounds(fairness: dict[str, Any], now: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The same with `weighted_turnaround` for each tenant: the mean over the last requests that ended at a pool's replicas;
    None where none has, or where tenants without a label of their own share one."""
    if "away" in fairness:
        return fairness
    pools = {}
    for name, pool in fairness["pools"].items():
        num: Counter[str] = Counter()
        total: defaultdict[str, float] = defaultdict(float)
        for replica in pool["replicas"]:
            for label, mean in now.get(replica, {}).get("turnarounds", {}).items():
                num[label] += mean["num"]
                total[label] += mean["num"] * mean["weighted_turnaround"]
        labels = [tenant["tenant"] or UNNAMED for tenant in pool["tenants"]]
        means = [round(total[label] / num[label], 3) if num[label] else None for label in labels]
        tenants = [tenant | {"weighted_turnaround": mean} for tenant, mean in zip(pool["tenants"], means, strict=True)]
        pools[name] = pool | {"tenants": tenants}
    return fairness | {"pools": pools}


def summarise(now: dict[str, Any], before: dict[str, Any] | None) -> dict[str, Any]:
    """Figures of one replica; `tokens_per_s` and `new_preemptions` since the look before, 0 where there was none in this
    life of the engine."""
    totals = now["totals"]
    row: dict[str, Any] = {key: now[key] for key in ("application", "replica", "pid", "age_s")}
    if totals is None:
        return row | {"tokens_per_s": 0.0, "new_preemptions": 0}
    used = totals["num_kv_blocks"] - totals["num_free_kv_blocks"]
    rate, new_preemptions = 0.0, 0
    if before and before["totals"] and before["totals"]["epoch"] == totals["epoch"]:
        new = {key: totals[key] - before["totals"][key] for key in ("output_tokens", "swaps", "recomputes")}
        rate = new["output_tokens"] / (now["seen_s"] - before["seen_s"])
        new_preemptions = new["swaps"] + new["recomputes"]
    figures = {"kv_used_fraction": round(used / totals["num_kv_blocks"], 4), "tokens_per_s": round(rate, 1)}
    return row | totals | figures | {"new_preemptions": new_preemptions}


def table(rows: list[dict[str, Any]]) -> str:
    """Render the rows for a terminal."""
    lines = ["".join(name.rjust(width) for name, width in COLUMNS)]
    for row in rows:
        if "epoch" not in row:
            cells = [row["replica"][-10:], "-", "-", "0", "0", "0 %", "0", "0", "-", "0", "-"]
        else:
            cells = [
                row["replica"][-10:], row["preemption"] + (" (guarded)" if row["guarded"] else ""),
                row["admission"], row["num_running"], row["num_waiting"],
                f"{100 * row['kv_used_fraction']:.0f} %", row["swaps"], row["recomputes"],
                f"{row['num_used_host_slots']}/{row['num_host_slots']}", row["tokens_per_s"], f"{row['age_s']:.1f}",
            ]  # fmt: skip
        lines.append("".join(str(cell).rjust(width) for cell, (_, width) in zip(cells, COLUMNS, strict=True)))
    return "\n".join(lines)


def fairness_table(fairness: dict[str, Any]) -> str:
    """Render what the fairness actor says for a terminal."""
    if "away" in fairness:
        return f"Fairness: {fairness['away']} Engines are fair by what they know themselves."
    lines = []
    for name, pool in fairness["pools"].items():
        if pool["gap"] is None:
            lines.append(f"{name}: {len(pool['replicas'])} replicas; no bound is stated.")
        else:
            lines.append(
                f"{name}: {len(pool['replicas'])} replicas; gap {pool['gap']:.0f}, bound {pool['bound']:.0f},"
                f" gap/bound {pool['gap_of_bound']:.3f}"
            )
        lines.append("".join(title.rjust(width) for title, width in TENANT_COLUMNS))
        for tenant in pool["tenants"]:
            turnaround = tenant.get("weighted_turnaround")
            cells = [
                tenant["tenant"][-30:] or "(none)", f"{tenant['service']:.0f}", f"{tenant['share']:.0%}",
                tenant["waiting"], f"{tenant['weight']:g}", "-" if turnaround is None else f"{turnaround:.2f}",
            ]  # fmt: skip
            lines.append(
                "".join(str(cell).rjust(width) for cell, (_, width) in zip(cells, TENANT_COLUMNS, strict=True))
            )
    return "\n".join(lines) or "Fairness: no replica has reported yet."
