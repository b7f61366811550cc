"""The runs of a benchmark: an idle engine that tells service times and demand, then every arm in turns.

Rules:
- One process per arm, all alive, one driven at a time, in an order that rotates from repeat to repeat; in a repeat every
  arm gets the same requests. A warm-up of each arm is not counted.
- Every process is ended by its own handle, whatever happens.
- What is done is kept (`cluster.bench_progress`) and not done again.
"""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from cluster.bench_arm import FIRST_COME, STOCK, Arm, EngineSettings, arm_names
from cluster.bench_figures import Calibration
from cluster.bench_progress import Progress
from cluster.pool_fraction import pool_blocks
from cluster.prompts import RequestSpec
from cluster.records import RequestRecord, RunResult
from cluster.workload import Workload
from cost_service.charges import ServiceUnit
from cost_service.service_messages import ReplicaLimits
from global_scheduler.bound import VictimRule, fairness_bound
from replicas.admission import AdmissionSettings

CALIBRATION_LENGTHS, CALIBRATION_TIMES, CALIBRATION_TOKENS, CHECKED_REQUESTS = 5, 3, 128, 10

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is measured."""

    policies: tuple[str, ...]
    admissions: tuple[str, ...]
    workload: Workload
    workloads: tuple[tuple[RequestSpec, ...], ...]
    """Its requests, for every repeat."""

    dropped: dict[str, int]
    """Requests that were left out of them, by reason."""

    engine: EngineSettings
    """Of the stock arm with memory for everything; the arms differ in policy and number of KV blocks."""

    pool_fraction: float
    limit_s: float
    warm_up_s: float
    """A warm-up's longest duration; what is unfinished then is given up."""

    check_exact: bool

    @property
    def arms(self) -> dict[str, EngineSettings]:
        """Settings of all arms by their names, but for the KV blocks."""
        both = [(admission, policy) for admission in self.admissions for policy in self.policies]
        names = arm_names(self.policies, self.admissions)
        return {
            name: replace(self.engine, policy=policy, admission=admission)
            for name, (admission, policy) in zip(names, both, strict=True)
        }

    @property
    def stock_arm(self) -> str | None:
        """The arm that is vLLM's own."""
        own = [name for name, arm in self.arms.items() if (arm.policy, arm.admission) == (STOCK, FIRST_COME)]
        return own[0] if own else None

    @property
    def least_blocks(self) -> int:
        """KV blocks without which the engine refuses to start: one request of full length, and vLLM's null block."""
        return -(-self.engine.max_model_len // self.engine.block_size) + 1

    def pool_blocks(self, demand: float) -> int:
        """KV blocks of every arm, where so many are the most that stock holds."""
        ample = self.engine.num_kv_blocks
        assert ample is not None, "a plan's own engine has memory for everything"
        return pool_blocks(self.pool_fraction, demand, least=self.least_blocks, ample=ample)

    def pair_bound(self, arm: str, num_blocks: int) -> float | None:
        """What two tenants who wait may be apart by in an arm (`global_scheduler.bound`): the two of the least weights.

        One engine knows at once what it has served, so that no counter is late. None where no bound is stated: in the order
        of arrival, or for one tenant.
        """
        settings, requests = self.arms[arm], [one for workload in self.workloads for one in workload]
        weights = {one.tenant: self.workload.weights().get(one.tenant, 1.0) for one in requests}
        if settings.admission == FIRST_COME or len(weights) < 2:
            return None
        limits = ReplicaLimits(
            num_pool_tokens=(num_blocks - 1) * settings.block_size, max_num_seqs=settings.max_num_seqs,
            max_tokens=max(one.output_tokens for one in requests), max_service_per_s=0.0, max_decode_tokens_per_s=0.0,
        )  # fmt: skip
        bound = fairness_bound(
            [limits], max_input_tokens=max(len(one.prompt_token_ids) for one in requests), interval_s=0.0, round_trip_s=0.0,
            num_granted_tokens=AdmissionSettings().bypass_service / ServiceUnit().output_weight,
            victims=VictimRule.LAST_COME if settings.policy == STOCK else VictimRule.MOST_SERVED,
        )  # fmt: skip
        return bound.pair(*sorted(weights.values())[:2])

    def identity(self) -> list[Any]:
        """What makes two plans the same: what is measured, request by request."""
        return [self.as_report(), [[asdict(request) for request in workload] for workload in self.workloads]]

    def as_report(self) -> dict[str, Any]:
        """Settings as they stand in the result file; of the model's folder only its name."""
        engine = asdict(self.engine) | {"model": Path(self.engine.model).name}
        del engine["policy"], engine["admission"], engine["learn"], engine["memory_share"]
        return (
            engine
            | self.workload.as_report()
            | {
                "policies": list(self.policies),
                "admissions": list(self.admissions),
                "dropped_requests": self.dropped,
                "different_workloads": len(set(self.workloads)),
                "repeats": len(self.workloads),
                "pool_fraction": self.pool_fraction,
                "limit_s": self.limit_s,
                "warm_up_s": self.warm_up_s,
                "check_exact": self.check_exact,
            }
        )


def measure_alone(plan: Plan, scratch: Path, say: Say) -> dict[str, Any]:
    """What an idle stock engine with memory for everything says: service times alone, and the demand for KV blocks."""
    with Arm(plan.engine, scratch / "alone.log") as alone:
        say("Calibrating on an idle stock engine ...")
        calibration, check = calibrate(plan.workloads[0], alone_on(alone, limit_s=plan.limit_s))
        say(f"  median error on {check['requests']} other requests: {100 * check['median_error']:.1f} %")
        say("Measuring the demand for KV blocks ...")
        ample = [asdict(run_ample(plan, alone, workload)) for workload in dict.fromkeys(plan.workloads)]
        return {"calibration": asdict(calibration), "check": check, "ample": ample, "versions": alone.versions}


def calibrate(
    workload: Sequence[RequestSpec], alone: Callable[[RequestSpec], RequestRecord]
) -> tuple[Calibration, dict[str, float]]:
    """Time requests one at a time, at several prompt lengths; check the fit on requests of the workload.

    Args:
        alone: Runs one request, which arrives at once, on an idle stock engine that knows no prefix of it.
    """
    rng = random.Random(0)
    prompts = sorted(workload, key=lambda request: len(request.prompt_token_ids))
    median_output = round(statistics.median(request.output_tokens for request in workload))
    num_output = min(max(2, median_output), CALIBRATION_TOKENS)
    places = [round(i * (len(prompts) - 1) / (CALIBRATION_LENGTHS - 1)) for i in range(CALIBRATION_LENGTHS)]
    chosen = [replace(prompts[place], output_tokens=num_output) for place in places] * CALIBRATION_TIMES
    checked = rng.sample(workload, min(CHECKED_REQUESTS, len(workload)))

    def timed(request: RequestSpec) -> RequestRecord:
        return alone(replace(request, arrival_s=0.0))

    for request in chosen[:CALIBRATION_LENGTHS]:
        timed(request)  # warm-up
    calibration = Calibration.fit([timed(request) for request in chosen])
    return calibration, calibration.check([timed(request) for request in checked])


def alone_on(arm: Arm, *, limit_s: float) -> Callable[[RequestSpec], RequestRecord]:
    """What runs one request on an arm that has nothing else to do."""
    return lambda request: arm.run([request], limit_s=limit_s).records[0]


def run_ample(plan: Plan, arm: Arm, workload: Sequence[RequestSpec]) -> RunResult:
    """Run a workload in memory that suffices for everything."""
    result = arm.run(workload, limit_s=plan.limit_s)
    if sum(record.recomputes for record in result.records):
        raise RuntimeError("Stock preempted with memory for everything: the demand for KV blocks is not known.")
    return result


def run_arms(
    plan: Plan, scratch: Path, num_blocks: int | None, say: Say, progress: Progress | None = None
) -> dict[str, list[RunResult]]:
    """Start all arms, warm them up, and run the repeats that are not done yet in rotating order."""
    progress, names, repeats = progress or Progress(None, None), tuple(plan.arms), len(plan.workloads)
    with ExitStack() as stack:
        arms = {}
        for policy, settings in plan.arms.items() if full_repeats(names, repeats, progress) < repeats else ():
            say(f"Starting arm {policy} ...")
            log = scratch / f"{policy.replace('/', '-')}.log"
            share = replace(settings, num_kv_blocks=num_blocks, memory_share=1 / len(names))
            arms[policy] = stack.enter_context(Arm(share, log))
        for policy, arm in arms.items():
            say(f"Warming up {policy} ...")
            arm.run(plan.workloads[0], limit_s=plan.warm_up_s)

        def run(repeat: int, policy: str) -> dict[str, Any]:
            return asdict(arms[policy].run(plan.workloads[repeat], limit_s=plan.limit_s))

        in_turns(names, repeats, run, say, progress)
    return {arm: list(map(RunResult.of, runs)) for arm, runs in runs_of(names, repeats, progress).items()}


def in_turns(
    arms: Sequence[str], repeats: int, run: Callable[[int, str], dict[str, Any]], say: Say, progress: Progress
) -> None:
    """Run what is not done yet: in every repeat all arms, in an order that rotates.

    Args:
        run: Runs a repeat, counted from 0, of an arm; returns a run as JSON has it, with `records` and `run_end_s`.
    """
    runs = [(repeat, arm) for repeat in range(repeats) for arm in _rotated(arms, repeat)]
    todo = [one for one in runs if not progress.has(_name(*one))]
    if len(todo) < len(runs):
        say(f"{len(runs) - len(todo)} of {len(runs)} runs were done before")
    began_s = time.monotonic()
    for done, (repeat, arm) in enumerate(todo, start=1):
        result = progress.part(_name(repeat, arm), partial(run, repeat, arm))
        rate = sum(record["delivered_tokens"] for record in result["records"]) / result["run_end_s"]
        left_s = (time.monotonic() - began_s) / done * (len(todo) - done)
        say(
            f"[{'#' * (20 * done // len(todo)):<20}] repeat {repeat + 1}/{repeats}, {arm}: "
            f"{result['run_end_s']:.1f} s, {rate:.0f} tokens/s; about {left_s:.0f} s left"
        )


def full_repeats(arms: Sequence[str], repeats: int, progress: Progress) -> int:
    """How many repeats are done by all arms, of the first ones without a gap."""
    gaps = (repeat for repeat in range(repeats) if not all(progress.has(_name(repeat, arm)) for arm in arms))
    return next(gaps, repeats)


def runs_of(arms: Sequence[str], repeats: int, progress: Progress) -> dict[str, list[dict[str, Any]]]:
    """The runs of every arm in its first repeats, which are done, as `in_turns` had them."""
    return {arm: [progress.part(_name(repeat, arm), _missing) for repeat in range(repeats)] for arm in arms}


def _missing() -> Any:
    raise AssertionError("a run that should be done is not")


def _rotated(arms: Sequence[str], repeat: int) -> tuple[str, ...]:
    first = repeat % len(arms)
    return (*arms[first:], *arms[:first])


def _name(repeat: int, arm: str) -> str:
    return f"repeat {repeat + 1}, {arm}"
