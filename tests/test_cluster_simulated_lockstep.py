"""Goal: the simulated engine schedules exactly what vLLM's own scheduler does.

Method: both get the same arrivals at the same steps, a runner that only counts gives every sampled token, and both must say
the same of every step: who computes how many tokens, in which order, and who was preempted.
"""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cluster.simulated_engine import SimulatedEngine
from cluster.simulated_preemption import SimulatedPreemption
from cluster.simulated_request import SimulatedRequest, prefix_keys
from cluster.simulated_step import SimulatedSettings
from cluster.simulated_swaps import SimulatedSwaps
from cluster.simulated_time import LinearTimes, StepTimes
from cost_service.snapshot import CostSnapshot
from cost_service.traces import HASH_TOKENS, TraceRequest
from replicas.config import PreemptionPolicy, SwapConfig
from replicas.preemptor import Preemptor
from tests.engine_runs import BLOCK_SIZE
from tests.scheduler_runs import StampingRunner, build_scheduler

StepSeen = tuple[list[tuple[str, int]], list[str]]

ALL_ALIKE = LinearTimes(fixed_s=1.0)


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
    settings: dict[str, Any] = field(default_factory=dict)

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


def of_vllm(scheduler: Any, case: Case, execute: Any = None) -> Iterator[StepSeen]:
    """Run vLLM's scheduler; yield what each step that schedules anybody is."""
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
        while arrivals and arrivals[-1].step <= step:
            one = arrivals.pop()
            params = SamplingParams(max_tokens=one.output_tokens, ignore_eos=True, detokenize=False)
            scheduler.add_request(
                Request(one.name, list(one.prompt), params, None, arrival_time=float(one.name), block_hasher=hasher)
            )
        for name in [name for name in scheduler.requests if leaves[name] == step]:
            scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
        output = scheduler.schedule()
        tokens = output.num_scheduled_tokens
        yield list(tokens.items()), list(preempted)
        preempted.clear()
        step += 1
        if execute is not None:
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
    times: StepTimes = ALL_ALIKE,
) -> Iterator[StepSeen]:
    """Run the simulated engine; yield the same."""
    seen: list[StepSeen] = []
    engine = SimulatedEngine(settings, times, preemption=preemption, observe=lambda *step: seen.append(step))
    arrivals = case.arrivals()[::-1]
    leaving: dict[int, list[SimulatedRequest]] = {}
    now_s = 0.0
    for step in range(case.steps):
        while arrivals and arrivals[-1].step <= step:
            one = arrivals.pop()
            asked = TraceRequest(
                arrival_s=0.0, tenant="", prompt_tokens=len(one.prompt), output_tokens=one.output_tokens,
                prefix_hashes=one.prefix_hashes,
            )  # fmt: skip
            keys = prefix_keys(asked, block_size=BLOCK_SIZE)
            request = SimulatedRequest(
                one.name, tenant="", arrival_s=float(one.name), prompt_tokens=len(one.prompt),
                output_tokens=one.output_tokens, prefix_keys=keys,
            )  # fmt: skip
            engine.add(request, now_s)
            leaving.setdefault(one.leaves, []).append(request)
        for request in leaving.pop(step, []):
            engine.abort(request, now_s)
        if engine.next_s < math.inf:
            now_s = engine.next_s
            engine.run(now_s)
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


COSTS = CostSnapshot(
    version=1, model="tiny", hardware="cpu", parallelism=1, block_size=BLOCK_SIZE, recompute_fixed_s=0.01,
    ridge_tokens=0.0, token_s=1e-3, attention_s=0.0, swap_fixed_s=1e-3, out_block_s=1e-3, in_block_s=1e-3,
)  # fmt: skip

CASES = {
    "pressure": Case(seed=1),
    "pressure, prefix cache": Case(seed=2, settings={"enable_prefix_caching": True}),
    "small chunks": Case(seed=3, settings={"enable_prefix_caching": True, "max_num_batched_tokens": 64}),
    "small chunks, nothing reserved": Case(
        seed=4, settings={"max_num_batched_tokens": 64, "scheduler_reserve_full_isl": False}
    ),
    "no chunks": Case(
        seed=5, settings={"enable_chunked_prefill": False, "max_num_batched_tokens": 2048}
    ),
    "no chunks, prefix cache": Case(
        seed=6, settings={"enable_chunked_prefill": False, "max_num_batched_tokens": 2048, "enable_prefix_caching": True}
    ),
    "shared prefixes": Case(
        seed=7, shared=True, num_blocks=100, settings={"enable_prefix_caching": True, "max_num_batched_tokens": 256}
    ),
    "shared prefixes, small pool": Case(
        seed=8, shared=True, num_blocks=60, interval=6.0,
        settings={"enable_prefix_caching": True, "max_num_batched_tokens": 128},
    ),
    "few places": Case(seed=11, settings={"max_num_seqs": 6, "enable_prefix_caching": True}, num_blocks=28),
    "watermark": Case(seed=9, settings={"watermark": 0.1, "enable_prefix_caching": True}),
    "no pressure": Case(seed=10, num_blocks=2000, shared=True, settings={"enable_prefix_caching": True}),
}  # fmt: skip


QUICK = "shared prefixes"
"""What runs with the fast tests."""


def _marked(name: str) -> Any:
    return pytest.param(name, marks=[] if name == QUICK else [pytest.mark.engine])


@pytest.mark.parametrize("name", map(_marked, CASES))
def test_every_step_is_the_one_that_vllms_scheduler_schedules(tiny_model: Path, name: str) -> None:
    case = CASES[name]
    arguments = {"max_num_seqs": 32, "max_num_batched_tokens": 512, "max_model_len": 2048} | case.settings
    scheduler = build_scheduler(
        tiny_model, num_blocks=case.num_blocks, asynchronous=False, settings={}, stock=True,
        hf_overrides={"max_position_embeddings": 2048}, **arguments,
    )  # fmt: skip
    num_preempted = 0
    both = zip(of_vllm(scheduler, case), of_simulation(settings_of(scheduler), case), strict=True)
    for step, (theirs, ours) in enumerate(both):
        assert ours == theirs, f"step {step}"
        num_preempted += len(ours[1])
    assert num_preempted > 90 or name == "no pressure"


@pytest.mark.engine
@pytest.mark.parametrize("caching", [False, True], ids=["prefix cache off", "prefix cache on"])
@pytest.mark.parametrize(("policy", "host_blocks"), [("recompute", 100), ("swap", 1000), ("swap", 12), ("random", 40)])
def test_every_step_is_the_one_that_our_scheduler_schedules(
    tiny_model: Path, policy: str, host_blocks: int, caching: bool
) -> None:
    # Nobody asks the same twice, for this runner's answers would be the same too, and found in the prefix cache.
    case = Case(seed=20, steps=3000, shared=caching, equal=False, num_blocks=100)
    block_bytes = 2 * BLOCK_SIZE * 2 * 32 * 4
    swap = {"preemption": policy, "host_pool_bytes": host_blocks * block_bytes}
    scheduler = build_scheduler(
        tiny_model, num_blocks=case.num_blocks, asynchronous=False, settings=swap, enable_prefix_caching=caching,
        max_num_batched_tokens=512, max_model_len=2048, hf_overrides={"max_position_embeddings": 2048},
    )  # fmt: skip
    swaps = SimulatedSwaps(
        SwapConfig.from_mapping(swap), COSTS, block_bytes=block_bytes, num_pool_blocks=case.num_blocks
    )
    assert swaps.pool.num_slots == host_blocks
    preemptor = Preemptor(PreemptionPolicy(policy), COSTS, meter=swaps.scheduling.meter)
    simulation = of_simulation(settings_of(scheduler), case, SimulatedPreemption(preemptor, swaps))
    runner = StampingRunner(scheduler)
    for step, (theirs, ours) in enumerate(zip(of_vllm(scheduler, case, runner.execute), simulation, strict=True)):
        assert ours == theirs, f"step {step}"
    assert preemptor.num_preemptions == scheduler.preemptor.num_preemptions
    assert swaps.num_swapped_out_blocks == scheduler.num_swapped_out_blocks
    assert swaps.num_swapped_in_blocks == scheduler.num_swapped_in_blocks
    assert sum(preemptor.num_preemptions.values()) > 50
    assert (swaps.num_swapped_in_blocks > 50) == (policy != "recompute")
