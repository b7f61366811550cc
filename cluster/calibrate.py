"""`python -m cluster calibrate`: measure what preemptions of a model cost here, with a real engine and real copies.

An engine with too little memory serves made-up requests in rounds; victims are swapped and recomputed by chance. Each round
is predicted by what the rounds before have taught, every other one without what was learned by size. The folder that
comes of it is read by `python -m cost_service fit` and `evaluate`.
"""

import argparse
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster import models
from cluster.bench_arm import ENVIRONMENT, EngineSettings, read_engine_kwargs
from cluster.bootstrap import has_nvidia_gpu
from cluster.config import DEFAULT_MODEL, GPU_ENVIRONMENT, default_home
from cluster.prompts import RequestSpec
from cluster.workload import Workload
from cost_service.calibration import MeasuredPreemption, preemption_figures, write_calibration
from cost_service.learner import CostLearner
from cost_service.result_file import write_json
from cost_service.samples import Sample, StepSample
from cost_service.snapshot import CostSnapshot
from replicas.preemption_meter import Measurement

BLOCK_SIZE = 32
HOST_POOL_BYTES = {"cpu": 1 << 30, "gpu": 1 << 33}
POOL_FRACTION = 0.3
"""KV blocks, of those that as many of the largest requests as run at once would use."""

TRACE = "synthetic:rate=inf,prompt_mean=150,prompt_max=400,output_mean=100,output_max=200,spread=0.6"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder to write, which must not exist"
    )
    parser.add_argument("--model", default=DEFAULT_MODEL, help="folder of the model (default: that of `make serve`)")
    parser.add_argument(
        "--random-weights", action="store_true", help="read only the model's config.json and make its weights up"
    )
    parser.add_argument(
        "--max-num-seqs", type=int, default=16, help="requests that run at once (default: 16; for a GPU some 64)"
    )
    parser.add_argument(
        "--length-scale",
        type=float,
        default=1.0,
        metavar="F",
        help="factor on the requests' lengths (default: 1, prompts of 150 tokens; for a GPU some 4)",
    )
    parser.add_argument("--engine-kwargs", metavar="JSON", help="further vLLM arguments of the engine")
    parser.add_argument("--rounds", type=int, default=13, help="rounds of requests (default: 13, about five minutes)")
    parser.add_argument("--requests", type=int, default=48, help="requests of a round (default: 48)")
    parser.add_argument("--threads", type=int, default=1, help="OpenMP threads of the engine (default: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured, and how well, to FILE")


def main(options: argparse.Namespace) -> int:
    """Calibrate; 0, or 2 with one sentence when an option is wrong."""
    try:
        report = calibrate(options)
        if options.json is not None:
            write_json(report, options.json)
    except (ValueError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    print(f"Written to {options.output}. Next: python -m cost_service fit --profile {options.output} --json FILE")
    return 0


def calibrate(options: argparse.Namespace) -> dict[str, Any]:
    """Run all rounds and write the folder; return what is in it, and how well preemptions were predicted.

    Raises:
        ValueError: An option is wrong.
    """
    for name in ("rounds", "requests", "threads", "max_num_seqs"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be above 0.")
    if options.output.exists():
        raise ValueError(f"--output {options.output} exists: name a folder that does not.")
    folder = models.require(options.model, default_home())
    if folder is None:
        raise ValueError("--model must be a folder: download the model first.")
    vocabulary = int(str(models.read_config(folder)["vocab_size"]))
    trace = f"{TRACE},requests={options.requests},vocab={vocabulary}"
    workload = Workload(trace=trace, length_scale=options.length_scale)
    rounds = [replace(workload, seed=number).prompted(vocabulary) for number in range(options.rounds)]
    settings = settings_of(folder, rounds, options)
    environment = ENVIRONMENT | (GPU_ENVIRONMENT if settings.accelerator == "gpu" else {})
    os.environ.update(environment | {"OMP_NUM_THREADS": str(options.threads)})  # before vLLM is imported
    measured = measure(settings, rounds)
    options.output.mkdir(parents=True)
    shutil.copy(folder / "config.json", options.output / "config.json")
    write_calibration(options.output, *measured)
    costs, samples, steps, preemptions = measured
    return {
        "model": costs.model, "hardware": costs.hardware, "block_size": costs.block_size, "rounds": options.rounds,
        "samples": len(samples), "steps": len(steps), "figures": preemption_figures(preemptions),
    }  # fmt: skip


def settings_of(folder: Path, rounds: list[tuple[RequestSpec, ...]], options: argparse.Namespace) -> EngineSettings:
    """An engine whose memory is short for these requests."""
    largest = sorted((-(-one.num_tokens // BLOCK_SIZE) for requests in rounds for one in requests), reverse=True)
    accelerator = "gpu" if has_nvidia_gpu() else "cpu"
    return EngineSettings(
        model=str(folder), policy="random",
        num_kv_blocks=max(int(POOL_FRACTION * sum(largest[: options.max_num_seqs])), largest[0] + 1) + 1,
        host_pool_bytes=HOST_POOL_BYTES[accelerator], max_num_seqs=options.max_num_seqs,
        max_model_len=max(one.num_tokens for requests in rounds for one in requests) + 1, block_size=BLOCK_SIZE,
        dtype="auto", load_format="dummy" if options.random_weights else "auto", threads=options.threads,
        accelerator=accelerator, swap={"guard": False}, engine_kwargs=read_engine_kwargs(options.engine_kwargs),
    )  # fmt: skip


def measure(
    settings: EngineSettings, rounds: list[tuple[RequestSpec, ...]]
) -> tuple[CostSnapshot, list[Sample], list[StepSample], list[MeasuredPreemption]]:
    """Serve the rounds; return the costs to begin with, samples, steps, and each preemption as predicted and measured."""
    from vllm import LLM, SamplingParams, TokensPrompt

    # Without a prefix cache: how much of a victim survives in it is chance, and no cost.
    arguments = settings.engine_arguments() | {"enable_prefix_caching": False}
    arguments["served_model_name"] = Path(settings.model).name
    llm = LLM(**arguments)
    core = llm.llm_engine.engine_core.engine_core
    watch = _Watch(core.scheduler)
    preemptor, learner = core.scheduler.preemptor, None
    samples: list[Sample] = []
    preemptions: list[MeasuredPreemption] = []
    for number, requests in enumerate(rounds):
        residual = number % 2 == 1
        if learner is not None:
            learned = learner.refit()
            without = replace(learned, recompute_knots_s=(), out_knots_s=(), in_knots_s=())
            preemptor.costs = learned if residual else without
        print(f"Round {number + 1} of {len(rounds)}", file=sys.stderr)
        llm.generate(
            [TokensPrompt(prompt_token_ids=list(one.prompt_token_ids)) for one in requests],
            [SamplingParams(max_tokens=one.output_tokens, ignore_eos=True, detokenize=False) for one in requests],
        )
        if learner is None:
            start = preemptor.costs  # with the copies that the worker has measured at its start
            learner = CostLearner(start)
        told = preemptor.meter.take_samples()
        learner.observe(told)
        samples += told
        preemptions += [
            MeasuredPreemption(
                round=number, action=one.action.value, residual=residual, predicted_s=one.predicted_s,
                measured_s=one.measured_s,
            )
            for one in watch.take_preemptions()
        ]  # fmt: skip
    core.shutdown()
    return start, samples, watch.steps, preemptions


class _Watch:
    """Looks on while a scheduler works: keeps its steps, and the preemptions that its meter has measured."""

    def __init__(self, scheduler: Any) -> None:
        self.steps: list[StepSample] = []
        self._preemptions: list[Measurement] = []
        self._batch: tuple[int, int, tuple[tuple[int, int], ...]] = (0, 0, ())
        self._meter = scheduler.preemptor.meter
        self._update, self._step, self._take = scheduler.update_from_output, self._meter.step, self._meter.take
        scheduler.update_from_output = self._updated
        self._meter.step, self._meter.take = self._stepped, self._taken

    def take_preemptions(self) -> list[Measurement]:
        """Return what was measured since the last call."""
        taken, self._preemptions = self._preemptions, []
        return taken

    def _updated(self, output: Any, *arguments: Any, **keywords: Any) -> Any:
        cached = {one.req_id: one.num_computed_tokens for one in output.scheduled_new_reqs}
        again = output.scheduled_cached_reqs
        cached |= dict(zip(again.req_ids, again.num_computed_tokens, strict=True))
        work = [(cached[name], new) for name, new in output.num_scheduled_tokens.items()]
        decodes = [before + new for before, new in work if new == 1]
        self._batch = (len(decodes), sum(decodes), tuple(one for one in work if one[1] > 1))
        return self._update(output, *arguments, **keywords)

    def _stepped(self, seconds: float, **keywords: Any) -> float | None:
        num_decodes, decode_tokens, prefills = self._batch
        own_s = seconds - self._meter.step_copies_s
        if own_s > 0.0 and (num_decodes or prefills):
            self.steps.append(
                StepSample(num_decodes=num_decodes, decode_tokens=decode_tokens, prefills=prefills, seconds=own_s)
            )
        return self._step(seconds, **keywords)

    def _taken(self) -> list[Measurement]:
        taken: list[Measurement] = self._take()
        self._preemptions += taken
        return taken
