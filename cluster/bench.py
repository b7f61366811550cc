"""`python -m cluster bench`: preemption policies against each other, with real engines on this machine.

Rules:
- The same requests for every arm, in interleaved repeats (`cluster.bench_runs`).
- An idle stock engine with memory for everything comes first: it gives the service times alone, the demand for KV
  blocks, and the tokens that `--check-exact` compares with.
- A benchmark that was stopped goes on where it was, by what it keeps beside its result file. Results name no host and no
  path.
"""

import argparse
import json
import math
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

from cluster import models
from cluster.bench_arm import ADMISSIONS, FIRST_COME, OFFLOAD, STOCK, EngineSettings
from cluster.bench_figures import INTERVAL, Calibration, difference_to_stock, figures, ratio_to_stock, table
from cluster.bench_model import DUMMY, RANDOM_MODELS, model_folder, number_in
from cluster.bench_progress import Progress
from cluster.bench_runs import Plan, Say, measure_alone, run_arms
from cluster.bootstrap import has_nvidia_gpu
from cluster.prompts import RequestSpec
from cluster.records import RunResult
from cluster.report import plot
from cluster.report_pictures import check_plot
from cluster.workload import Workload, add_workload_arguments, workload_of
from cluster.workload_summary import describe
from replicas.config import PreemptionPolicy

POLICIES = (STOCK, *(policy.value for policy in PreemptionPolicy), OFFLOAD)
BLOCK_SIZE = 32  # tokens; the smallest that attention on CPU takes
PRESSURE = {"trace": "synthetic:requests=480,rate=80", "pool_fraction": 0.4, "max_num_seqs": 32}
OFF_PRESSURE = {
    "trace": "synthetic:requests=256,rate=inf,prompt_mean=16,prompt_max=16,output_mean=64,output_max=64,spread=0",
    "pool_fraction": 0.0,
    "max_num_seqs": 256,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--policy", default="stock,swap", metavar="A,B", help=f"arms, of {', '.join(POLICIES)}")
    parser.add_argument(
        "--admission", default=FIRST_COME, metavar="A,B", help=f"orders of those who wait, of {', '.join(ADMISSIONS)}"
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
        "--pool-fraction", type=float, help="KV blocks / peak demand of stock; 0: enough for all (default: 0.4)"
    )
    parser.add_argument("--host-pool-bytes", type=int, default=1 << 28, help="for swapped blocks (default: 256 MiB)")
    parser.add_argument("--max-num-seqs", type=int, help="requests that run at once (default: 32)")
    parser.add_argument("--threads", type=int, default=1, help="threads of an engine (default: 1)")
    parser.add_argument("--limit-s", type=float, default=600.0, help="a run's longest duration (default: 600)")
    parser.add_argument(
        "--off-pressure", action="store_true", help="ample memory and 256 requests at once: what the scheduler costs"
    )
    parser.add_argument(
        "--check-exact", action="store_true", help="compare all tokens with stock's in ample memory (float32, greedy)"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write all results to FILE; `report` makes a page of it"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw distributions to FILE (.svg, .png or .pdf)")
    add_workload_arguments(parser, default=str(PRESSURE["trace"]))


def main(options: argparse.Namespace) -> int:
    """Measure; 0, 1 when an engine failed or a token differed, 2 for a wrong option, 130 when interrupted."""

    def work(scratch: Path, say: Say) -> dict[str, Any]:
        plan = plan_of(options, scratch)
        return measure(plan, scratch, say, Progress(parts_file(options.json), plan.identity()))

    return run_command(options, work, table)


def parts_file(result: Path | None) -> Path | None:
    """Where the parts of an unfinished benchmark are kept; nowhere without a result file."""
    return result and result.with_name(f"{result.name}.parts")


def run_command(
    options: argparse.Namespace,
    work: Callable[[Path, "Say"], dict[str, Any]],
    render: Callable[[dict[str, Any]], str],
) -> int:
    """Run a benchmark in a scratch folder, print its table, write `--json`; return the exit status of `main`.

    With `--describe` it prints what the workload is instead.
    """
    started_s = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started_s:6.1f} s] {text}", file=sys.stderr, flush=True)

    try:
        if options.describe:
            print(described(options))
            return 0
        check_plot(getattr(options, "plot", None))
        with tempfile.TemporaryDirectory(prefix="adaptivellm-") as scratch, _terminated_like_interrupted():
            report = work(Path(scratch), say)
        print(render(report))
        _write(options, report)
    except OSError as error:
        print(f"Error: {error.filename or 'A file'} cannot be used: {error.strerror}.", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted; all engines are ended.", file=sys.stderr)
        return 130
    if any(arm.get("requests_with_other_tokens") for arm in report.get("arms", {}).values()):
        print("Error: tokens differ from those of stock with ample memory.", file=sys.stderr)
        return 1
    return 0


def _write(options: argparse.Namespace, report: dict[str, Any]) -> None:
    """Write the files that were asked for; not every benchmark has a picture."""
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
        cast(Path, parts_file(options.json)).unlink(missing_ok=True)
    if plotted := getattr(options, "plot", None):
        plot(report, plotted)


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def plan_of(options: argparse.Namespace, scratch: Path) -> Plan:
    """Turn options into a plan; a random model is made in `scratch` where no other is given.

    Raises:
        ValueError: An option is wrong, or does not fit the model.
    """
    given = vars(options) | preset(options)
    accelerator = "gpu" if has_nvidia_gpu() else "cpu"
    check_options(given, accelerator)
    workload = workload_of(options, default=given["trace"])
    folder = model_folder(options.model, scratch / "model", config=RANDOM_MODELS[options.random_model])
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
    )
    return Plan(
        policies=tuple(options.policy.split(",")),
        admissions=tuple(options.admission.split(",")),
        workload=workload,
        workloads=workloads,
        dropped=dict(dropped),
        engine=engine,
        pool_fraction=given["pool_fraction"],
        limit_s=options.limit_s,
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


def described(options: argparse.Namespace) -> str:
    """What the workload is, whatever the model.

    Raises:
        ValueError: It is wrong.
    """
    dropped = Counter[str]()
    return describe(workload_of(options, default=preset(options)["trace"]).requests(dropped), dropped)


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
    for name in ("repeats", "max_num_seqs", "threads", "limit_s"):
        if not given[name] > 0 or math.isinf(given[name]):
            raise ValueError(f"--{name.replace('_', '-')} must be above 0 and finite.")
    if not 0 <= given["pool_fraction"] <= 1:
        raise ValueError("--pool-fraction must be between 0 and 1.")
    if given["host_pool_bytes"] < 0:
        raise ValueError("--host-pool-bytes must not be negative; 0 turns swapping off.")
    if (path := given["json"]) and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise ValueError("--json must name a file in a folder that exists: make the folder or name another one.")


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
    """Run everything that is not done yet; return the report.

    Raises:
        RuntimeError: An engine failed.
    """
    machine = machine_facts()
    alone = progress.part("alone", lambda: measure_alone(plan, scratch, say))
    calibration, check = Calibration(**alone["calibration"]), alone["check"]
    ample = dict(zip(dict.fromkeys(plan.workloads), map(RunResult.of, alone["ample"]), strict=True))
    demand = math.ceil(statistics.median(result.peak_kv_blocks for result in ample.values()))
    num_blocks = plan.engine.num_kv_blocks
    if plan.pool_fraction:
        num_blocks = max(math.ceil(plan.pool_fraction * demand) + 1, plan.least_blocks)
    say(f"  peak {demand} blocks; arms get {num_blocks}, one of them vLLM's null block")
    runs = run_arms(plan, scratch, num_blocks, say, progress)
    report: dict[str, Any] = {
        "benchmark": "preemption",
        "machine": machine | alone["versions"] | {"load_average_at_end": os.getloadavg()[0]},
        "settings": plan.as_report() | {"demand_kv_blocks": demand, "num_kv_blocks": num_blocks},
        "calibration": asdict(calibration) | {"check": check},
        "interval": INTERVAL,
        "command": command_line(),
        "arms": {},
        "ratio_to_stock": {},
        "added_scheduler_us_per_step": {},
    }
    by_arm = {
        policy: [figures(result.records, calibration, run_end_s=result.run_end_s) for result in results]
        for policy, results in runs.items()
    }
    step_us = {policy: [result.scheduler["us_median_with_most_running"] for result in runs[policy]] for policy in runs}
    for policy, results in runs.items():
        arm: dict[str, Any] = {"repeats": []}
        report["arms"][policy] = arm
        for one, result in zip(by_arm[policy], results, strict=True):
            rest = asdict(result)
            del rest["tokens"]
            arm["repeats"].append(asdict(one) | rest)
        if plan.check_exact:
            pairs = zip(results, plan.workloads, strict=True)
            arm["requests_with_other_tokens"] = sum(differing(result, ample[workload]) for result, workload in pairs)
        stock = plan.stock_arm
        if stock is not None and policy != stock:
            report["ratio_to_stock"][policy] = ratio_to_stock(by_arm[policy], by_arm[stock])
            report["added_scheduler_us_per_step"][policy] = difference_to_stock(step_us[policy], step_us[stock])
    return report


def command_line() -> str:
    """What was run, with files by their names alone."""
    return " ".join(["python -m cluster", *(text.rpartition("/")[2] for text in sys.argv[1:])])


def machine_facts() -> dict[str, Any]:
    """What a reader must know of the machine; neither its name nor a path."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "load_average_at_start": os.getloadavg()[0],
    }


def differing(result: RunResult, base: RunResult) -> int:
    """Requests whose tokens, as far as they were delivered, are not those of the base run."""
    return sum(tokens != base.tokens[name][: len(tokens)] for name, tokens in result.tokens.items())
