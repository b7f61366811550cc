"""`python -m cluster bench-drift`: how soon the costs are right again after the link to host memory has changed.

A real engine swaps over the connector's throttled link, which becomes slower while it works. What its transfers teach is
learned as the cost service does it, at its interval; each transfer is predicted by the costs that the engine had then.
"""

import argparse
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster import bench
from cluster.bench_arm import ENVIRONMENT
from cluster.bench_command import machine_facts, run_command
from cluster.bench_runs import Say
from cluster.prompts import RequestSpec
from cost_service.learner import CostLearner
from cost_service.samples import LinkSample
from cost_service.service import REFIT_INTERVAL_S
from cost_service.snapshot import CostSnapshot

TRACE = "synthetic:requests=240,rate=inf,prompt_mean=80,prompt_max=300,output_mean=150,output_max=300,spread=0.5"
ASKED_ERROR, ASKED_COPIES = 0.20, 100
NEWEST = 16
"""Transfers whose median error counts as the error at a moment."""


@dataclass(frozen=True, slots=True)
class Judged:
    """A transfer as predicted and measured, and whether the link had changed before it."""

    predicted_s: float
    measured_s: float
    changed: bool

    @property
    def error(self) -> float:
        """Relative to what was measured."""
        return abs(self.predicted_s / self.measured_s - 1.0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    bench.add_engine_arguments(parser)
    parser.set_defaults(policy="swap", random_model="tiny", trace=TRACE, pool_fraction=0.3)
    parser.add_argument("--link-bytes-per-s", type=float, default=2e7, help="speed at first (default: 2e7)")
    parser.add_argument("--change-by", type=float, default=0.25, help="factor on the speed half-way (default: 0.25)")


def main(options: argparse.Namespace) -> int:
    """Measure; exit statuses as `python -m cluster bench`."""
    return run_command(options, lambda scratch, say: measure(options, scratch, say), table, described=bench.described)


def measure(options: argparse.Namespace, scratch: Path, say: Say) -> dict[str, Any]:
    """Serve the requests, change the link half-way, and return the report.

    Raises:
        ValueError: An option is wrong, or there were too few transfers to judge.
    """
    if not 0 < options.change_by < 1e6:
        raise ValueError("--change-by must be above 0, such as 0.25.")
    plan = bench.plan_of(options, scratch)
    largest = sorted((one.num_tokens for one in plan.workloads[0]), reverse=True)[: plan.engine.max_num_seqs]
    blocks = plan.pool_blocks(sum(largest) / plan.engine.block_size)
    settings = replace(
        plan.engine, policy="swap", num_kv_blocks=blocks,
        swap={"guard": False, "throttled_link_bytes_per_s": options.link_bytes_per_s},
    )  # fmt: skip
    os.environ.update(ENVIRONMENT | {"OMP_NUM_THREADS": str(settings.threads)})  # before vLLM is imported
    say(f"Swapping over a link of {options.link_bytes_per_s:g} bytes/s, then {options.change_by:g} times that ...")
    judged = run(settings.engine_arguments(), plan.workloads[0], options.change_by)
    return {
        "benchmark": "drift",
        "link": "SIMULATED: a throttle around real copies and a real engine",
        "machine": machine_facts(),
        "settings": plan.as_report() | {"link_bytes_per_s": options.link_bytes_per_s, "change_by": options.change_by},
        "refit_interval_s": REFIT_INTERVAL_S,
        **figures(judged),
    }


def figures(judged: Sequence[Judged]) -> dict[str, Any]:
    """Errors before the change, right after it, and once it was learned.

    Raises:
        ValueError: Too few transfers on either side of the change.
    """
    before, after = ([one.error for one in judged if one.changed is side] for side in (False, True))
    if min(len(before), len(after)) < 2 * NEWEST:
        raise ValueError("There were too few transfers: raise requests= of --trace, or lower --pool-fraction.")
    medians = [statistics.median(after[end - NEWEST : end]) for end in range(NEWEST, len(after) + 1)]
    wrong = [end for end, median in enumerate(medians) if median > ASKED_ERROR]
    copies = NEWEST + wrong[-1] + 1 if wrong else 0
    return {
        "transfers_before": len(before),
        "transfers_after": len(after),
        "median_error_before": statistics.median(before[len(before) // 2 :]),
        "median_error_right_after": medians[0],
        "median_error_at_the_end": medians[-1],
        "copies_until_right": copies if copies <= len(after) else None,
        "asked": ASKED_COPIES,
        "reached": copies <= ASKED_COPIES,
    }


def run(arguments: dict[str, Any], requests: Sequence[RequestSpec], change_by: float) -> list[Judged]:
    """Serve the requests; return every transfer that the learner was told of."""
    from vllm import LLM, SamplingParams, TokensPrompt

    engine = LLM(**arguments).llm_engine
    core = engine.engine_core.engine_core
    scheduler = core.scheduler
    learner, judged = CostLearner(scheduler.preemptor.costs), list[Judged]()
    changed, refitted_s, num_done = False, time.monotonic(), 0
    for one in requests:
        params = SamplingParams(max_tokens=one.output_tokens, ignore_eos=True, detokenize=False)
        engine.add_request(one.request_id, TokensPrompt(prompt_token_ids=list(one.prompt_token_ids)), params)
    while engine.has_unfinished_requests():
        num_done += sum(output.finished for output in engine.step())
        samples = scheduler.preemptor.meter.take_samples()
        costs = scheduler.preemptor.costs
        judged += [judge(sample, costs, changed=changed) for sample in samples if isinstance(sample, LinkSample)]
        learner.observe(samples)
        if not changed and num_done >= len(requests) // 2:
            changed = True
            scheduler.connector.scheduling.change_link(change_by)
        if time.monotonic() - refitted_s >= REFIT_INTERVAL_S:
            refitted_s = time.monotonic()
            scheduler.preemptor.costs = learner.refit()
    core.shutdown()
    return judged


def judge(sample: LinkSample, costs: CostSnapshot, *, changed: bool) -> Judged:
    """Predict a transfer as a decision would."""
    block_s = costs.link_out_block_s if sample.direction == "out" else costs.link_in_block_s
    predicted_s = costs.link_latency_s + sample.num_blocks * block_s * (1.0 + costs.link_shared_ratio * sample.shared)
    return Judged(predicted_s=predicted_s, measured_s=sample.seconds, changed=changed)


def table(report: dict[str, Any]) -> str:
    """Render the report for a terminal."""
    copies = report["copies_until_right"]
    return "\n".join(
        (
            f"Link {report['link']}",
            f"transfers before and after the change   {report['transfers_before']}, {report['transfers_after']}",
            f"median error before the change          {report['median_error_before']:.1%}",
            f"  of the first {NEWEST} after it              {report['median_error_right_after']:.1%}",
            f"  of the last {NEWEST}                        {report['median_error_at_the_end']:.1%}",
            f"copies until it stays under {ASKED_ERROR:.0%}         {'never' if copies is None else copies}"
            f" (asked: {report['asked']}{'' if report['reached'] else ', missed'})",
        )
    )
