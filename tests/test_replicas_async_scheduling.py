"""Goal: with steps scheduled ahead of their results, as on a GPU, preemption loses, repeats and mixes up nothing.

Method: vLLM's asynchronous scheduler with ours on top and a runner that stamps tokens with their positions
(`tests/scheduler_runs.py`); few KV blocks, every policy, and the results up to two steps late.
"""

from pathlib import Path
from typing import Any

import pytest

from replicas.preemption import Action
from tests.engine_runs import mixed_jobs
from tests.faults import Fault, FaultyCopier
from tests.scheduler_runs import StampingRunner, build_scheduler, expected_tokens, run_jobs
from tests.test_engine_policies import COSTS

pytestmark = pytest.mark.engine

JOBS = [job for job in mixed_jobs(200, seed=5) if job.temperature == 0]


def finish(scheduler: Any, *, depth: int, runner: StampingRunner | None = None) -> None:
    """Run all jobs and check every token, and that nothing is left behind."""
    requests = run_jobs(scheduler, JOBS, depth=depth, runner=runner)
    for job, request in zip(JOBS, requests, strict=True):
        assert tuple(request.output_token_ids) == expected_tokens(job), f"request {request.request_id}"
    pool = scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    host = scheduler._swap.planning.pool
    host.check()
    assert host.num_free_slots == host.num_slots


@pytest.mark.parametrize("chunked", [True, False], ids=["prefills in pieces", "whole prefills"])
@pytest.mark.parametrize(("asynchronous", "depth"), [(True, 2), (True, 1), (False, 1)])
@pytest.mark.parametrize("policy", ["recompute", "swap", "random", "adaptive"])
def test_every_token_is_delivered_once_and_right(
    tiny_model: Path, policy: str, asynchronous: bool, depth: int, chunked: bool
) -> None:
    settings = {"preemption": policy, "guard": False, "cost_snapshot": COSTS.to_json()}
    scheduler = build_scheduler(
        tiny_model, num_blocks=24, asynchronous=asynchronous, settings=settings, enable_chunked_prefill=chunked,
        max_num_batched_tokens=64 if chunked else 512,
    )  # fmt: skip
    finish(scheduler, depth=depth)
    done = scheduler.preemptor.num_preemptions
    assert sum(done.values()) >= 25
    assert (done[Action.SWAP] > 0) == (policy != "recompute")


@pytest.mark.parametrize("link", [{}, {"throttled_link_bytes_per_s": 1e9}], ids=["at once", "over a link"])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("prefix_caching", [True, False], ids=["prefix cache on", "prefix cache off"])
@pytest.mark.parametrize("fault", [Fault.ERROR_IN, Fault.SHORT_READ, Fault.ERROR_OUT, Fault.NO_HOST_MEMORY])
def test_what_cannot_be_loaded_is_recomputed(
    tiny_model: Path, fault: Fault, prefix_caching: bool, depth: int, link: dict[str, Any]
) -> None:
    scheduler = build_scheduler(
        tiny_model, num_blocks=24, asynchronous=True, settings={"preemption": "swap", **link},
        enable_prefix_caching=prefix_caching,
    )  # fmt: skip
    runner = StampingRunner(scheduler)
    faulty = runner.worker._copier = FaultyCopier(runner.copier, fault, share=0.2)
    finish(scheduler, depth=depth, runner=runner)
    assert faulty.num_faults >= 3


def test_the_runner_would_notice_blocks_that_did_not_come_back(tiny_model: Path) -> None:
    """Of the method itself."""
    scheduler = build_scheduler(tiny_model, num_blocks=24, asynchronous=True, settings={"preemption": "swap"})
    runner = StampingRunner(scheduler)
    runner.copier.copy_in = lambda slots, blocks, synchronous: lambda: True
    with pytest.raises(AssertionError, match="request"):
        finish(scheduler, depth=2, runner=runner)
