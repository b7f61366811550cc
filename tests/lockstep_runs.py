"""Runs vLLM's scheduler and the simulated engine through the same arrivals, step by step, to compare them."""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from cluster.simulated_engine import SimulatedEngine
from cluster.simulated_fairness import FairWaiting
from cluster.simulated_preemption import SimulatedPreemption
from cluster.simulated_request import SimulatedRequest, prefix_parts
from cluster.simulated_step import SimulatedSettings
from cluster.simulated_time import LinearTimes, StepTimes
from cost_service.traces import HASH_TOKENS, TraceRequest
from replicas.request_stamp import TENANT, make_stamp
from tests.engine_runs import BLOCK_SIZE

StepSeen = tuple[list[tuple[str, int]], list[str]]

TIMES = LinearTimes(fixed_s=0.02, decode_s=1e-4, context_s=1e-6, prefill_fixed_s=5e-3, token_s=3e-4)


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """One request, and the step before which it arrives."""

    name: str
    step: int
    prompt: tuple[int, ...]
    prefix_hashes: tuple[int, ...]
    output_tokens: int
    leaves: int
    """The step before which its client leaves, if it is not done by then."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A workload and the engine that serves it."""

    seed: int
    num_blocks: int = 70
    steps: int = 10_000
    interval: float = 6.0
    """Steps between two arrivals, in the mean."""
    prompt: tuple[int, int] = (1, 120)
    output: tuple[int, int] = (1, 200)
    shared: bool = False
    """Whether prompts begin alike."""
    equal: bool = True
    """Whether some of those prompts are the same from end to end."""
    tenants: int = 0
    """How many, of which each asks for twice as much as the next; 0: requests have no stamps."""
    settings: dict[str, Any] = field(default_factory=dict)

    def stamp(self, one: Arrival) -> dict[str, Any] | None:
        """What the ingress would have stamped into a request."""
        if not self.tenants:
            return None
        chance = random.Random(one.name).random()
        number = min(self.tenants - 1, int(-math.log2(1.0 - chance)))
        length = max(1, round(one.output_tokens * (0.5 + chance)))
        return make_stamp(
            tenant=f"t{number}", user=f"u{int(one.name) % 3}", weight=1.0 + number % 2, median_tokens=length,
            upper_tokens=2 * length,
        )  # fmt: skip

    def arrivals(self) -> list[Arrival]:
        rng = random.Random(self.seed)
        arrivals: list[Arrival] = []
        step = 0.0
        while step < self.steps:
            hashes: tuple[int, ...] = ()
            prompt = tuple(rng.randrange(3, 500) for _ in range(rng.randint(*self.prompt)))
            if self.shared:
                hashes = (rng.randrange(3), 10 + rng.randrange(2))[: rng.randrange(3)]
                # The second hash stands for all tokens up to its end.
                hashes = tuple(hash_ if place == 0 else hashes[0] * 10 + hash_ for place, hash_ in enumerate(hashes))
                prefix = tuple(
                    token for one in hashes for token in random.Random(one).choices(range(500), k=HASH_TOKENS)
                )
                cut = self.equal and prefix and rng.random() < 0.5
                prompt = prefix if cut else prefix + prompt
            arrivals.append(
                Arrival(
                    name=str(len(arrivals)), step=int(step), prompt=prompt, prefix_hashes=hashes,
                    output_tokens=rng.randint(*self.output),
                    leaves=int(step) + (rng.randrange(200) if rng.random() < 0.1 else 1 << 30),
                )
            )  # fmt: skip
            step += rng.expovariate(1 / self.interval) if rng.random() < 0.9 else 0.0
        return arrivals


class Clock:
    """Stands for the module `time` where a scheduler reads it."""

    def __init__(self) -> None:
        self.now_s = self.start_s = self.end_s = 0.0
        """Now, and of the step that the simulation has begun."""
        self.added_s = 0.0
        """When the step's requests arrive."""
        self.executed_s = 0.0
        """When the step began that the scheduler's runner executes."""

    def monotonic(self) -> float:
        return self.now_s


def of_vllm(scheduler: Any, case: Case, execute: Any = None, clock: Clock | None = None) -> Iterator[StepSeen]:
    """Run vLLM's scheduler; yield what each step is."""
    from vllm import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request, RequestStatus

    init_none_hash(sha256)
    hasher = get_request_block_hasher(BLOCK_SIZE, sha256)
    arrivals = case.arrivals()[::-1]
    leaves = {one.name: one.leaves for one in arrivals}
    preempted: list[str] = []
    preempt = scheduler._preempt_request

    def note(request: Any, *args: Any, **kwargs: Any) -> None:
        preempted.append(request.request_id)
        preempt(request, *args, **kwargs)

    scheduler._preempt_request = note
    rng = random.Random(case.seed + 1)
    step = 0
    while step < case.steps:
        if clock is not None:
            clock.now_s = clock.added_s
        while arrivals and arrivals[-1].step <= step:
            one = arrivals.pop()
            params = SamplingParams(
                max_tokens=one.output_tokens, ignore_eos=True, detokenize=False, extra_args=case.stamp(one)
            )
            scheduler.add_request(
                Request(one.name, list(one.prompt), params, None, arrival_time=float(one.name), block_hasher=hasher)
            )
        for name in [name for name in scheduler.requests if leaves[name] == step]:
            scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
        if clock is not None:
            clock.now_s = clock.executed_s = clock.start_s
            end_s = clock.end_s
        output = scheduler.schedule()
        tokens = output.num_scheduled_tokens
        yield list(tokens.items()), list(preempted)
        preempted.clear()
        step += 1
        if execute is not None:
            if clock is not None:
                clock.now_s = end_s
            scheduler.update_from_output(output, execute(output))
            continue
        names = list(tokens)
        sampled = [
            [rng.randrange(3, 500)] if request.num_computed_tokens == request.num_tokens else []
            for request in (scheduler.requests[name] for name in names)
        ]
        scheduler.update_from_output(
            output,
            ModelRunnerOutput(
                req_ids=names, req_id_to_index={name: i for i, name in enumerate(names)}, sampled_token_ids=sampled
            ),
        )


def of_simulation(
    settings: SimulatedSettings,
    case: Case,
    preemption: SimulatedPreemption | None = None,
    clock: Clock | None = None,
    times: StepTimes = TIMES,
    waiting: FairWaiting | None = None,
) -> Iterator[StepSeen]:
    """Run the simulated engine; yield the same."""
    seen: list[StepSeen] = []
    engine = SimulatedEngine(
        settings, times, waiting=waiting, preemption=preemption, observe=lambda *step: seen.append(step)
    )
    arrivals = case.arrivals()[::-1]
    leaving: dict[int, list[SimulatedRequest]] = {}
    now_s = 0.0
    for step in range(case.steps):
        if clock is not None:
            clock.added_s = now_s
        while arrivals and arrivals[-1].step <= step:
            one = arrivals.pop()
            asked = TraceRequest(
                arrival_s=0.0, tenant="", prompt_tokens=len(one.prompt), output_tokens=one.output_tokens,
                prefix_hashes=one.prefix_hashes,
            )  # fmt: skip
            prefix = prefix_parts(asked, block_size=BLOCK_SIZE)
            stamp = case.stamp(one) or {}
            request = SimulatedRequest(
                one.name, tenant=stamp.get(TENANT, ""), stamp=stamp, arrival_s=float(one.name),
                prompt_tokens=len(one.prompt), output_tokens=one.output_tokens, prefix=prefix,
            )  # fmt: skip
            engine.add(request, now_s)
            leaving.setdefault(one.leaves, []).append(request)
        for request in leaving.pop(step, []):
            engine.abort(request, now_s)
        if engine.next_s < math.inf:
            now_s = engine.next_s
            engine.run(now_s)
        if clock is not None and engine.next_s < math.inf:
            clock.start_s, clock.end_s = now_s, engine.next_s
        if step % 50 == 0:
            engine.check()
        yield seen.pop() if seen else ([], [])


def settings_of(scheduler: Any) -> SimulatedSettings:
    """The simulated engine that is to be like a scheduler of vLLM's."""
    config = scheduler.scheduler_config
    return SimulatedSettings(
        num_blocks=scheduler.kv_cache_config.num_blocks,
        block_size=scheduler.block_size,
        max_num_seqs=scheduler.max_num_running_reqs,
        max_num_batched_tokens=scheduler.max_num_scheduled_tokens,
        max_model_len=scheduler.max_model_len,
        enable_prefix_caching=scheduler.cache_config.enable_prefix_caching,
        enable_chunked_prefill=config.enable_chunked_prefill,
        watermark=config.watermark,
        reserve_full_isl=scheduler.scheduler_reserve_full_isl,
    )
