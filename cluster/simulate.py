"""`python -m cluster simulate`: what policies would make of a trace on many replicas, in virtual time.

Method: every policy serves the same requests on simulated replicas (`cluster.simulation`), with step times of the hardware's
datasheet (`cost_service.engine_step`) and copies as `cost_service.analytic` prices them. Service times alone come from an
idle simulated replica with vLLM's own preemption. The result holds no wall-clock time: the same command, the same bytes.
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
from cluster.bench_model import LLAMA_8B
from cluster.record_table import RecordTable
from cluster.records import RequestRecord
from cluster.routing import LeastLoaded, RoundRobin, Router
from cluster.simulated_replica import ADMISSIONS, FIRST_COME, ReplicaBuilder, ReplicaKind, ample
from cluster.simulated_step import SimulatedSettings
from cluster.simulation import Disturbances, Simulation
from cluster.workload import add_workload_arguments, workload_of
from cluster.workload_summary import describe
from cost_service.analytic import analytic_snapshot
from cost_service.engine_step import EngineStep
from cost_service.hardware import HARDWARE, Hardware
from cost_service.kv_memory import kv_layout
from cost_service.model_shape import ModelShape
from cost_service.traces import TraceRequest
from replicas.config import PreemptionPolicy
from replicas.throttled_link import LinkSettings

MODELS = {"llama-3.1-8b": LLAMA_8B}
DEFAULT = "synthetic:requests=2000,rate=20"
ROUTERS: dict[str, Callable[[], Router]] = {"least-loaded": LeastLoaded, "round-robin": RoundRobin}
DEVICE_GIB = 80.0
KV_SHARE = 0.9
"""Of device memory, what weights, activations and KV cache take together (vLLM's `gpu_memory_utilization`)."""
ACTIVATION_GIB = 4.0
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
    add("--hardware", choices=sorted(HARDWARE), default="H100", help="device of a replica (default: H100)")
    add("--model", default="llama-3.1-8b", help=f"{', '.join(MODELS)}, or a config.json (default: llama-3.1-8b)")
    add("--block-size", type=int, default=16, help="tokens per KV block (default: 16)")
    add("--max-num-seqs", type=int, default=256, help="requests that run at once on a replica (default: 256)")
    add("--max-num-batched-tokens", type=int, default=8192, help="tokens of a step (default: 8192)")
    add("--no-prefix-caching", action="store_true", help="without vLLM's prefix cache")
    pool = parser.add_mutually_exclusive_group()
    pool.add_argument(
        "--pool-blocks", type=int, help=f"KV blocks of a replica (default: what {DEVICE_GIB:g} GiB leave)"
    )
    pool.add_argument(
        "--pool-fraction", type=float, help="of the most blocks that a replica needs with an unlimited pool"
    )
    add("--host-gib", type=float, default=64.0, help="host memory for swapped blocks, per replica (default: 64)")
    add("--replicas-per-host", type=int, default=1, help="replicas that share a link to host memory (default: 1)")
    add("--crash-interval-s", type=float, default=math.inf, help="a replica's mean time to a crash (default: never)")
    add("--restart-s", type=float, default=60.0, help="until it is back (default: 60)")
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
    kinds = {policy: kind_of(options, policy=policy) for policy in policies}
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
            kind, settings=replace(kind.settings, num_blocks=num_blocks), admission=admission
        )
        for admission in admissions
        for policy, kind in kinds.items()
    }
    report: dict[str, Any] = {
        "benchmark": "simulation",
        "simulated": "step times from a datasheet, and copies at its rates: nothing here was measured",
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

    simulation = Simulation(
        ReplicaBuilder(kind), num_replicas=options.replicas, router=ROUTERS[options.router](), done=done,
        disturbances=Disturbances(
            seed=options.seed, crash_interval_s=options.crash_interval_s, restart_s=options.restart_s,
            resubmit=not options.lose,
        ),
        check=options.check,
    )  # fmt: skip
    end_s = simulation.run(requests)
    engines = [replica.engine for replica in simulation.replicas]
    return Outcome(
        records=records, end_s=end_s,
        most_blocks=max(kind.settings.num_blocks - 1 - engine.least_free_blocks for engine in engines),
        most_host_bytes=kind.block_bytes * max(engine.most_host_blocks for engine in engines),
        num_steps=sum(engine.num_steps for engine in engines),
        computed_tokens=sum(engine.num_scheduled_tokens for engine in engines), crashes=simulation.counts.crashes,
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


def kind_of(options: argparse.Namespace, *, policy: str) -> ReplicaKind:
    """The replicas that the options describe."""
    hardware = HARDWARE[options.hardware]
    config = MODELS.get(options.model) or json.loads(Path(options.model).read_text())
    shape = ModelShape.from_config(config, source=options.model)
    layout = kv_layout(shape, block_size=options.block_size)
    costs = analytic_snapshot(
        shape, hardware, model=Path(options.model).name, parallelism=1, block_size=options.block_size,
        block_bytes=layout.block_bytes,
    )  # fmt: skip
    settings = SimulatedSettings(
        num_blocks=_num_blocks(shape, layout.block_bytes) if options.pool_blocks is None else options.pool_blocks,
        block_size=options.block_size, max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        enable_prefix_caching=not options.no_prefix_caching,
    )  # fmt: skip
    if not options.host_gib >= 0:
        raise ValueError(f"--host-gib must not be negative: it is {options.host_gib}.")
    return ReplicaKind(
        settings=settings, times=EngineStep.cold(shape, hardware), costs=costs, block_bytes=layout.block_bytes,
        policy=policy, host_bytes=int(options.host_gib * (1 << 30)), link=_link(hardware),
        replicas_per_host=options.replicas_per_host,
    )  # fmt: skip


def _link(hardware: Hardware) -> LinkSettings | None:
    return None if hardware.copies_stall else LinkSettings(bytes_per_s=hardware.copy_bytes_per_s)


def _num_blocks(shape: ModelShape, block_bytes: int) -> int:
    """KV blocks that a device has room for beside the weights, at two bytes each."""
    weights = 2 * (shape.active_weights + shape.hidden_size * shape.vocab_size)
    free = (KV_SHARE * DEVICE_GIB - ACTIVATION_GIB) * (1 << 30) - weights
    if free < 2 * block_bytes:
        raise ValueError(
            f"The model's weights take {weights / (1 << 30):.0f} GiB: name --pool-blocks for such a replica."
        )
    return int(free / block_bytes)


def _room(kind: ReplicaKind, options: argparse.Namespace) -> int:
    """Tokens of the longest request that a replica can hold."""
    settings = kind.settings
    if options.pool_fraction is not None:
        return settings.max_model_len
    return min(settings.max_model_len, (settings.num_blocks - 1) * settings.block_size)


def _arm(outcome: Outcome, calibration: Calibration, weights: Mapping[str, float]) -> dict[str, Any]:
    return asdict(figures(few_tenants(outcome.records), calibration, run_end_s=outcome.end_s, weights=weights)) | {
        "run_end_s": outcome.end_s, "most_kv_blocks": outcome.most_blocks, "steps": outcome.num_steps,
        "computed_tokens": outcome.computed_tokens, "crashes": outcome.crashes,
    }  # fmt: skip


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
