"""`python -m cluster bench-fairness-simulated`: the experiments on fairness across replicas, on simulated engines.

Method: every experiment of `cluster.fairness_experiments` runs under each of its orders of admission, with the product's own
queues, bypass, charges, scheduler and preemption, on replicas with a small KV pool; loads are scaled to what one replica of
the kind was simulated to serve. The run ends with the last arrivals. The watch (`cluster.fairness_watch`) sees service and
who waits alone, and checks the stated bound at every event. One seed, one table.
"""

import argparse
import os
import signal
import sys
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

from cluster.bench_command import command_line, partial_of, said, status_of, terminated_like_interrupted
from cluster.bench_figures import Calibration, figures
from cluster.fairness_experiments import FAIRNESS_EXPERIMENTS, Experiment, in_time
from cluster.fairness_watch import FairnessFigures
from cluster.record_table import RecordTable
from cluster.routing import LeastLoaded
from cluster.simulate import alone
from cluster.simulated_cluster import SimulatedCluster
from cluster.simulated_kind import add_kind_arguments, kind_of, timed
from cluster.simulated_replica import FIRST_COME, ReplicaBuilder, ReplicaKind
from cluster.simulated_time import LinearTimes
from cluster.simulation import Simulation
from cluster.synthetic import Synthetic
from cost_service.output_length import OutputLength
from cost_service.result_file import write_json
from cost_service.traces import TraceRequest
from replicas.config import PreemptionPolicy

POOL_BLOCKS = 626
"""10,000 tokens of KV memory, as in the literature's suites, where no size is given."""
WARM_SHARE = 0.25
"""Of a run, before shares count: until all who ask for more than their share wait."""
LAST_ARRIVAL_SHARE = 0.75
"""Of a run: requests that arrive later may be cut by its end, and do not count for turnarounds; others count up to it."""
CAPACITY_S = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("--only", action="append", metavar="TEXT", help="experiments whose name contains it; may be repeated")
    add("--time-scale", type=float, default=1.0, help="part of their time that experiments take (default: 1)")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="experiments at once (default: one per core)")
    add("--policy", default=PreemptionPolicy.ADAPTIVE.value, help="preemption of all arms (default: adaptive)")
    add("--seed", type=int, default=0, help="of all that is made up (default: 0)")
    add("--json", type=Path, metavar="FILE", help="write all results to FILE")
    add_kind_arguments(parser)
    parser.set_defaults(hardware="A10G", pool_blocks=POOL_BLOCKS)


def main(options: argparse.Namespace) -> int:
    """Run the experiments; 0, 1 where a bound that must hold was broken, or none that must break, 2 for a wrong option.

    130 when interrupted: whole experiments are kept then.
    """

    def work() -> int:
        with terminated_like_interrupted():
            report = run_all(options)
        print(table(report))
        if options.json:
            write_json(report, options.json)
        return status_of(report) or (1 if report["unexpected"] else 0)

    return said(work)


def run_all(options: argparse.Namespace) -> dict[str, Any]:
    """Run the experiments that the options name.

    Raises:
        ValueError: An option is wrong.
    """
    if not 0.0 < options.time_scale <= 10.0:
        raise ValueError(f"--time-scale must be above 0 and at most 10: it is {options.time_scale}.")
    if options.jobs < 1:
        raise ValueError(f"--jobs must be at least 1: it is {options.jobs}.")
    chosen = [
        one
        for name, one in FAIRNESS_EXPERIMENTS.items()
        if not options.only or any(text in name for text in options.only)
    ]
    if not chosen:
        raise ValueError(f"--only names none of: {', '.join(FAIRNESS_EXPERIMENTS)}.")
    what = timed(options)
    kind = _kind(options)
    rate = capacity(kind)
    experiments: dict[str, Any] = {}
    report: dict[str, Any] = {
        "benchmark": "fairness", "simulated": what.said, "command": command_line(), "capacity_per_s": rate,
        "full_step_ratio": full_step_ratio(kind),
        "experiments": experiments,
    }  # fmt: skip
    others = set(active_children())
    pool = ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn"), initializer=_leave_interrupts_to_parent)
    tasks = {one.name: pool.submit(_run_named, options, one.name, rate) for one in chosen}
    try:
        for name, task in tasks.items():
            experiments[name] = task.result()
            print(rows(name, experiments[name]), file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        experiments |= {name: task.result() for name, task in tasks.items() if task.done() and not task.exception()}
        if not experiments:
            raise
        report |= partial_of(experiments, tasks)
    finally:
        for process in set(active_children()) - others if len(experiments) < len(tasks) else ():
            process.terminate()  # one that works on what nobody waits for any more
        pool.shutdown(cancel_futures=True)  # its own thread reaps them: whoever reaps beside it may see them alive
    report["unexpected"] = [
        f"{one.name}, {arm}" for one in chosen for arm, seen in experiments.get(one.name, {}).items()
        if seen["fairness"]["broken"] != (arm in one.breaks)
    ]  # fmt: skip
    return report


def _leave_interrupts_to_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C comes to all processes of a terminal


def _kind(options: argparse.Namespace) -> ReplicaKind:
    return replace(kind_of(options, timed(options), policy=options.policy), learn=True)


def _run_named(options: argparse.Namespace, name: str, capacity_per_s: float) -> dict[str, Any]:
    """Run an experiment in a process of its own."""
    experiment = in_time(FAIRNESS_EXPERIMENTS[name], options.time_scale)
    return run(experiment, _kind(options), capacity_per_s=capacity_per_s, seed=options.seed)


def run(experiment: Experiment, kind: ReplicaKind, *, capacity_per_s: float, seed: int) -> dict[str, Any]:
    """Run all arms of an experiment; return their figures, with those of first come as a base."""
    if experiment.constant_step_s is not None:
        kind = replace(kind, times=LinearTimes(fixed_s=experiment.constant_step_s))
    source = Synthetic(streams=tuple(_loads(experiment, capacity_per_s)))
    requests = [one for one in source.requests(seed) if one.arrival_s < experiment.until_s]
    kind = replace(kind, weights=source.weights())
    calibration = alone(kind, max(one.prompt_tokens for one in requests))
    arms: dict[str, Any] = {}
    for arm in experiment.arms:
        watched, records = run_arm(experiment, replace(kind, admission=arm), requests, seed=seed)
        arms[arm] = {"fairness": asdict(watched)} | _turnarounds(records, calibration, experiment, source.weights())
    if (base := arms.get(FIRST_COME)) is not None:
        for each in arms.values():
            for name in ("service_per_s", "output_tokens_per_s"):
                each[f"{name}_ratio"] = each["fairness"][name] / base["fairness"][name]
    return arms


def run_arm(
    experiment: Experiment, kind: ReplicaKind, requests: list[TraceRequest], *, seed: int, check: bool = False
) -> tuple[FairnessFigures, RecordTable]:
    """Run one order of admission to the experiment's end."""
    cluster = SimulatedCluster(
        num_replicas=experiment.num_replicas, router=LeastLoaded, pins=experiment.pins, num_users=experiment.num_users,
        share=experiment.share, disturbances=replace(experiment.disturbances, seed=seed),
    )  # fmt: skip
    records = RecordTable()
    until_s = experiment.until_s
    watch = cluster.watch(kind, requests, shares_from_s=WARM_SHARE * until_s)
    simulation = cluster.simulation(
        kind, done=records.add, watch=watch, credit=cluster.bound(kind, requests).credit, lengths=OutputLength(),
        check=check,
    )  # fmt: skip
    simulation.run(requests, until_s=until_s)
    return watch.figures(until_s), records


def capacity(kind: ReplicaKind) -> float:
    """Requests of 256 + 256 tokens that one replica serves in a second, of many that are all there."""
    kind = replace(kind, admission=FIRST_COME)
    num = int(200 * CAPACITY_S)
    records = RecordTable()
    simulation = Simulation(ReplicaBuilder(kind), num_replicas=1, router=LeastLoaded(), done=records.add)
    one = TraceRequest(arrival_s=0.0, tenant="", prompt_tokens=256, output_tokens=256)
    simulation.run((one for _ in range(num)), until_s=CAPACITY_S)
    if simulation.counts.finished in (0, num):
        raise ValueError("Loads cannot be scaled to such replicas: they serve next to nothing, or all at once.")
    return sum(record.delivered_tokens for record in records) / 256.0 / CAPACITY_S


def full_step_ratio(kind: ReplicaKind) -> float:
    """How many times longer a step of decodes takes with memory full of requests of 256 + 256 tokens than with one."""
    half_done = 256 + 128
    num_tokens = (kind.settings.num_blocks - 1) * kind.settings.block_size
    num = max(1, min(kind.settings.max_num_seqs, num_tokens // half_done))
    return kind.times.step_s(num, num * half_done) / kind.times.step_s(1, half_done)


def _loads(experiment: Experiment, capacity_per_s: float) -> list[Any]:
    factor = 1.0 if experiment.absolute else capacity_per_s * experiment.num_replicas
    return [
        replace(
            stream, rate=stream.rate * factor,
            rate_end=None if stream.rate_end is None else stream.rate_end * factor,
        )
        for stream in experiment.streams
    ]  # fmt: skip


def _turnarounds(
    records: RecordTable, calibration: Calibration, experiment: Experiment, weights: Mapping[str, float]
) -> dict[str, Any]:
    """Mean weighted turnaround and time per token by tenant: of those who came early enough; see `LAST_ARRIVAL_SHARE`."""
    early = [one for one in records if one.arrival_s <= LAST_ARRIVAL_SHARE * experiment.until_s]
    seen = figures(early, calibration, run_end_s=experiment.until_s, weights=weights)
    return {
        "weighted_turnaround_mean": {name: each.weighted_turnaround_mean for name, each in seen.tenants.items()},
        "tpot_s_p50": {name: each.tpot_s_p50 for name, each in seen.tenants.items()},
        "preemptions": sum(one.swaps + one.recomputes for one in records),
    }


def table(report: Mapping[str, Any]) -> str:
    """Render a report for a terminal."""
    lines = [
        f"SIMULATED, {report['simulated']}.",
        f"One replica serves {report['capacity_per_s']:.3g} requests of 256 + 256 tokens a second.",
        f"Full of them, a step of decodes alone takes {report['full_step_ratio']:.3f} times as long as with one: so much"
        " later do tokens come beside a flood, whoever goes first.",
        f"{'experiment':<36} {'admission':<11} {'gap':>8} {'/ bound':>8} {'stray':>6}  "
        f"{'tokens/s':>8} {'service':>8}  shares; mean weighted turnaround",
    ]
    lines += [rows(name, arms) for name, arms in report["experiments"].items()]
    unexpected = report["unexpected"]
    lines.append(
        f"Not as expected: {'; '.join(unexpected)}." if unexpected else "All bounds held and broke as expected."
    )
    return "\n".join(lines)


def rows(name: str, arms: Mapping[str, Any]) -> str:
    """One line per arm."""
    lines = []
    for arm, each in arms.items():
        seen = each["fairness"]
        ratios = "".join(
            f" {each[key]:8.3f}" if (key := f"{what}_ratio") in each else f" {'-':>8}"
            for what in ("output_tokens_per_s", "service_per_s")
        )
        broken = "BROKEN" if seen["broken"] else ""
        shares = " ".join(f"{share:.3f}" for share in seen["shares"].values()) or "never all wait"
        turnarounds = " ".join(f"{value:.3g}" for value in each["weighted_turnaround_mean"].values())
        lines.append(
            f"{name:<36} {arm:<11} {seen['max_service_gap']:8.0f} {seen['gap_over_bound']:8.3f} {seen['worst_stray']:6.3f} "
            f"{ratios}  {shares}; {turnarounds} {broken}".rstrip()
        )
    return "\n".join(lines)
