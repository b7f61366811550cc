"""Goal: with one clock, the simulated engine decides and learns exactly what our scheduler does.

Method: as `test_cluster_simulated_lockstep.py`, but our scheduler's clock is the simulation's, and its copies are said to
take what simulated ones take. So all that hangs on time is held too: prices, the guard, the headroom, and the loads over a
throttled link.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from cluster.simulated_fairness import FairWaiting
from cluster.simulated_preemption import SimulatedPreemption
from cluster.simulated_swaps import SimulatedSwaps
from cluster.simulated_time import LinearTimes
from cost_service.snapshot import CostSnapshot
from replicas.admission import RequestAdmission
from replicas.config import PreemptionPolicy, SwapConfig
from replicas.guard import GuardSettings
from replicas.preemptor import Preemptor
from replicas.throttled_link import Direction, LinkSettings, ThrottledLink
from tests.engine_runs import BLOCK_SIZE
from tests.lockstep_runs import Case, Clock, of_simulation, of_vllm, settings_of
from tests.scheduler_runs import ArrayCopier, StampingRunner, build_scheduler

pytestmark = pytest.mark.engine

BLOCK_BYTES = 2 * BLOCK_SIZE * 2 * 32 * 4

COSTS = CostSnapshot(
    version=1, model="tiny", hardware="cpu", parallelism=1, block_size=BLOCK_SIZE, recompute_fixed_s=1e-3,
    ridge_tokens=20.0, token_s=1e-4, attention_s=1e-8, swap_fixed_s=2e-3, out_block_s=2e-4, in_block_s=2e-4,
)  # fmt: skip

TIMES = LinearTimes(
    fixed_s=0.01,
    decode_s=1e-4,
    context_s=1e-6,
    prefill_fixed_s=1e-3,
    ridge_tokens=20.0,
    token_s=1.2e-4,
    attention_s=1e-8,
)


class LinkedCopier(ArrayCopier):
    """Loads that are done when a link beside the engine has carried them, after the copies out of their step."""

    def __init__(self, copier: ArrayCopier, link: ThrottledLink, clock: Clock) -> None:
        self._blocks, self._slots, self._link, self._clock = copier._blocks, copier._slots, link, clock

    def copy_out(self, blocks: Sequence[int], slots: Sequence[int]) -> None:
        super().copy_out(blocks, slots)
        if blocks:
            self._link.submit(Direction.OUT, len(blocks) * BLOCK_BYTES, self._clock.executed_s)

    def copy_in(self, slots: Sequence[int], blocks: Sequence[int], *, synchronous: bool) -> Callable[[], bool]:
        assert not synchronous, "a load ahead of the step"
        super().copy_in(slots, blocks, synchronous=synchronous)
        done_s = self._link.submit(Direction.IN, len(blocks) * BLOCK_BYTES, self._clock.executed_s).done_s
        return lambda: done_s <= self._clock.now_s


def clocked(runner: StampingRunner, clock: Clock) -> Callable[[Any], Any]:
    """Execute steps whose copies and loads take what simulated ones do."""
    take_finished, take_report = runner.worker.take_finished, runner.worker.take_report

    def report() -> Any:
        said = take_report()
        for direction, rate_s in ((Direction.OUT, COSTS.out_block_s), (Direction.IN, COSTS.in_block_s)):
            if num := said.num_blocks[direction]:
                said.seconds[direction] = COSTS.swap_fixed_s + rate_s * num
        return said

    runner.worker.take_finished = lambda now_s: take_finished(clock.now_s)  # type: ignore[method-assign]
    runner.worker.take_report = report  # type: ignore[method-assign]
    return runner.execute


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """One clock for vLLM's scheduler, ours, and the connector."""
    clock = Clock()
    for module in ("vllm_scheduler", "vllm_admission", "vllm_swap", "vllm_swap_worker"):
        monkeypatch.setattr(f"replicas.{module}.time", clock)
    monkeypatch.setattr("vllm.v1.core.sched.scheduler.time", clock)
    return clock


BESIDE = LinkSettings(bytes_per_s=60 * BLOCK_BYTES, latency_s=0.004)

LINK = {"throttled_link_bytes_per_s": 60 * BLOCK_BYTES, "throttled_link_latency_s": 0.004}


@dataclass(frozen=True, kw_only=True)
class Clocked:
    """A workload, and what hangs on time."""

    case: Case
    policy: str = "adaptive"
    host_blocks: int = 1000
    slow_link: bool = False
    """Whether the engine throttles its copies by itself."""
    beside: bool = False
    """Whether copies go over a link beside the engine, as on a GPU."""
    slowness: float = 1.0
    """Of prefills, against what the costs say."""


def case(seed: int, *, interval: float = 4.0, **changes: Any) -> Case:
    return Case(seed=seed, steps=3000, equal=False, interval=interval, **changes)


CACHING = {"enable_prefix_caching": True}

CASES = {
    "adaptive": Clocked(case=case(30)),
    "adaptive, shared prefixes": Clocked(
        case=case(31, interval=5.0, shared=True, num_blocks=90, output=(100, 300), settings=CACHING)
    ),
    "adaptive, small host": Clocked(case=case(32), host_blocks=20),
    "adaptive, slow link": Clocked(case=case(33), slow_link=True),
    "adaptive, small chunks": Clocked(case=case(36, settings={"max_num_batched_tokens": 64})),
    "adaptive, short answers": Clocked(
        case=case(37, interval=1.5, num_blocks=40, output=(1, 60), settings=CACHING), slow_link=True
    ),
    "adaptive, guarded": Clocked(case=case(38, num_blocks=50, output=(50, 200)), slow_link=True, slowness=6.0),
    "adaptive, beside the engine": Clocked(case=case(39, num_blocks=60), beside=True),
    "swap, beside the engine": Clocked(case=case(40, settings=CACHING), policy="swap", beside=True),
    "swap, slow link": Clocked(case=case(34), policy="swap", slow_link=True),
    "fair, recompute": Clocked(case=case(41, tenants=3), policy="recompute"),
    "fair, adaptive": Clocked(case=case(42, tenants=3)),
    "fair, adaptive, shared prefixes": Clocked(
        case=case(43, tenants=2, interval=5.0, shared=True, num_blocks=90, output=(100, 300), settings=CACHING)
    ),
    "fair, adaptive, long and short prompts": Clocked(
        case=case(
            44, tenants=3, prompt=(1, 500), num_blocks=60, output=(1, 80), settings={"max_num_batched_tokens": 64}
        )
    ),
    "fair, swap, slow link": Clocked(case=case(45, tenants=3), policy="swap", slow_link=True),
    "fair, adaptive, beside the engine": Clocked(case=case(46, tenants=3, num_blocks=60), beside=True),
    "swap, slow link, prefix cache": Clocked(case=case(35, settings=CACHING), policy="swap", slow_link=True),
}


GUARDED = ("adaptive, guarded", "fair, adaptive, beside the engine")


def remembered(preemptor: Preemptor) -> tuple[object, ...]:
    """What decisions hang on beside the candidates."""
    meter = preemptor.meter
    return (
        preemptor.step_s, preemptor.headroom.num_blocks, preemptor.guarded, preemptor.num_guarded_steps,
        preemptor.num_preemptions, preemptor.num_measured, preemptor.predicted_s, preemptor.measured_s,
        meter.resume_wait_s, meter.survival, meter.swap_excess_s, meter.num_open,
    )  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_with_one_clock_both_decide_and_learn_the_same(tiny_model: Path, clock: Clock, name: str) -> None:
    one = CASES[name]
    swap = {
        "preemption": one.policy,
        "host_pool_bytes": one.host_blocks * BLOCK_BYTES,
        **(LINK if one.slow_link else {}),
    }
    scheduler = build_scheduler(
        tiny_model, num_blocks=one.case.num_blocks, asynchronous=False,
        settings=swap | {"cost_snapshot": COSTS.to_json()}, hf_overrides={"max_position_embeddings": 2048},
        **{"max_num_batched_tokens": 512, "max_model_len": 2048} | one.case.settings,
    )  # fmt: skip
    swaps = SimulatedSwaps(
        SwapConfig.from_mapping(swap),
        COSTS,
        block_bytes=BLOCK_BYTES,
        num_pool_blocks=one.case.num_blocks,
        host_link=ThrottledLink(BESIDE) if one.beside else None,
    )
    runner = StampingRunner(scheduler)
    if one.beside:  # the connector of a GPU's engine, under a scheduler that does not schedule ahead
        scheduler._swap.scheduling._asynchronous = True
        runner.worker._copier = LinkedCopier(runner.copier, ThrottledLink(BESIDE), clock)  # type: ignore[assignment]
    preemptor = Preemptor(PreemptionPolicy(one.policy), COSTS, meter=swaps.scheduling.meter, guard=GuardSettings())
    times = replace(TIMES, token_s=one.slowness * TIMES.token_s)
    preemption = SimulatedPreemption(preemptor, swaps)
    waiting = FairWaiting(RequestAdmission(), COSTS) if one.case.tenants else None
    simulation = of_simulation(settings_of(scheduler), one.case, preemption, clock, times, waiting)
    vllm = of_vllm(scheduler, one.case, clocked(runner, clock), clock)
    for step, (ours, theirs) in enumerate(zip(simulation, vllm, strict=True)):
        assert ours == theirs, f"step {step}"
        assert remembered(preemptor) == remembered(scheduler.preemptor), f"step {step}"
        if waiting is not None and step % 50 == 0:
            waiting.settle()
            scheduler.admission.settle()
            both = [admission.core.service.totals() for admission in (waiting, scheduler.admission)]
            tokens = [{account: served[:3] for account, served in one.items()} for one in both]
            assert tokens[0] == tokens[1], f"step {step}"
    assert swaps.num_swapped_in_blocks == scheduler.num_swapped_in_blocks
    assert sum(preemptor.num_preemptions.values()) > 25
    assert (preemptor.num_guarded_steps > 0) == (name in GUARDED)
