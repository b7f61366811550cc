"""`python -m cluster status`: what every replica of a running application last reported.

Rule: it asks the replicas, not the engines; a replica answers from its engine's last report and never waits for a step.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

COLUMNS = (
    ("replica", 12), ("policy", 10), ("running", 8), ("waiting", 8), ("kv used", 8), ("swaps", 8), ("recomputes", 11),
    ("host pool", 12), ("tokens/s", 9), ("age s", 6),
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--watch", action="store_true", help="refresh until Ctrl-C")
    parser.add_argument("--interval-s", type=float, default=1.0, help="seconds between two looks (default: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE (- for standard output)")
    parser.add_argument("--address", default="auto", help="Ray cluster (default: the one on this machine)")


def main(options: argparse.Namespace) -> int:
    """Print the table; 0, or 2 with one sentence when there is nothing to ask."""
    if options.interval_s <= 0:
        print("Error: --interval-s must be above 0.", file=sys.stderr)
        return 2
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    import ray

    try:
        ray.init(address=options.address, namespace="serve", log_to_driver=False, configure_logging=False)
    except (ConnectionError, RuntimeError, ValueError):
        print("Error: no Ray cluster answers: start one with `make serve`, or give --address.", file=sys.stderr)
        return 2
    try:
        return _show(options)
    except KeyboardInterrupt:
        return 0
    finally:
        ray.shutdown()


def _show(options: argparse.Namespace) -> int:
    before = fetch()
    if not before:
        print("Error: no application of ours is running: start one with `make serve`.", file=sys.stderr)
        return 2
    while True:
        # A rate takes two looks.
        time.sleep(options.interval_s)
        now = fetch()
        rows = [summarise(replica, before.get(name)) for name, replica in sorted(now.items())]
        if options.json is None:
            if options.watch:
                print("\033[2J\033[H", end="")
            print(table(rows), flush=True)
        else:
            text = json.dumps({"replicas": rows}, indent=2)
            print(text) if str(options.json) == "-" else options.json.write_text(text + "\n")
        if not options.watch:
            return 0
        before = now


def fetch() -> dict[str, dict[str, Any]]:
    """Ask all replicas of all our applications; replica name to its status, with the time of the look."""
    from ray import serve

    found = {}
    for application, status in serve.status().applications.items():
        for deployment in status.deployments:
            if not deployment.startswith("AdaptiveLLMServer:"):
                continue
            handle = serve.get_deployment_handle(deployment, application)
            for answer in handle.broadcast("status").results(timeout_s=10):
                found[answer["replica"]] = {**answer, "application": application, "seen_s": time.monotonic()}
    return found


def summarise(now: dict[str, Any], before: dict[str, Any] | None) -> dict[str, Any]:
    """Figures of one replica; `tokens_per_s` since the look before, 0 where there was none in this life of the engine."""
    totals = now["totals"]
    row: dict[str, Any] = {key: now[key] for key in ("application", "replica", "pid", "age_s")}
    if totals is None:
        return row | {"tokens_per_s": 0.0}
    used = totals["num_kv_blocks"] - totals["num_free_kv_blocks"]
    rate = 0.0
    if before and before["totals"] and before["totals"]["epoch"] == totals["epoch"]:
        tokens = totals["output_tokens"] - before["totals"]["output_tokens"]
        rate = tokens / (now["seen_s"] - before["seen_s"])
    return row | totals | {"kv_used_fraction": round(used / totals["num_kv_blocks"], 4), "tokens_per_s": round(rate, 1)}


def table(rows: list[dict[str, Any]]) -> str:
    """Render the rows for a terminal."""
    lines = ["".join(name.rjust(width) for name, width in COLUMNS)]
    for row in rows:
        if "epoch" not in row:
            cells = [row["replica"][-10:], "-", "0", "0", "0 %", "0", "0", "-", "0", "-"]
        else:
            cells = [
                row["replica"][-10:], row["preemption"], row["num_running"], row["num_waiting"],
                f"{100 * row['kv_used_fraction']:.0f} %", row["swaps"], row["recomputes"],
                f"{row['num_used_host_slots']}/{row['num_host_slots']}", row["tokens_per_s"], f"{row['age_s']:.1f}",
            ]  # fmt: skip
        lines.append("".join(str(cell).rjust(width) for cell, (_, width) in zip(cells, COLUMNS, strict=True)))
    return "\n".join(lines)
