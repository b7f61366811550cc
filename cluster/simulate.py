"""`python -m cluster simulate`: what policies would make of a trace on many replicas, in virtual time.

Method: every policy serves the same requests on simulated replicas (`cluster.simulation`), with step times and copies of a
datasheet, a profile or a calibration (`cluster.simulated_kind`). Service times alone come from an idle simulated replica
with vLLM's own preemption. The result holds no wall-clock time: the same command, the same bytes.
"""

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cluster.bench import command_line
from cluster.bench_arm import STOCK
from cluster.bench_figures import RATIO_FIGURES, Calibration, figures
from cluster.fairness_watch import FairnessFigures
from cluster.record_table import RecordTable
from cluster.records import RequestRecord
from cluster.routing import LeastLoaded, RoundRobin, Router
from cluster.simulated_cluster import add_cluster_arguments, cluster_of
from cluster.simulated_kind import add_kind_arguments, kind_of, timed
from cluster.simulated_replica import ADMISSIONS, FIRST_COME, ReplicaBuilder, ReplicaKind, ample
from cluster.simulation import Simulation
from cluster.workload import add_workload_arguments, workload_of
from cluster.workload_summary import describe
from cost_service.output_length import OutputLength
from cost_service.traces import TraceRequest
from replicas.config import PreemptionPolicy

DEFAULT = "synthetic:requests=2000,rate=20"
ROUTERS: dict[str, Callable[[], Router]] = {"least-loaded": LeastLoaded, "round-robin": RoundRobin}
ALONE_PROMPTS = (1, 128, 512, 2048, 8192)
ALONE_OUTPUT = 64
MOST_TENANTS = 50
"""Tenants that have figures of their own; the others count as one."""
OTHERS = "(others)"
FIGURES = (*RATIO_FIGURES, "preemptions", "swaps", "recomputes", "jain_index", "max_service_gap", "unfinished")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_workload_arguments(parser, DEFAULT)
    add = parser.add_argument
    add("--replicas", type=int, default=8, help="replicas (default: 8)")
    policies = ", ".join((STOCK, *(one.value for one in PreemptionPolicy if one is not PreemptionPolicy.RANDOM)))
    add("--policy", default="stock,adaptive", metavar="A,B", help=f"policies to compare, of {policies}")
    add("--admission", default=FIRST_COME, metavar="A,B", help=f"waiting queues, of {', '.join(ADMISSIONS)}")
    add(
        "--router", choices=ROUTERS, default="least-loaded", help="which replica gets a request (default: least-loaded)"
    )
    add_kind_arguments(parser)
    add("--crash-interval-s", type=float, default=math.inf, help="a replica's mean time to a crash (default: never)")
    add("--restart-s", type=float, default=60.0, help="until it is back (default: 60)")
    add_cluster_arguments(parser)
    add(
        "--known-lengths",
        action="store_true",
        help="engines know how long answers will be (default: they predict it from those that have ended)",
    )
    add("--fixed-costs", action="store_true", help="costs of preemptions stay as they are, instead of being learned")
    add("--lose", action="store_true", help="what a crashed replica had is lost, and not sent again")
    add("--check", action="store_true", help="assert all invariants after each event; slow")
    add("--plan", metavar="CONDITIONS", help="fewest replicas for which they hold, such as 'ttft_p99<2s,tpot_p99<50ms'")
    add("--gpu-hour-price", type=float, default=2.5, help="of one replica, for --plan (default: 2.5)")
    add("--json", type=Path, metavar="FILE", help="write all results to FILE")


def main(options: argparse.Namespace) -> int:
    """Simulate; 0, 2 for a wrong option or trace, 130 when interrupted."""
    try:
        if options.describe:
            dropped = Counter[str]()
            print(describe(workload_of(options, DEFAULT).requests(dropped), dropped))
            return 0
        report = simulate(options)
        print(report.pop("table"))
        if options.json:
            options.json.write_text(json.dumps(report, indent=2) + "\n")
    except OSError as error:
        print(f"Error: {error.filename or 'A file'} cannot be used: {error.strerror}.", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One arm's run."""

    records: RecordTable
    end_s: float
    most_blocks: int
    """That any replica held at once."""
    most_host_bytes: int
    """That any replica had swapped out at once."""
    num_steps: int
    computed_tokens: int
    crashes: int
    fairness: FairnessFigures | None
    """None: the run was not watched."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arms:
    """What is simulated."""

    kinds: dict[str, ReplicaKind]
    """By the arm's name."""

    requests: list[TraceRequest]
    calibration: Calibration


def simulate(options: argparse.Namespace) -> dict[str, Any]:
    """Run all arms; return the report.

    Raises:
        ValueError: An option or the trace is wrong.
    """
    if options.replicas < 1:
        raise ValueError(f"--replicas must be at least 1: it is {options.replicas}.")
    policies, admissions = _names(options.policy), _names(options.admission)
    what = timed(options)
    kinds = {policy: kind_of(options, what, policy=policy) for policy in policies}
    for admission in admissions:
        replace(kinds[policies[0]], admission=admission)  # refuses an unknown one before anything has run
    first, dropped = kinds[policies[0]], Counter[str]()
    workload = workload_of(options, DEFAULT)
    requests = list(workload.requests(dropped, context_tokens=_room(first, options)))
    calibration = alone(first, max(one.prompt_tokens for one in requests))
    num_blocks, demand = first.settings.num_blocks, None
    if options.pool_fraction is not None:
        demand = run(options, ample(first), requests, "an unlimited pool").most_blocks
        longest = max(one.prompt_tokens + one.output_tokens for one in requests)
        num_blocks = 1 + max(math.ceil(options.pool_fraction * demand), -(-longest // options.block_size))
    arms = {
        policy if len(admissions) == 1 else f"{admission}/{policy}": replace(
            kind,
            settings=replace(kind.settings, num_blocks=num_blocks),
            admission=admission,
            weights=workload.weights(),
            learn=not options.fixed_costs,
        )
        for admission in admissions
        for policy, kind in kinds.items()
    }
    report: dict[str, Any] = {
        "benchmark": "simulation",
        "simulated": what.said,
        "command": command_line(),
        "requests": len(requests),
        "workload": workload.as_report(),
        "dropped_requests": dict(sorted(dropped.items())),
        "num_kv_blocks": num_blocks,
        "demand_kv_blocks": demand,
        "calibration": asdict(calibration),
    }
    if options.plan is not None:
        from cluster import capacity

        report["plan"] = capacity.plan(options, Arms(kinds=arms, requests=requests, calibration=calibration))
        return report | {"table": capacity.table(report["plan"])}
    report["arms"] = {
        name: _arm(run(options, kind, requests, name), calibration, workload.weights()) for name, kind in arms.items()
    }
    return report | {"table": table(report)}


def run(options: argparse.Namespace, kind: ReplicaKind, requests: Sequence[TraceRequest], name: str) -> Outcome:
    """Serve the trace with one kind of replicas."""
    records = RecordTable()
    part = max(1, len(requests) // 4)

    def done(record: RequestRecord) -> None:
        records.add(record)
        if len(records) % part == 0:
            print(f"{name}: {len(records)} of {len(requests)} requests", file=sys.stderr, flush=True)

    cluster = cluster_of(options, ROUTERS[options.router])
    watch = cluster.watch(kind, requests) if kind.is_fair or options.watch_fairness else None
    simulation = cluster.simulation(
        kind, done=done, watch=watch, credit=cluster.bound(kind, requests).unit if kind.is_fair else None,
        lengths=None if options.known_lengths else OutputLength(), check=options.check,
    )  # fmt: skip
    end_s = simulation.run(requests)
    engines = [replica.engine for replica in simulation.replicas]
    return Outcome(
        records=records, end_s=end_s,
        most_blocks=max(kind.settings.num_blocks - 1 - engine.least_free_blocks for engine in engines),
        most_host_bytes=kind.block_bytes * max(engine.most_host_blocks for engine in engines),
        num_steps=sum(engine.num_steps for engine in engines),
        computed_tokens=sum(engine.num_scheduled_tokens for engine in engines), crashes=simulation.counts.crashes,
        fairness=watch.figures(end_s) if watch is not None else None,
    )  # fmt: skip


def alone(kind: ReplicaKind, longest_prompt: int) -> Calibration:
    """Service times alone, from requests that run one at a time on a replica with vLLM's own preemption."""
    prompts = {min(prompt, longest_prompt) for prompt in ALONE_PROMPTS}
    records: list[RequestRecord] = []
    for prompt in sorted(prompts):
        request = TraceRequest(arrival_s=0.0, tenant="", prompt_tokens=prompt, output_tokens=ALONE_OUTPUT)
        simulation = Simulation(ReplicaBuilder(ample(kind)), num_replicas=1, router=RoundRobin(), done=records.append)
        simulation.run([request])
    return Calibration.fit(records)


def _room(kind: ReplicaKind, options: argparse.Namespace) -> int:
    """Tokens of the longest request that a replica can hold."""
    settings = kind.settings
    if options.pool_fraction is not None:
        return settings.max_model_len
    return min(settings.max_model_len, (settings.num_blocks - 1) * settings.block_size)


def _arm(outcome: Outcome, calibration: Calibration, weights: Mapping[str, float]) -> dict[str, Any]:
    arm = asdict(figures(few_tenants(outcome.records), calibration, run_end_s=outcome.end_s, weights=weights)) | {
        "run_end_s": outcome.end_s, "most_kv_blocks": outcome.most_blocks, "steps": outcome.num_steps,
        "computed_tokens": outcome.computed_tokens, "crashes": outcome.crashes,
    }  # fmt: skip
    if outcome.fairness is not None:
        arm["fairness"] = asdict(outcome.fairness)
    return arm


def few_tenants(records: Sequence[RequestRecord]) -> list[RequestRecord]:
    """The records, with the tenants that send least as one, so that tenants can be compared in pairs."""
    sent = Counter(record.tenant for record in records)
    named = {tenant for tenant, _ in sorted(sent.items(), key=lambda item: (-item[1], item[0]))[:MOST_TENANTS]}
    return [record if record.tenant in named else replace(record, tenant=OTHERS) for record in records]


def table(report: dict[str, Any]) -> str:
    """Render a report for a terminal."""
    arms = report["arms"]
    width = max(14, *(len(name) + 2 for name in arms))
    base = next((arm for name, arm in arms.items() if name.endswith(STOCK)), None)
    lines = [
        f"SIMULATED, {report['simulated']}.",
        f"{report['requests']} requests, {sum(report['dropped_requests'].values())} dropped; "
        f"{report['num_kv_blocks']} KV blocks a replica",
        f"{'':<28}" + "".join(f"{name:>{width}}" for name in arms),
    ]
    for name in FIGURES:
        lines.append(f"{name:<28}" + "".join(_cell(arm[name], width) for arm in arms.values()))
    if any("fairness" in arm for arm in arms.values()):
        lines += ["", "fairness, by the events of the engines"]
        watched = [arm.get("fairness", {}) for arm in arms.values()]
        for name in ("max_service_gap", "bound", "gap_over_bound", "worst_stray", "broken"):
            lines.append(f"{name:<28}" + "".join(_cell(each.get(name), width) for each in watched))
    if base is not None and len(arms) > 1:
        lines += ["", "ratio to stock"]
        for name in RATIO_FIGURES:
            ratios = [arm[name] / base[name] if arm[name] and base[name] else None for arm in arms.values()]
            lines.append(f"{name:<28}" + "".join(_cell(ratio, width) for ratio in ratios))
    return "\n".join(lines)


def _cell(value: float | None, width: int) -> str:
    return f"{'-' if value is None else format(value, '.4g'):>{width}}"


def _names(text: str) -> list[str]:
    names = text.split(",")
    if len(set(names)) < len(names):
        raise ValueError(f"{text!r} names one twice: leave it out once.")
    return names
