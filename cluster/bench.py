"""`python -m cluster bench`: preemption policies against each other, with real engines on this machine.

Rules:
- The same requests for every arm, in interleaved repeats (`cluster.bench_runs`).
- An idle stock engine with memory for everything comes first: it gives the service times alone, the demand for KV
  blocks, and the tokens that `--check-exact` compares with.
- A benchmark that was stopped goes on where it was, by what it keeps beside its result file. Results name no host and no
  path.
"""

import argparse
import math
import os
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cluster import bench_baseline, bench_served, figures_plot, models, pool_fraction, served_plan
from cluster.bench_arm import ADMISSIONS, FIRST_COME, OFFLOAD, STOCK, EngineSettings, read_engine_kwargs
from cluster.bench_command import command_line, machine_facts, parts_file, run_command
from cluster.bench_figures import INTERVAL, Calibration, Figures, difference_to_stock, figures, ratios_to_stock, table
from cluster.bench_model import DUMMY, RANDOM_MODELS, model_folder, number_in
from cluster.bench_progress import Progress
from cluster.bench_runs import Plan, Say, full_repeats, measure_alone, run_arms, runs_of
from cluster.bootstrap import has_nvidia_gpu
from cluster.prompts import RequestSpec
from cluster.records import RunResult
from cluster.workload import Workload, add_workload_arguments, workload_of
from cluster.workload_summary import Summary
from replicas.config import PreemptionPolicy

POLICIES = (STOCK, *(policy.value for policy in PreemptionPolicy), OFFLOAD)
BLOCK_SIZE = 32  # tokens; the smallest that attention on CPU takes
PRESSURE = {"trace": "synthetic:requests=480,rate=80", "pool_fraction": 0.4, "max_num_seqs": 32}
OFF_PRESSURE = {
    "trace": "synthetic:requests=256,rate=inf,prompt_mean=16,prompt_max=16,output_mean=64,output_max=64,spread=0",
    "pool_fraction": 0.0,
    "max_num_seqs": 256,
}


ARMS = {"policy": "stock,swap,adaptive", "admission": FIRST_COME}
"""Arms where none are named."""

ENGINE_OPTIONS = (
    "known_lengths", "model", "random_model", "pool_fraction", "host_pool_bytes", "max_num_seqs", "threads",
    "engine_kwargs", "warm_up_s", "off_pressure", "check_exact",
)  # fmt: skip
"""Of the engines that the benchmark starts."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_engine_arguments(parser)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the arms' figures into FILE (.png or .svg)")
    bench_baseline.add_baseline_arguments(parser)
    served_plan.add_served_arguments(parser)


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of a workload and of the engines that serve it."""
    parser.add_argument("--policy", metavar="A,B", help=f"arms, of {', '.join(POLICIES)} (default: {ARMS['policy']})")
    parser.add_argument(
        "--admission",
        metavar="A,B",
        help=f"orders of those who wait, of {', '.join(ADMISSIONS)} (default: {FIRST_COME})",
    )
    parser.add_argument(
        "--known-lengths",
        action="store_true",
        help="engines know how long answers will be (default: they predict it from those that have ended)",
    )
    parser.add_argument("--repeats", type=int, default=3, help="counted runs per arm (default: 3)")
    parser.add_argument(
        "--vary-seed", action="store_true", help="other requests in every repeat, the same for all arms"
    )
    parser.add_argument("--model", help="folder with weights (default: a random model)")
    parser.add_argument(
        "--random-model", choices=RANDOM_MODELS, default="tiny", help="where none is named (default: tiny)"
    )
    parser.add_argument(
        "--pool-fraction", type=float, help=f"{pool_fraction.HELP} (default: {PRESSURE['pool_fraction']})"
    )
    parser.add_argument("--host-pool-bytes", type=int, default=1 << 28, help="for swapped blocks (default: 256 MiB)")
    parser.add_argument("--max-num-seqs", type=int, help="requests that run at once (default: 32)")
    parser.add_argument("--threads", type=int, default=1, help="threads of an engine (default: 1)")
    parser.add_argument(
        "--engine-kwargs", metavar="JSON", help='further vLLM arguments of all engines, such as {"enforce_eager": true}'
    )
    parser.add_argument("--limit-s", type=float, default=600.0, help="a run's longest duration (default: 600)")
    parser.add_argument(
        "--warm-up-s", type=float, help="a warm-up's longest duration (default: that of a run; for a GPU some seconds)"
    )
    parser.add_argument(
        "--off-pressure", action="store_true", help="ample memory and 256 requests at once: what the scheduler costs"
    )
    parser.add_argument(
        "--check-exact", action="store_true", help="compare all tokens with stock's in ample memory (float32, greedy)"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write all results to FILE; `report` makes a page of it"
    )
    add_workload_arguments(parser, default=str(PRESSURE["trace"]))


def main(options: argparse.Namespace) -> int:
    """Measure; 0, 2 for a wrong option, 130 when interrupted.

    1 when an engine failed, a token differed or a ratio to stock has regressed.
    """

    def work(scratch: Path, say: Say) -> dict[str, Any]:
        if options.plot:
            figures_plot.check_target(options.plot)

        def progress_of(plan: Plan | served_plan.ServedPlan) -> Progress:
            baseline.expect(plan.as_report(), plan.arms, plan.stock_arm, len(plan.workloads))
            return Progress(parts_file(options.json), plan.identity())

        baseline = bench_baseline.Baseline.of(options)
        if options.serve is not None:
            served_plan.check_options(options, _engine_defaults())
            report = bench_served.run(options, workload_of(options, default=served_plan.TRACE), say, progress_of)
        else:
            served_plan.check_unused(options)
            plan = plan_of(options, scratch)
            report = measure(plan, scratch, say, progress_of(plan))
        if options.plot:
            figures_plot.draw(report, options.plot)
        return report | baseline.judged(report)

    return run_command(options, work, table, described=described)


def _engine_defaults() -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    add_engine_arguments(parser)
    return {name: parser.get_default(name) for name in ENGINE_OPTIONS}


def plan_of(options: argparse.Namespace, scratch: Path) -> Plan:
    """Turn options into a plan; a random model is made in `scratch` where no other is given.

    Raises:
        ValueError: An option is wrong, or does not fit the model.
    """
    arms = {name: default if (named := getattr(options, name)) is None else named for name, default in ARMS.items()}
    given, engine_kwargs = vars(options) | preset(options) | arms, read_engine_kwargs(options.engine_kwargs)
    accelerator = "gpu" if has_nvidia_gpu() else "cpu"
    check_options(given, accelerator)
    workload = workload_of(options, default=given["trace"])
    folder = model_folder(options.model, scratch / options.random_model, config=RANDOM_MODELS[options.random_model])
    seeds = [workload.seed + (repeat if options.vary_seed else 0) for repeat in range(options.repeats)]
    dropped = Counter[str]()
    workloads = read_workloads(workload, models.read_config(folder), seeds, dropped)
    longest = max(request.num_tokens for requests in workloads for request in requests)
    dummy = not options.model and options.random_model in DUMMY
    engine = EngineSettings(
        model=str(folder),
        policy=STOCK,
        num_kv_blocks=max(ample_blocks(workload, given["max_num_seqs"]) for workload in workloads),
        host_pool_bytes=options.host_pool_bytes,
        max_num_seqs=given["max_num_seqs"],
        max_model_len=longest,
        block_size=BLOCK_SIZE,
        dtype="float32" if options.check_exact or not (options.model or dummy) else "auto",
        load_format="dummy" if dummy else "auto",
        threads=options.threads,
        accelerator=accelerator,
        weights=dict(workload.weights()),
        known_lengths=options.known_lengths,
        engine_kwargs=engine_kwargs,
    )
    return Plan(
        policies=tuple(arms["policy"].split(",")),
        admissions=tuple(arms["admission"].split(",")),
        workload=workload,
        workloads=workloads,
        dropped=dict(dropped),
        engine=engine,
        pool_fraction=given["pool_fraction"],
        limit_s=options.limit_s,
        warm_up_s=min(options.limit_s, options.warm_up_s or options.limit_s),
        check_exact=options.check_exact,
    )


def preset(options: argparse.Namespace) -> dict[str, Any]:
    """The options that depend on `--off-pressure`, as they were given or as they are then.

    Raises:
        ValueError: Both were given.
    """
    values = OFF_PRESSURE if options.off_pressure else PRESSURE
    given = {name: getattr(options, name) for name in values if getattr(options, name) is not None}
    if given and options.off_pressure:
        raise ValueError(f"--off-pressure sets --{next(iter(given)).replace('_', '-')} itself: leave one of them out.")
    return values | given


def described(options: argparse.Namespace) -> Summary:
    """What the workload is, whatever the model.

    Raises:
        ValueError: It is wrong.
    """
    dropped = Counter[str]()
    default = served_plan.TRACE if getattr(options, "serve", None) is not None else preset(options)["trace"]
    return Summary.of(workload_of(options, default=default).requests(dropped), dropped)


def read_workloads(
    workload: Workload, config: Mapping[str, Any], seeds: Sequence[int], dropped: Counter[str]
) -> tuple[tuple[RequestSpec, ...], ...]:
    """Requests for every seed, in the model's vocabulary and as long as its context allows; equal ones are read once.

    Raises:
        ValueError: The workload is wrong or does not fit the model.
    """
    vocab, context = number_in(config, "vocab_size"), config.get("max_position_embeddings")
    read = {
        seed: replace(workload, seed=seed).prompted(vocab, dropped, context_tokens=context)
        for seed in dict.fromkeys(seeds)
    }
    return tuple(read[seed] for seed in seeds)


def check_options(given: dict[str, Any], accelerator: str) -> None:
    """Check what stands alone.

    Raises:
        ValueError: An option is wrong.
    """
    _check_arms(given, accelerator)
    if given["check_exact"] and not given["model"] and given["random_model"] in DUMMY:
        raise ValueError("--check-exact needs weights: name a --model, or a smaller --random-model.")
    for name in ("repeats", "max_num_seqs", "threads", "limit_s", "warm_up_s"):
        if given[name] is None:
            continue
        if not given[name] > 0 or math.isinf(given[name]):
            raise ValueError(f"--{name.replace('_', '-')} must be above 0 and finite.")
    pool_fraction.check_pool_fraction(given["pool_fraction"])
    if given["host_pool_bytes"] < 0:
        raise ValueError("--host-pool-bytes must not be negative; 0 turns swapping off.")


def _check_arms(given: dict[str, Any], accelerator: str) -> None:
    policies, admissions = given["policy"].split(","), given["admission"].split(",")
    for option, names, known in (("policy", policies, POLICIES), ("admission", admissions, ADMISSIONS)):
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"--{option} has no {unknown[0]!r}: use some of {', '.join(known)}.")
        if len(set(names)) != len(names):
            raise ValueError(f"--{option} names an arm twice: name each once.")
    if OFFLOAD in policies and admissions != [FIRST_COME]:
        raise ValueError(f"The arm {OFFLOAD} is vLLM's own and knows {FIRST_COME} alone: leave it or --admission out.")
    if accelerator == "cpu" and (OFFLOAD in policies or (not given["model"] and given["random_model"] in DUMMY)):
        raise ValueError(
            f"The arm {OFFLOAD} and the models {', '.join(DUMMY)} need an NVIDIA GPU: leave them out here."
        )


def ample_blocks(requests: Sequence[RequestSpec], max_num_seqs: int) -> int:
    """KV blocks with which nothing is ever preempted: the largest requests at their full length, and vLLM's null block."""
    blocks = sorted((-(-request.num_tokens // BLOCK_SIZE) for request in requests), reverse=True)
    return sum(blocks[:max_num_seqs]) + 1


def measure(plan: Plan, scratch: Path, say: Say, progress: Progress) -> dict[str, Any]:
    """Run everything that is not done yet; return the report, of whole repeats alone where it was interrupted.

    Raises:
        RuntimeError: An engine failed.
        KeyboardInterrupt: No repeat was whole.
    """
    machine, arms, repeats = machine_facts(), tuple(plan.arms), len(plan.workloads)
    alone = progress.part("alone", lambda: measure_alone(plan, scratch, say))
    ample = list(map(RunResult.of, alone["ample"]))
    demand = math.ceil(statistics.median(result.peak_kv_blocks for result in ample))
    num_blocks = plan.pool_blocks(demand)
    say(f"  peak {demand} blocks; arms get {num_blocks}, one of them vLLM's null block")
    try:
        run_arms(plan, scratch, num_blocks, say, progress)
    except KeyboardInterrupt:
        if not full_repeats(arms, repeats, progress):
            raise
    done = full_repeats(arms, repeats, progress)
    report: dict[str, Any] = {
        "benchmark": "preemption",
        "machine": machine | alone["versions"] | {"load_average_at_end": os.getloadavg()[0]},
        "settings": plan.as_report() | {"demand_kv_blocks": demand, "num_kv_blocks": num_blocks},
        "calibration": alone["calibration"] | {"check": alone["check"]},
        "interval": INTERVAL,
        "command": command_line(),
    }
    runs = {arm: list(map(RunResult.of, of)) for arm, of in runs_of(arms, done, progress).items()}
    report |= arms_report(plan, runs, Calibration(**alone["calibration"]), ample, num_blocks=num_blocks)
    return report | ({} if done == repeats else {"partial": True, "partial_repeats": done})


def arms_report(
    plan: Plan, runs: Mapping[str, Sequence[RunResult]], calibration: Calibration, ample: Sequence[RunResult],
    *, num_blocks: int,
) -> dict[str, Any]:  # fmt: skip
    """What a report says of the arms, and of the others against stock.

    Args:
        ample: What each different workload gave in memory that suffices for everything.
        num_blocks: KV blocks of every arm.
    """
    weights, stock = plan.workload.weights(), plan.stock_arm
    base = dict(zip(dict.fromkeys(plan.workloads), ample, strict=True))
    by_arm = {
        arm: [figures(result.records, calibration, run_end_s=result.run_end_s, weights=weights) for result in results]
        for arm, results in runs.items()
    }
    told: dict[str, dict[str, Any]] = {}
    for arm, results in runs.items():
        told[arm] = {"repeats": []}
        for one, result in zip(by_arm[arm], results, strict=True):
            rest = asdict(result)
            del rest["tokens"]
            told[arm]["repeats"].append(asdict(one) | rest | _against_bound(one, plan.pair_bound(arm, num_blocks)))
        if plan.check_exact:
            pairs = zip(results, plan.workloads, strict=False)  # an interrupted benchmark has fewer repeats
            told[arm]["requests_with_other_tokens"] = sum(
                differing(result, base[workload]) for result, workload in pairs
            )
    step_us = {arm: [result.scheduler["us_median_with_most_running"] for result in runs[arm]] for arm in runs}
    return {
        "arms": told,
        "ratio_to_stock": ratios_to_stock(by_arm, stock),
        "added_scheduler_us_per_step": {
            arm: difference_to_stock(step_us[arm], step_us[stock]) for arm in runs if stock is not None and arm != stock
        },
    }


def _against_bound(one: Figures, bound: float | None) -> dict[str, Any]:
    """A run's gap in service against the bound, with the names of `cluster.fairness_watch`, where a bound is stated."""
    if bound is None:
        return {}
    gap = one.max_service_gap
    return {"fairness": {"max_service_gap": gap, "bound": bound, "gap_over_bound": gap / bound}}


def differing(result: RunResult, base: RunResult) -> int:
    """Requests whose tokens, as far as they were delivered, are not those of the base run."""
    return sum(tokens != base.tokens[name][: len(tokens)] for name, tokens in result.tokens.items())
