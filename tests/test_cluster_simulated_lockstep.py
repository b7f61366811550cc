"""Goal: the simulated engine schedules exactly what vLLM's own scheduler does.

Method: both get the same arrivals at the same steps, a runner that only counts gives every sampled token, and both must say
the same of every step: who computes how many tokens, in which order, and who was preempted.
"""

from pathlib import Path
from typing import Any

import pytest

from cluster.simulated_preemption import SimulatedPreemption
from cluster.simulated_swaps import SimulatedSwaps
from cost_service.snapshot import CostSnapshot
from replicas.config import PreemptionPolicy, SwapConfig
from replicas.preemptor import Preemptor
from tests.engine_runs import BLOCK_SIZE
from tests.lockstep_runs import Case, of_simulation, of_vllm, settings_of
from tests.scheduler_runs import StampingRunner, build_scheduler

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
    assert sum(preemptor.num_preemptions.values()) > 30
    assert (swaps.num_swapped_in_blocks > 50) == (policy != "recompute")
