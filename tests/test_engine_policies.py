"""Goal: every policy, over every kind of memory, delivers the tokens of a run without pressure.

Method: real engines (random weights, float32, greedy and seeded sampling) under every policy, with prefills whole and in
pieces, prefix cache on and off, host pools from none to ample, and over throttled links whose loads end by themselves.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cost_service.snapshot import CostSnapshot
from replicas.decision_log import replay
from tests.engine_runs import (
    AMPLE_HOST_BYTES,
    BLOCK_SIZE,
    CHUNKED,
    GREEDY,
    JOBS,
    PRESSURE,
    Base,
    Run,
    Stepper,
    assert_nothing_left,
    differing,
    engine,
    run_engine,
)

pytestmark = pytest.mark.engine

FEW, FEW_GREEDY = JOBS[:70], GREEDY[:70]
BLOCK_BYTES = 4 * 2 * 32 * 2 * 32 * 4
SMALL_POOL, NO_POOL = 20 * BLOCK_BYTES, 0
MIXED = ("swap", "adaptive", "random")

QUICK = [
    ("adaptive", FEW, PRESSURE, True, AMPLE_HOST_BYTES),
    ("adaptive", FEW_GREEDY, CHUNKED, False, SMALL_POOL),
    ("random", FEW, PRESSURE, False, AMPLE_HOST_BYTES),
    ("random", FEW_GREEDY, CHUNKED, True, SMALL_POOL),
]
ALL = [
    (policy, jobs, memory, prefix_caching, host_bytes)
    for policy in ("stock", "recompute", *MIXED)
    for jobs, memory in ((FEW, PRESSURE), (FEW_GREEDY, CHUNKED))
    for prefix_caching in (True, False)
    for host_bytes in (AMPLE_HOST_BYTES, SMALL_POOL, NO_POOL)
]
COSTS = CostSnapshot(
    version=1, model="", hardware="", parallelism=1, block_size=BLOCK_SIZE, recompute_fixed_s=1e-3, ridge_tokens=0.0,
    token_s=1e-4, attention_s=0.0, swap_fixed_s=1e-4, out_block_s=1e-5, in_block_s=1e-5,
)  # fmt: skip
NAMES = ["policy", "jobs", "memory", "prefix_caching", "host_bytes"]


@pytest.mark.parametrize(NAMES, QUICK)
def test_every_token_is_the_same(
    tiny_model: Path, base: Base, policy: str, jobs: Any, memory: Any, prefix_caching: bool, host_bytes: int
) -> None:
    run = run_engine(tiny_model, policy, jobs, host_bytes=host_bytes, enable_prefix_caching=prefix_caching, **memory)
    assert differing(jobs, run.tokens, base) == []
    if policy == "stock":
        return  # vLLM's own scheduler does not count
    preemptions = run.swaps + run.recomputes
    assert preemptions >= len(jobs) // 4
    if policy in ("swap", "random") and host_bytes == AMPLE_HOST_BYTES:
        assert run.swaps >= 0.3 * preemptions
    if policy == "recompute" or host_bytes == NO_POOL:
        assert run.swaps == 0


@pytest.mark.slow
@pytest.mark.parametrize(NAMES, [case for case in ALL if case not in QUICK])
def test_every_token_is_the_same_in_every_combination(
    tiny_model: Path, base: Base, policy: str, jobs: Any, memory: Any, prefix_caching: bool, host_bytes: int
) -> None:
    test_every_token_is_the_same(tiny_model, base, policy, jobs, memory, prefix_caching, host_bytes)


@pytest.mark.parametrize("bytes_per_s", [3e6, 1e8], ids=["slow link", "fast link"])
@pytest.mark.parametrize("policy", ["swap", "random"])
def test_every_token_is_the_same_when_loads_end_by_themselves(
    tiny_model: Path, base: Base, policy: str, bytes_per_s: float
) -> None:
    run = over_link(tiny_model, policy, bytes_per_s)
    assert differing(FEW, run.tokens, base) == []
    assert run.swaps >= 0.3 * (run.swaps + run.recomputes) > 5
    assert min(run.swapped_in_blocks, run.swapped_out_blocks) > 0


def test_the_adaptive_policy_recomputes_over_a_slow_link_and_swaps_over_a_fast_one(tiny_model: Path) -> None:
    # Differences of seconds: what a busy machine adds to a copy is learned too, and must not turn a decision here.
    def run_over(speed: float) -> Run:
        block_s = BLOCK_BYTES / speed
        costs = replace(COSTS, token_s=0.1, link_out_block_s=block_s, link_in_block_s=block_s)
        return over_link(tiny_model, "adaptive", speed, guard=False, cost_snapshot=costs.to_json())

    slow, fast = run_over(1e2), run_over(1e10)
    assert (slow.swaps, fast.recomputes) == (0, 0)
    assert min(slow.recomputes, fast.swaps) >= 10


def test_every_decision_of_an_engine_is_reproduced_from_its_log(tiny_model: Path, tmp_path: Path) -> None:
    told = {"cost_snapshot": COSTS.to_json(), "decision_log_folder": str(tmp_path)}
    run = run_engine(tiny_model, "adaptive", FEW, swap=told, **PRESSURE)
    (path,) = tmp_path.iterdir()
    result = replay(path.read_bytes().splitlines())
    assert result.num_decisions == run.swaps + run.recomputes >= 10
    assert result.differing_lines == []


def test_requests_that_go_while_their_load_is_on_its_way_leave_nothing_and_change_nothing(
    tiny_model: Path, base: Base
) -> None:
    from vllm.v1.request import RequestStatus

    with engine(tiny_model, "swap", swap={"throttled_link_bytes_per_s": 2e6}, **PRESSURE) as llm:
        stepper, aborted = Stepper(llm, FEW), set()
        while stepper.busy:
            stepper.step()
            loading = [
                index
                for index, name in enumerate(stepper.ids)
                if (request := stepper.scheduler.requests.get(name)) is not None
                and request.status == RequestStatus.WAITING_FOR_REMOTE_KVS
            ]
            if loading and len(aborted) < 6 and stepper.steps % 3 == 0:
                aborted.add(loading[0])
                stepper.abort(loading[:1])
        assert len(aborted) == 6
        assert [
            index for index, ids in stepper.tokens.items() if ids != base[FEW[index]] and index not in aborted
        ] == []
        assert len(stepper.tokens) == len(FEW) - len(aborted)
        assert_nothing_left(llm)


def test_who_holds_blocks_for_a_load_stands_before_those_who_hold_none(tiny_model: Path) -> None:
    from vllm.v1.request import RequestStatus

    with engine(tiny_model, "swap", swap={"throttled_link_bytes_per_s": 2e5}, **PRESSURE) as llm:
        stepper = Stepper(llm, FEW)
        queue = stepper.scheduler.skipped_waiting
        while stepper.busy:
            stepper.step()
            statuses = [request.status for request in queue]
            if 0 < statuses.count(RequestStatus.WAITING_FOR_REMOTE_KVS) < len(statuses):
                break
        for request in sorted(queue, key=lambda one: one.status == RequestStatus.WAITING_FOR_REMOTE_KVS):
            queue.remove_requests([request])
            queue.add_request(request)
        before = list(queue)
        assert before[0].status != RequestStatus.WAITING_FOR_REMOTE_KVS
        admission = stepper.scheduler.admission
        admission.begin_step()
        names = [each.request_id for each in admission.core.order()]
        holders = [one.request_id for one in before if one.status == RequestStatus.WAITING_FOR_REMOTE_KVS]
        rest = [one.request_id for one in before if one.request_id not in holders]
        assert names[: len(holders)] == holders
        assert [name for name in names if name in rest] == rest[: len(names) - len(holders)]  # their own order stays
        stepper.abort(range(len(FEW)))
        stepper.finish()


def over_link(model: Path, policy: str, bytes_per_s: float, **swap: Any) -> Run:
    return run_engine(model, policy, FEW, swap={"throttled_link_bytes_per_s": bytes_per_s, **swap}, **PRESSURE)
