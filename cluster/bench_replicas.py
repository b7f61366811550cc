"""`python -m cluster bench-replicas`: fairness across several real engines, with the cluster's counters and without.

Rules:
- Every arm is a group of engines (`cluster.serve_group`) that serves the same requests, in interleaved repeats. A tenant's
  requests go to the replicas in turns, or to some of them alone (`--pin`): that is the skew that no replica sees by itself.
- Arms under fair admission exchange with the real fairness actor. `--also-alone` adds the same engines without it.
- Figures are those of `bench`, over the requests of all replicas; beside them each tenant's share of the service while all
  wait at all their replicas, and each tenant's figures against vLLM's own arm.
- A run that ends at `--limit-s` leaves requests unfinished: for experiments in which everybody waits all the time.
"""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cluster import bench
from cluster.bench_arm import EngineSettings
from cluster.bench_command import command_line, machine_facts, run_command
from cluster.bench_figures import INTERVAL, Calibration, Figures, figures, ratios_of, ratios_to_stock, table
from cluster.bench_progress import Progress
from cluster.bench_runs import Plan, Say, in_turns, measure_alone, runs_of
from cluster.prompts import RequestSpec
from cluster.records import RequestRecord, RunResult
from cluster.serve_group import EngineGroup, cluster_actors
from cluster.service_curve import shares_while_all_wait
from replicas.fair_queue import Admission

TRACE = "synthetic:tenant=f,rate=60,duration=40/tenant=g,rate=30,duration=40"
ALONE = "alone"
"""What arms are called after whose engines are fair by what they know themselves."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    bench.add_engine_arguments(parser)
    parser.set_defaults(policy="stock,adaptive", admission="first-come,fair", random_model="small", trace=TRACE)
    parser.add_argument("--replicas", type=int, default=2, help="engines of an arm (default: 2)")
    parser.add_argument(
        "--pin", action="append", default=[], metavar="TENANT=I,J", help="replicas, from 0, that a tenant may use"
    )
    parser.add_argument(
        "--also-alone", action="store_true", help="fair arms also without the cluster's counters, for comparison"
    )


def main(options: argparse.Namespace) -> int:
    """Measure; exit statuses as `python -m cluster bench`."""
    return run_command(
        options, lambda scratch, say: compare(options, scratch, say), rendered, described=bench.described
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupArm:
    """Engines of one arm."""

    settings: EngineSettings
    joined: bool


def compare(options: argparse.Namespace, scratch: Path, say: Say) -> dict[str, Any]:
    """Run all arms; return the report.

    Raises:
        ValueError: An option is wrong.
        RuntimeError: An engine failed.
    """
    pins = parse_pins(options.pin, options.replicas)
    plan = bench.plan_of(options, scratch)
    if strangers := sorted(pins.keys() - {request.tenant for of in plan.workloads for request in of}):
        raise ValueError(f"--pin names {strangers[0]!r}, of whom there is no request: name a tenant of the workload.")
    machine, alone = machine_facts(), measure_alone(plan, scratch, say)
    demand = statistics.median(RunResult.of(one).peak_kv_blocks for one in alone["ample"])
    num_blocks = plan.pool_blocks(demand)
    arms = arms_of(plan, num_blocks, num_replicas=options.replicas, also_alone=options.also_alone)
    placed = [place(requests, options.replicas, pins) for requests in plan.workloads]
    progress, names = Progress(None, None), tuple(arms)
    with cluster_actors(scratch), ExitStack() as stack:
        groups = {}
        for name, arm in arms.items():
            say(f"Starting the {options.replicas} engines of {name} ...")
            groups[name] = stack.enter_context(
                EngineGroup(name, arm.settings, options.replicas, scratch, joined=arm.joined)
            )
        for name, group in groups.items():
            say(f"Warming up {name} ...")
            group.run(placed[0], limit_s=plan.warm_up_s)

        def run(repeat: int, name: str) -> dict[str, Any]:
            return merged(groups[name].run(placed[repeat], limit_s=plan.limit_s), plan.workload.weights())

        in_turns(names, len(placed), run, say, progress)
    runs = runs_of(names, len(placed), progress)
    report = {
        "benchmark": "replicas",
        "command": command_line(),
        "machine": machine | alone["versions"],
        "settings": plan.as_report() | {"replicas": options.replicas, "pins": {name: list(of) for name, of in pins.items()},
                                        "demand_kv_blocks": demand, "num_kv_blocks": num_blocks},
        "calibration": alone["calibration"] | {"check": alone["check"]},
        "interval": INTERVAL,
    }  # fmt: skip
    return report | judged(plan, runs, Calibration(**alone["calibration"]))


def parse_pins(texts: Sequence[str], num_replicas: int) -> dict[str, tuple[int, ...]]:
    """Read `--pin`.

    Raises:
        ValueError: One is no `TENANT=I,J` with numbers of replicas, or there is no replica.
    """
    if num_replicas < 1:
        raise ValueError(f"--replicas must be at least 1: it is {num_replicas}.")
    pins = {}
    for text in texts:
        tenant, _, numbers = text.rpartition("=")
        replicas = [int(number) if number.isdecimal() else -1 for number in numbers.split(",")]
        if not tenant or not all(0 <= number < num_replicas for number in replicas):
            raise ValueError(f"--pin {text!r} must be TENANT=I,J with replicas from 0 to {num_replicas - 1}.")
        pins[tenant] = tuple(dict.fromkeys(replicas))
    return pins


def arms_of(plan: Plan, num_blocks: int, *, num_replicas: int, also_alone: bool) -> dict[str, GroupArm]:
    """All arms by their names."""
    arms = {}
    num_fair = sum(settings.admission == Admission.FAIR for settings in plan.arms.values())
    share = 1 / (num_replicas * (len(plan.arms) + (num_fair if also_alone else 0)))
    for name, settings in plan.arms.items():
        settings = replace(settings, num_kv_blocks=num_blocks, memory_share=share)
        is_fair = settings.admission == Admission.FAIR
        arms[name] = GroupArm(settings=settings, joined=is_fair)
        if is_fair and also_alone:
            arms[f"{name} {ALONE}"] = GroupArm(settings=settings, joined=False)
    return arms


def place(
    requests: Sequence[RequestSpec], num_replicas: int, pins: Mapping[str, Sequence[int]]
) -> list[list[RequestSpec]]:
    """Each replica's part of the requests: those of a tenant in turns over the replicas that it may use."""
    parts: list[list[RequestSpec]] = [[] for _ in range(num_replicas)]
    num_placed: dict[str, int] = {}
    for request in sorted(requests, key=lambda one: one.arrival_s):
        allowed = pins.get(request.tenant, range(num_replicas))
        turn = num_placed.get(request.tenant, 0)
        num_placed[request.tenant] = turn + 1
        parts[allowed[turn % len(allowed)]].append(request)
    return parts


def merged(results: Sequence[RunResult], weights: Mapping[str, float]) -> dict[str, Any]:
    """One run of all replicas, as JSON has it."""
    return {
        "records": [asdict(record) for result in results for record in result.records],
        "run_end_s": max(result.run_end_s for result in results),
        "computed_tokens": sum(result.computed_tokens for result in results),
        "shares": shares_while_all_wait([result.records for result in results], weights),
    }


def judged(plan: Plan, runs: Mapping[str, Sequence[dict[str, Any]]], calibration: Calibration) -> dict[str, Any]:
    """What a report says of the arms, of the others against vLLM's own, and of each tenant's turnaround."""
    weights = plan.workload.weights()

    def told(run: Mapping[str, Any]) -> Figures:
        records = [RequestRecord(**one) for one in run["records"]]
        return figures(records, calibration, run_end_s=run["run_end_s"], weights=weights)

    by_arm = {name: list(map(told, of)) for name, of in runs.items()}
    stock = plan.stock_arm
    return {
        "arms": {
            name: {"repeats": [asdict(one) | run for one, run in zip(by_arm[name], runs[name], strict=True)]}
            for name in runs
        },
        "ratio_to_stock": ratios_to_stock(by_arm, stock),
        "turnaround_of_stock": {
            name: turnarounds(by_arm[name], by_arm[stock]) for name in runs if stock is not None and name != stock
        },
    }


def turnarounds(runs: Sequence[Figures], stock: Sequence[Figures]) -> dict[str, Any]:
    """Ratios of mean weighted turnarounds to stock's: each tenant's, and of the mean over tenants."""

    def of(one: Figures, tenant: str) -> float:
        return one.tenants[tenant].weighted_turnaround_mean

    def mean(one: Figures) -> float:
        return statistics.fmean(each.weighted_turnaround_mean for each in one.tenants.values())

    ratios = {
        tenant: ratios_of([of(one, tenant) for one in runs], [of(one, tenant) for one in stock])
        for tenant in runs[0].tenants
    }
    return {"mean of tenants": ratios_of(list(map(mean, runs)), list(map(mean, stock))), **ratios}


def rendered(report: dict[str, Any]) -> str:
    """Render the report for a terminal."""
    lines = [table(report), "", "share of service while all wait, per repeat"]
    for name, arm in report["arms"].items():
        told = ["  ".join(f"{tenant} {share:.3f}" for tenant, share in run["shares"].items()) for run in arm["repeats"]]
        lines.append(f"  {name:<24}{' | '.join(one or 'not all wait' for one in told)}")
    for name, ratios in report["turnaround_of_stock"].items():
        lines += ["", f"weighted turnaround, {name} / stock"]
        for tenant, ratio in ratios.items():
            span = "" if ratio["low"] is None else f" ({ratio['low']:.3f} to {ratio['high']:.3f})"
            lines.append(f"  {tenant:<24}{ratio['median']:.3f}{span}")
    return "\n".join(lines)
