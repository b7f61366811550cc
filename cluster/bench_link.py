"""`python -m cluster bench-link`: preemption policies over simulated host links from far too slow to very fast.

On CPU a copy to host memory costs next to nothing, so swapping would always win; the throttled link of the connector makes
the trade-off of a GPU visible. Speeds are given as multiples of the measured break-even: KV bytes per token / seconds to
recompute a token. All figures are of a SIMULATED link around a real engine, and the report says so.
"""

import argparse
import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cluster import bench, bench_runs, models
from cluster.bench_arm import STOCK, Arm
from cluster.bench_command import machine_facts, run_command
from cluster.bench_figures import Calibration, Figures, figures, ratios_of
from cluster.records import RunResult
from cost_service.analytic import analytic_snapshot
from cost_service.hardware import CPU
from cost_service.kv_memory import ELEMENT_BYTES, kv_token_bytes
from cost_service.model_shape import ModelShape
from cost_service.snapshot import CostSnapshot

FIXED = ("recompute", "swap")
ADAPTIVE = "adaptive"
ARMS = (STOCK, *FIXED, ADAPTIVE)
SPEEDS = "0.1,0.3,1,3,10,100"
TRACE = "synthetic:requests=200,rate=inf,prompt_mean=80,prompt_max=300,output_mean=150,output_max=300,spread=0.5"
"""Requests that grow a lot while they run, all at once: memory is short all the time, and preemptions are many."""

FIGURES = ("throughput_tokens_per_s", "weighted_turnaround_mean")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    bench.add_engine_arguments(parser)
    parser.set_defaults(policy=",".join(ARMS), random_model="small", trace=TRACE)
    parser.add_argument("--speeds", default=SPEEDS, help=f"multiples of the break-even (default: {SPEEDS})")
    parser.add_argument("--costs-wrong-by", type=float, default=1.0, help="factor on the recompute costs it is told")
    parser.add_argument("--link-wrong-by", type=float, default=1.0, help="factor on the link's speed that it is told")
    parser.add_argument("--no-guard", action="store_true", help="let wrong costs have their way")


def main(options: argparse.Namespace) -> int:
    """Measure; exit statuses as `python -m cluster bench`."""
    return run_command(options, lambda scratch, say: sweep(options, scratch, say), table, described=bench.described)


def sweep(options: argparse.Namespace, scratch: Path, say: bench_runs.Say) -> dict[str, Any]:
    """Measure every speed; return the report.

    Raises:
        ValueError: An option is wrong.
        RuntimeError: An engine failed.
    """
    speeds = parse_speeds(options.speeds)
    plan = bench.plan_of(options, scratch)
    with Arm(plan.engine, scratch / "alone.log") as alone:
        say("Calibrating on an idle stock engine ...")
        calibration, check = bench_runs.calibrate(plan.workloads[0], bench_runs.alone_on(alone, limit_s=plan.limit_s))
        demand = statistics.median(
            bench_runs.run_ample(plan, alone, workload).peak_kv_blocks for workload in plan.workloads
        )
    num_blocks = plan.pool_blocks(demand)
    config = models.read_config(Path(plan.engine.model))
    kv_bytes = kv_token_bytes(ModelShape.from_config(config), element_bytes=ELEMENT_BYTES[plan.engine.dtype])
    break_even = kv_bytes / calibration.ttft_s_per_prompt_token
    say(f"  {kv_bytes} bytes of KV and {calibration.ttft_s_per_prompt_token * 1e6:.1f} us per token: break-even at "
        f"{break_even / 1e6:.1f} MB/s; {num_blocks} of {demand:.0f} blocks")  # fmt: skip
    results: dict[str, Any] = {}
    predictions: list[float] = []
    for speed in speeds:
        say(f"Link at {speed:g} times the break-even")
        link = speed * break_even
        costs = snapshot(config, calibration, kv_bytes * plan.engine.block_size, plan.engine.block_size)
        costs = mistaken(costs, options, kv_bytes * plan.engine.block_size / link)
        swap = {"throttled_link_bytes_per_s": link, "cost_snapshot": costs.to_json(), "guard": not options.no_guard}
        arms = replace(plan, engine=replace(plan.engine, swap=swap, learn=False))
        folder = scratch / f"{speed:g}"
        folder.mkdir()
        runs = bench_runs.run_arms(arms, folder, num_blocks, say)
        results[f"{speed:g}"] = {"link_bytes_per_s": link, **compare(runs, calibration)}
        if "recompute" in runs:
            needed = [link_bytes_per_s(result, kv_bytes) for result in runs["recompute"]]
            predictions.append(statistics.median(needed) / break_even)
    return {
        "benchmark": "link",
        "link": "SIMULATED: a throttle around real copies and a real engine",
        "machine": machine_facts(),
        "settings": plan.as_report() | {"demand_kv_blocks": demand, "num_kv_blocks": num_blocks,
                                        "costs_wrong_by": options.costs_wrong_by,
                                        "link_wrong_by": options.link_wrong_by, "guard": not options.no_guard},
        "calibration": asdict(calibration) | {"check": check},
        "break_even_bytes_per_s": break_even,
        "crossover": {
            "predicted": statistics.median(predictions) if predictions else None, "found": crossover(results),
        },
        "speeds": results,
    }  # fmt: skip


def link_bytes_per_s(result: RunResult, kv_bytes: int) -> float:
    """What a link would have to carry in each direction, were all recomputed tokens of this run swapped instead.

    Transfers run beside the engine, so that swapping wins from the speed on at which the link keeps up with that.
    """
    needed = sum(record.prompt_tokens + record.output_tokens - 1 for record in result.records)
    return max(0, result.computed_tokens - needed) * kv_bytes / result.run_end_s


def crossover(results: dict[str, Any]) -> float | None:
    """Multiple of the break-even at which swapping begins to win over recomputing, between two measured speeds."""
    points = [
        (math.log(float(speed)), result["ratios"]["throughput_tokens_per_s"]["swap/recompute"]["median"] - 1)
        for speed, result in sorted(results.items(), key=lambda item: float(item[0]))
        if "swap/recompute" in result["ratios"]["throughput_tokens_per_s"]
    ]
    for (x, below), (next_x, above) in itertools.pairwise(points):
        if below < 0 <= above:
            return math.exp(x + (next_x - x) * below / (below - above))
    return None


def mistaken(costs: CostSnapshot, options: argparse.Namespace, block_s: float) -> CostSnapshot:
    """The costs that the arms are told, which the options may have made wrong."""
    wrong = options.costs_wrong_by
    costs = replace(costs, token_s=costs.token_s * wrong, recompute_fixed_s=costs.recompute_fixed_s * wrong)
    if options.link_wrong_by != 1:
        # As if learned: the engine puts the throttle's true speed into analytic costs.
        told_s = block_s / options.link_wrong_by
        costs = replace(costs, version=1, link_out_block_s=told_s, link_in_block_s=told_s)
    return costs


def parse_speeds(text: str) -> list[float]:
    """Read `--speeds`.

    Raises:
        ValueError: Not numbers above 0.
    """
    try:
        speeds = [float(part) for part in text.split(",")]
    except ValueError:
        speeds = []
    if not speeds or not all(0 < speed < math.inf for speed in speeds):
        raise ValueError("--speeds must be numbers above 0, such as 0.1,1,10.")
    return speeds


def snapshot(config: dict[str, Any], calibration: Calibration, block_bytes: int, block_size: int) -> CostSnapshot:
    """The analytic costs with what the calibration has measured: time per token, and of a prefill of no tokens."""
    analytic = analytic_snapshot(
        ModelShape.from_config(config), CPU, model="", parallelism=1, block_size=block_size,
        block_bytes=block_bytes,
    )  # fmt: skip
    return replace(
        analytic,
        ridge_tokens=0.0,
        recompute_fixed_s=max(0.0, calibration.ttft_s - calibration.s_per_output_token),
        token_s=calibration.ttft_s_per_prompt_token,
        attention_s=0.0,
    )


def compare(runs: dict[str, list[RunResult]], calibration: Calibration) -> dict[str, Any]:
    """Figures of every arm, and each ratio to the best fixed policy (the one with the better median)."""
    by_arm = {
        policy: [figures(result.records, calibration, run_end_s=result.run_end_s) for result in results]
        for policy, results in runs.items()
    }
    report: dict[str, Any] = {"arms": {policy: medians(repeats) for policy, repeats in by_arm.items()}, "ratios": {}}
    for policy, results in runs.items():
        shares = [result.scheduler["guarded_steps"] / result.scheduler["steps"] for result in results]
        report["arms"][policy]["guarded_share"] = statistics.fmean(shares)
    fixed = [policy for policy in FIXED if policy in by_arm]
    for name in FIGURES:
        better = max if name == "throughput_tokens_per_s" else min
        pairs = {policy: (policy,) for policy in fixed if ADAPTIVE in by_arm}
        if pairs:
            best = better(fixed, key=lambda policy: report["arms"][policy][name])
            pairs["best_fixed"] = (best,)
        if STOCK in by_arm and ADAPTIVE in by_arm:
            pairs[STOCK] = (STOCK,)
        report["ratios"][name] = {
            f"adaptive/{label}": ratios_of(column(by_arm[ADAPTIVE], name), column(by_arm[base], name))
            for label, (base,) in pairs.items()
        }
        if set(FIXED) <= set(by_arm):
            report["ratios"][name]["swap/recompute"] = ratios_of(
                column(by_arm["swap"], name), column(by_arm["recompute"], name)
            )
    return report


def medians(repeats: Sequence[Figures]) -> dict[str, float]:
    """Medians over the repeats of what the table shows."""
    names = (*FIGURES, "preemptions", "swaps", "recomputes", "unfinished")
    return {name: statistics.median(column(repeats, name)) for name in names}


def column(repeats: Sequence[Figures], name: str) -> list[float]:
    """One figure of every repeat."""
    return [float(getattr(one, name)) for one in repeats]


def table(report: dict[str, Any]) -> str:
    """Render the report for a terminal."""
    lines = [f"Link {report['link']}; break-even {report['break_even_bytes_per_s'] / 1e6:.1f} MB/s"]
    told = (f"{value:.2f} ({name})" for name, value in report["crossover"].items() if value is not None)
    lines.append(f"Swapping begins to win at a speed of {' '.join(told) or '-'}")
    lines.append(f"{'speed':>6} {'arm':<10}{'tokens/s':>10}{'wta':>9}{'preempt':>9}{'swaps':>8}{'guarded':>9}")
    for speed, result in report["speeds"].items():
        for arm, one in result["arms"].items():
            lines.append(
                f"{speed:>6} {arm:<10}{one['throughput_tokens_per_s']:>10.0f}{one['weighted_turnaround_mean']:>9.2f}"
                f"{one['preemptions']:>9.0f}{one['swaps']:>8.0f}{one['guarded_share']:>9.1%}"
            )
        for name, ratios in result["ratios"].items():
            for label, ratio in ratios.items():
                span = "" if ratio["low"] is None else f" ({ratio['low']:.3f} to {ratio['high']:.3f})"
                lines.append(f"{speed:>6} {name} {label}: {ratio['median']:.3f}{span}")
    return "\n".join(lines)
