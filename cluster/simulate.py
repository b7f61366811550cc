"""`python -m cluster simulate`: what policies would make of a trace on many replicas, in virtual time.

Method: every policy serves the same requests on simulated replicas (`cluster.simulation`), with step times and copies of a
datasheet, a profile or a calibration (`cluster.simulated_kind`). Service times alone come from an idle simulated replica
with vLLM's own preemption. The result holds no wall-clock time: the same command, the same bytes.
"""

import argparse
import functools
import math
import sys
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cluster import figures_plot
from cluster.bench_arm import STOCK
from cluster.bench_command import command_line, said, status_of, tell, terminated_like_interrupted, until_interrupted
from cluster.bench_figures import RATIO_FIGURES, Calibration, figures
from cluster.distributions import distributions
from cluster.fairness_watch import FairnessFigures
from cluster.pool_fraction import check_pool_fraction, pool_blocks
from cluster.record_table import RecordTable
from cluster.records import RequestRecord
from cluster.routing import LeastLoaded, Placed, RoundRobin, Router
from cluster.service_curve import service_gaps
from cluster.simulated_autoscaling import SimulatedAutoscaler, as_report, check_autoscaling, scaling_lines
from cluster.simulated_cluster import add_cluster_arguments, cluster_of
from cluster.simulated_engine import SimulatedEngine
from cluster.simulated_kind import POLICIES, add_kind_arguments, kind_of, timed
from cluster.simulated_preemption import SimulatedPreemption
from cluster.simulated_replica import ADMISSIONS, FIRST_COME, ReplicaBuilder, ReplicaKind, ample
from cluster.simulation import Simulation
from cluster.workload import add_workload_arguments, workload_of
from cluster.workload_summary import Summary
from cost_service.output_length import OutputLength
from cost_service.result_file import write_json
from cost_service.traces import TraceRequest
from replicas.preemption import Action

DEFAULT = "synthetic:requests=2000,rate=20"
ROUTERS: dict[str, Callable[[], Router]] = {
    "least-loaded": LeastLoaded, "round-robin": RoundRobin, "placement": Placed,
}  # fmt: skip
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
    add("--policy", default="stock,adaptive", metavar="A,B", help=f"policies to compare, of {', '.join(POLICIES)}")
    add("--admission", default=FIRST_COME, metavar="A,B", help=f"waiting queues, of {', '.join(ADMISSIONS)}")
    add(
        "--router",
        default="least-loaded",
        metavar="A,B",
        help=f"which replica gets a request, of {', '.join(ROUTERS)} (default: least-loaded)",
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
    add("--json", type=Path, metavar="FILE", help="write all results to FILE; `report` makes a page of it")
    add("--plot", type=Path, metavar="FILE", help="draw the arms' figures into FILE (.png or .svg)")


def main(options: argparse.Namespace) -> int:
    """Simulate; 0, 2 for a wrong option or trace, 130 when interrupted: whole arms are kept then."""
    return said(lambda: _main(options))


def _main(options: argparse.Namespace) -> int:
    if options.describe:
        dropped = Counter[str]()
        return tell(Summary.of(workload_of(options, DEFAULT).requests(dropped), dropped), options.json)
    if options.plot:
        figures_plot.check_target(options.plot)
        if options.plan is not None:
            raise ValueError("--plot draws arms, and --plan has none: leave one of them out.")
    with terminated_like_interrupted():
        report = simulate(options)
    print(report.pop("table"))
    if options.json:
        write_json(report, options.json)
    if options.plot:
        figures_plot.draw(report, options.plot)
    return status_of(report)


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
    preemption_costs: dict[str, dict[str, float]]
    """By action: how many were measured, and what those were predicted to take and took. Empty where none is measured."""
    fairness: FairnessFigures | None
    """None: the run was not watched."""
    scaling: Mapping[str, Any] | None
    """None: the number of replicas was given."""


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
    if options.pool_fraction is not None:
        check_pool_fraction(options.pool_fraction)
    policies, admissions = (
        _names("policy", options.policy, POLICIES),
        _names("admission", options.admission, ADMISSIONS),
    )
    routers = _names("router", options.router, ROUTERS)
    what = timed(options)
    kinds = {policy: kind_of(options, what, policy=policy) for policy in policies}
    check_autoscaling(options, admissions)
    for kind in kinds.values():
        for admission in admissions:
            replace(kind, admission=admission)  # refuses what cannot be before anything has run
    first, dropped = kinds[policies[0]], Counter[str]()
    workload = workload_of(options, DEFAULT)
    requests = list(workload.requests(dropped, context_tokens=_room(first, options)))
    calibration = alone(first, max(one.prompt_tokens for one in requests))
    num_blocks, demand = first.settings.num_blocks, None
    if options.pool_fraction is not None:
        demand = run(options, ample(first), requests, "an unlimited pool").most_blocks
        longest = max(one.prompt_tokens + one.output_tokens for one in requests)
        num_blocks = pool_blocks(
            options.pool_fraction, demand, least=1 + -(-longest // options.block_size),
            ample=ample(first).settings.num_blocks,
        )  # fmt: skip
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
        "settings": settings_of(options, first, num_blocks),
    }
    if options.plan is not None:
        from cluster import capacity

        report["plan"], partial = capacity.plan(options, Arms(kinds=arms, requests=requests, calibration=calibration))
        return report | partial | {"table": capacity.table(report["plan"])}

    def arm(name: str, kind: ReplicaKind, router: str) -> dict[str, Any]:
        outcome = run(options, kind, requests, name, router)
        return _arm(outcome, calibration, workload.weights(), cached=len(routers) > 1)

    report["arms"], partial = until_interrupted({
        f"{router}/{name}" if len(routers) > 1 else name: functools.partial(arm, name, kind, router)
        for router in routers for name, kind in arms.items()
    })  # fmt: skip
    report |= partial
    report["ratio_to_stock"] = ratios(report["arms"])
    return report | {"table": table(report)}


def settings_of(options: argparse.Namespace, kind: ReplicaKind, num_blocks: int) -> dict[str, Any]:
    """What was simulated, as it stands in a result: of the model only its name."""
    autoscaled, planned = options.autoscale is not None, options.plan is not None
    return {
        "hardware": kind.costs.hardware, "model": kind.costs.model, "router": options.router,
        "replicas": options.autoscale if autoscaled else None if planned else options.replicas,
        "pool_fraction": options.pool_fraction, "num_kv_blocks": num_blocks, "block_bytes": kind.block_bytes,
        "block_size": kind.settings.block_size, "max_num_seqs": kind.settings.max_num_seqs,
        "max_num_batched_tokens": kind.settings.max_num_batched_tokens, "host_bytes": kind.host_bytes,
        "known_lengths": options.known_lengths,
    }  # fmt: skip


def ratios(arms: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float | None]]]:
    """By arm and figure the ratio to the first arm with vLLM's own preemption; empty without one. One run: no interval."""
    base = next((name for name in arms if name.endswith(STOCK)), None)
    if base is None:
        return {}
    return {
        name: {
            figure: {"median": arm[figure] / arms[base][figure], "low": None, "high": None}
            for figure in RATIO_FIGURES
            if arm[figure] and arms[base][figure]
        }
        for name, arm in arms.items()
        if name != base
    }


def run(
    options: argparse.Namespace, kind: ReplicaKind, requests: Sequence[TraceRequest], name: str,
    router: str | None = None, *, watched: bool = True,
) -> Outcome:  # fmt: skip
    """Serve the trace with one kind of replicas, by the first of the routers if none is named.

    Args:
        watched: Whether the stated bound is checked at every event where admission is fair: it takes most of the time.
    """
    records = RecordTable()
    part = max(1, len(requests) // 4)

    def done(record: RequestRecord) -> None:
        records.add(record)
        if len(records) % part == 0:
            print(f"{name}: {len(records)} of {len(requests)} requests", file=sys.stderr, flush=True)

    cluster = cluster_of(options, ROUTERS[router or options.router.partition(",")[0]])
    scaler = SimulatedAutoscaler(cluster.autoscaling) if cluster.autoscaling is not None else None
    watch = cluster.watch(kind, requests) if watched and (kind.is_fair or options.watch_fairness) else None
    simulation = cluster.simulation(
        kind, done=done, watch=watch, credit=cluster.bound(kind, requests).credit if kind.is_fair else None,
        lengths=None if options.known_lengths else OutputLength(), check=options.check, scaler=scaler,
    )  # fmt: skip
    end_s = simulation.run(requests)
    engines = [replica.engine for replica in simulation.replicas]
    return Outcome(
        records=records, end_s=end_s,
        most_blocks=max(kind.settings.num_blocks - 1 - engine.least_free_blocks for engine in engines),
        most_host_bytes=kind.block_bytes * max(engine.most_host_blocks for engine in engines),
        num_steps=sum(engine.num_steps for engine in engines),
        computed_tokens=sum(engine.num_scheduled_tokens for engine in engines), crashes=simulation.counts.crashes,
        preemption_costs=_preemption_costs(engines),
        fairness=watch.figures(end_s) if watch is not None else None,
        scaling=None if scaler is None else as_report(
            scaler, end_s, sum(record.delivered_tokens for record in records)
        ),
    )  # fmt: skip


def _preemption_costs(engines: Sequence[SimulatedEngine]) -> dict[str, dict[str, float]]:
    """Sums over replicas since each was last started."""
    sums: dict[str, dict[str, float]] = {}
    for engine in engines:
        if not isinstance(engine.preemption, SimulatedPreemption):
            continue
        one = engine.preemption.preemptor
        for action in (action for action in Action if one.num_measured[action]):
            of = sums.setdefault(action.value, {"measured": 0.0, "predicted_s": 0.0, "measured_s": 0.0})
            of["measured"] += one.num_measured[action]
            of["predicted_s"] += one.predicted_s[action]
            of["measured_s"] += one.measured_s[action]
    return sums


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


def _arm(
    outcome: Outcome, calibration: Calibration, weights: Mapping[str, float], *, cached: bool = False
) -> dict[str, Any]:  # fmt: skip
    share = {"cached_share": cached_share(outcome)} if cached else {}
    records = few_tenants(outcome.records)
    arm = share | asdict(figures(records, calibration, run_end_s=outcome.end_s, weights=weights)) | {
        "run_end_s": outcome.end_s, "most_kv_blocks": outcome.most_blocks, "steps": outcome.num_steps,
        "computed_tokens": outcome.computed_tokens, "crashes": outcome.crashes,
        "preemption_costs": outcome.preemption_costs, "distributions": distributions(records, calibration),
        "service_gaps": service_gaps(records, weights),
    }  # fmt: skip
    if outcome.fairness is not None:
        arm["fairness"] = asdict(outcome.fairness)
    if outcome.scaling is not None:
        arm["scaling"] = outcome.scaling
    return arm


def cached_share(outcome: Outcome) -> float:
    """Share of all prompt tokens that were not computed; what was computed again counts against it."""
    prompts = sum(record.prompt_tokens for record in outcome.records)
    decodes = sum(max(0, record.delivered_tokens - 1) for record in outcome.records)
    return 1 - (outcome.computed_tokens - decodes) / prompts


def few_tenants(records: Sequence[RequestRecord]) -> list[RequestRecord]:
    """The records, with the tenants that send least as one, so that tenants can be compared in pairs."""
    sent = Counter(record.tenant for record in records)
    named = {tenant for tenant, _ in sorted(sent.items(), key=lambda item: (-item[1], item[0]))[:MOST_TENANTS]}
    return [record if record.tenant in named else replace(record, tenant=OTHERS) for record in records]


def table(report: dict[str, Any]) -> str:
    """Render a report for a terminal."""
    arms = report["arms"]
    width = max(14, *(len(name) + 2 for name in arms))
    lines = [
        f"SIMULATED, {report['simulated']}.",
        f"{report['requests']} requests, {sum(report['dropped_requests'].values())} dropped; "
        f"{report['num_kv_blocks']} KV blocks a replica",
        f"{'':<28}" + "".join(f"{name:>{width}}" for name in arms),
    ]
    for name in ("cached_share",) * any("cached_share" in arm for arm in arms.values()) + FIGURES:
        lines.append(f"{name:<28}" + "".join(_cell(arm[name], width) for arm in arms.values()))
    if any("fairness" in arm for arm in arms.values()):
        lines += ["", "fairness, by the events of the engines"]
        watched = [arm.get("fairness", {}) for arm in arms.values()]
        for name in ("max_service_gap", "bound", "gap_over_bound", "worst_stray", "broken"):
            lines.append(f"{name:<28}" + "".join(_cell(each.get(name), width) for each in watched))
    lines += scaling_lines(arms)
    if of_arms := report["ratio_to_stock"]:
        lines += ["", f"{'ratio to stock':<28}" + "".join(f"{name:>{width}}" for name in of_arms)]
        for name in RATIO_FIGURES:
            cells = (_cell(of[name]["median"] if name in of else None, width) for of in of_arms.values())
            lines.append(f"{name:<28}" + "".join(cells))
    return "\n".join(lines)


def _cell(value: float | None, width: int) -> str:
    return f"{'-' if value is None else format(value, '.4g'):>{width}}"


def _names(option: str, text: str, known: Collection[str]) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"--{option} has no {unknown[0]!r}: use some of {', '.join(known)}.")
    if len(set(names)) < len(names):
        raise ValueError(f"--{option} names {text!r}, one of them twice: leave it out once.")
    return names
