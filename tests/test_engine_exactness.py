"""Goal: whatever happens to a request's KV blocks, every token it delivers is the one that it would have delivered anyway.

Method: one run of vLLM's own scheduler with ample memory is the base. Then real engines (random weights, float32, greedy
and seeded sampling mixed) run the same jobs in a fraction of that memory, while requests are preempted, swapped,
recomputed, aborted, and the cache is reset; all token ids must equal the base's, and both pools must be empty at the end.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.engine_runs import (
    AMPLE_HOST_BYTES,
    BLOCK_SIZE,
    CHUNKED,
    GREEDY,
    JOBS,
    PRESSURE,
    Base,
    Job,
    Stepper,
    assert_nothing_left,
    counters_of,
    differing,
    engine,
    run_engine,
    scheduler_of,
)

pytestmark = pytest.mark.engine

FEW = JOBS[:60]

BLOCK_BYTES = 4 * 2 * BLOCK_SIZE * 2 * 32 * 4
"""Layers, K and V, tokens, heads, head size, bytes: one KV block of the tiny model."""


@pytest.mark.parametrize("prefix_caching", [True, False], ids=["prefix cache on", "prefix cache off"])
@pytest.mark.parametrize(("jobs", "memory"), [(JOBS, PRESSURE), (GREEDY, CHUNKED)], ids=["all jobs", "in chunks"])
def test_every_token_is_the_same_when_all_victims_are_swapped(
    tiny_model: Path, base: Base, jobs: list[Job], memory: dict[str, Any], prefix_caching: bool
) -> None:
    run = run_engine(tiny_model, "swap", jobs, enable_prefix_caching=prefix_caching, **memory)
    assert differing(jobs, run.tokens, base) == []
    assert run.swaps >= len(jobs) // 2
    assert run.recomputes == 0
    assert run.swapped_out_blocks >= run.swaps
    if prefix_caching:
        assert 0 < run.swapped_in_blocks < run.swapped_out_blocks  # some of them are still in the engine's own cache
    else:
        assert (
            run.swapped_out_blocks < run.swapped_in_blocks
        )  # what host memory has of a request is not copied out again
        # No token is computed twice. The last one of a job is delivered without being computed with.
        assert run.scheduled_tokens == sum(len(job.prompt) + job.max_tokens - 1 for job in jobs)


def test_the_tokens_would_show_it_if_blocks_did_not_come_back(tiny_model: Path, base: Base) -> None:
    """Of the method itself: the same run with the copies in left out must not pass for the base's."""
    with engine(tiny_model, "swap", enable_prefix_caching=False, **PRESSURE) as llm:
        worker_connector()._worker._copier.copy_in = lambda slots, blocks, synchronous: lambda: True
        stepper = Stepper(llm, FEW)
        preempted: set[int] = set()
        while stepper.busy:
            stepper.step()
            preempted.update(stepper.swapped_out)
        assert len(differing_finished(stepper, base)) >= 0.8 * len(preempted)
        assert set(differing_finished(stepper, base)) <= preempted


def test_a_host_pool_too_small_for_all_gives_a_mix_of_swaps_and_recomputes(tiny_model: Path, base: Base) -> None:
    run = run_engine(tiny_model, "swap", FEW, host_bytes=4 * BLOCK_BYTES, **PRESSURE)
    assert differing(FEW, run.tokens, base) == []
    assert run.swaps >= 5
    assert run.recomputes >= 5


def test_without_a_host_pool_every_victim_recomputes(tiny_model: Path, base: Base) -> None:
    run = run_engine(tiny_model, "swap", FEW, host_bytes=0, **PRESSURE)
    assert differing(FEW, run.tokens, base) == []
    assert (run.swaps, run.swapped_out_blocks) == (0, 0)
    assert run.recomputes >= 20


def test_with_request_priorities_every_victim_recomputes(tiny_model: Path, base: Base) -> None:
    run = run_engine(tiny_model, "swap", FEW, scheduling_policy="priority", enable_prefix_caching=False, **PRESSURE)
    assert differing(FEW, run.tokens, base) == []
    assert run.swaps == 0
    assert run.recomputes >= 20


def test_an_engine_that_must_not_swap_says_why(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.core.sched.request_queue import SchedulingPolicy

    with engine(tiny_model, "swap") as llm:
        scheduler = scheduler_of(llm)
        assert scheduler._why_no_swap() is None
        for attribute, value, reason in [
            ("num_spec_tokens", 1, "speculative"),
            ("policy", SchedulingPolicy.PRIORITY, "priority"),
            ("use_v2_model_runner", True, "v2"),
            ("block_size", 2 * BLOCK_SIZE, "context parallelism"),
            ("_swap", None, "no SwapConnector"),
        ]:
            with monkeypatch.context() as changes:
                changes.setattr(scheduler, attribute, value)
                assert reason in (scheduler._why_no_swap() or "")


def test_the_very_bytes_of_a_block_come_back_though_freed_blocks_are_overwritten_at_once(
    tiny_model: Path, base: Base
) -> None:
    with engine(tiny_model, "swap", enable_prefix_caching=False, **PRESSURE) as llm:
        left: dict[int, bytes] = {}
        num_checked = 0
        connector = worker_connector()
        most = 64 * PRESSURE["num_blocks"]  # a larger host pool would never be filled
        assert connector.num_slots == scheduler_of(llm)._swap.num_slots == most < AMPLE_HOST_BYTES // BLOCK_BYTES
        copier = connector._worker._copier
        copy_out, copy_in = copier.copy_out, copier.copy_in
        handle_preemptions = connector.handle_preemptions
        free_queue = scheduler_of(llm).kv_cache_manager.block_pool.free_block_queue

        def poison_free_blocks_after(metadata: Any) -> None:
            handle_preemptions(metadata)
            free = [block.block_id for block in free_queue.get_all_free_blocks()]
            for rows in copier._device_rows:
                rows[free] = 0x47  # as a float about 51,000: no token would survive reading it

        def watched_copy_out(blocks: list[int], slots: list[int]) -> None:
            copy_out(blocks, slots)
            left.update(zip(slots, map(block_bytes, blocks), strict=True))

        def watched_copy_in(slots: list[int], blocks: list[int], *, synchronous: bool) -> Any:
            nonlocal num_checked
            is_done = copy_in(slots, blocks, synchronous=synchronous)
            for slot, block in zip(slots, blocks, strict=True):
                assert block_bytes(block) == left[slot]
                num_checked += 1
            return is_done

        def block_bytes(block: int) -> bytes:
            """Read through the attention layers' own tensors, of shape (num_blocks, ...) or (2, num_blocks, ...)."""
            parts = [
                cache[block] if cache.shape[0] == PRESSURE["num_blocks"] else cache[:, block]
                for cache in kv_caches_of(llm)
            ]
            data = b"".join(part.contiguous().numpy().tobytes() for part in parts)
            assert len(data) == BLOCK_BYTES == copier.block_bytes
            return data

        copier.copy_out, copier.copy_in = watched_copy_out, watched_copy_in
        connector.handle_preemptions = poison_free_blocks_after
        stepper = Stepper(llm, FEW)
        stepper.finish()
        assert differing_finished(stepper, base) == []
        assert num_checked == counters_of(llm)["swapped_in_blocks"] > 0


def test_requests_aborted_while_swapped_out_running_or_waiting_leave_nothing_and_change_nothing(
    tiny_model: Path, base: Base
) -> None:
    with engine(tiny_model, "swap", **PRESSURE) as llm:
        stepper = Stepper(llm, FEW)
        aborted: set[int] = set()
        num_swapped_out = 0
        while stepper.busy:
            stepper.step()
            victims = stepper.swapped_out[:2]
            if victims and num_swapped_out < 12:
                num_swapped_out += len(victims)
                victims += stepper.running[-1:]
                held = stepper.scheduler._swap.planning.pool.num_used_slots
                stepper.abort(victims)
                aborted.update(victims)
                assert stepper.scheduler._swap.planning.pool.num_used_slots < held
            stepper.scheduler._swap.planning.pool.check()
        assert num_swapped_out >= 10
        assert set(stepper.tokens) == set(range(len(FEW))) - aborted
        assert differing_finished(stepper, base) == []
        assert_nothing_left(llm)


def test_aborting_everybody_under_pressure_empties_both_pools_at_once(tiny_model: Path) -> None:
    with engine(tiny_model, "swap", **PRESSURE) as llm:
        stepper = Stepper(llm, FEW)
        while len(stepper.swapped_out) < 2:
            stepper.step()
        stepper.abort(range(len(FEW)))
        assert_nothing_left(llm)
        stepper.finish()
        assert_nothing_left(llm)


@pytest.mark.parametrize("running_too", [True, False], ids=["running requests too", "host copies only"])
def test_a_cache_reset_swaps_nothing_and_no_host_copy_survives_it(
    tiny_model: Path, base: Base, running_too: bool
) -> None:
    with engine(tiny_model, "swap", **PRESSURE) as llm:
        stepper = Stepper(llm, FEW)
        num_resets = 0
        while stepper.busy:
            stepper.step()
            if stepper.swapped_out and stepper.running and stepper.steps % 10 == 0 and num_resets < 6:
                num_resets += 1
                before = counters_of(llm)
                done = llm.llm_engine.reset_prefix_cache(reset_running_requests=running_too)
                assert done == running_too  # vLLM refuses while running requests hold blocks
                assert counters_of(llm) == before
                assert stepper.swapped_out == []
                assert bool(stepper.running) != running_too
        assert num_resets >= 3
        assert counters_of(llm)["swaps"] > 0
        assert differing_finished(stepper, base) == []
        assert_nothing_left(llm)


def test_prompt_log_probabilities_are_never_read_over_loaded_blocks(tiny_model: Path) -> None:
    """A prompt preempted half-way: what vLLM has not computed since the resume it would read from uninitialised memory.

    Such requests are never swapped; and were one in the host pool all the same, nothing would be loaded for it.
    """
    long_prompts = [job.prompt + job.prompt[::-1] + job.prompt for job in GREEDY if 100 < len(job.prompt) < 160]
    wanting = [Job(prompt=prompt, max_tokens=5, prompt_logprobs=1) for prompt in long_prompts]
    others = [job for job in GREEDY if len(job.prompt) < 100]
    jobs = [job for group in zip(others[::3], others[1::3], others[2::3], wanting, strict=False) for job in group]
    with engine(tiny_model, "stock", max_num_batched_tokens=64) as llm:
        calm = Stepper(llm, jobs)
        calm.finish()
    with engine(tiny_model, "swap", **CHUNKED) as llm:
        stepper = Stepper(llm, jobs)
        half_way = 0
        preempt = stepper.scheduler._preempt_request

        def watched_preempt(request: Any, *args: Any, **kwargs: Any) -> None:
            nonlocal half_way
            half_way += (
                request.skip_reading_prefix_cache and 0 < request.num_computed_tokens < request.num_prompt_tokens
            )
            preempt(request, *args, **kwargs)

        stepper.scheduler._preempt_request = watched_preempt
        num_loadable = 0
        while stepper.busy:
            stepper.step()
            for index in stepper.swapped_out:
                request = stepper.scheduler.requests[stepper.ids[index]]
                assert not jobs[index].prompt_logprobs
                num_loadable += stepper.scheduler.connector.get_num_new_matched_tokens(request, 0)[0]
                request.skip_reading_prefix_cache = True
                assert stepper.scheduler.connector.get_num_new_matched_tokens(request, 0) == (0, False)
                request.skip_reading_prefix_cache = False
        assert half_way, "no such prompt was preempted half-way"
        assert num_loadable > 0
        assert stepper.tokens == calm.tokens
        assert stepper.prompt_logprobs.keys() == calm.prompt_logprobs.keys()
        assert_nothing_left(llm)
    for index, values in calm.prompt_logprobs.items():
        assert stepper.prompt_logprobs[index] == pytest.approx(values, abs=1e-4)


def test_off_pressure_every_step_is_that_of_vllms_own_scheduler(tiny_model: Path) -> None:
    assert trace(tiny_model, "swap", max_num_batched_tokens=64) == trace(tiny_model, "stock", max_num_batched_tokens=64)


def test_under_pressure_the_recompute_policy_takes_the_very_steps_of_vllms_own_scheduler(tiny_model: Path) -> None:
    assert trace(tiny_model, "recompute", **CHUNKED) == trace(tiny_model, "stock", **CHUNKED)


def trace(model: Path, policy: str, **changes: Any) -> list[tuple[list[tuple[int, int]], list[int]]]:
    """Per step: who got how many tokens, in the scheduler's order; and who was running after it."""
    with engine(model, policy, **changes) as llm:
        stepper = Stepper(llm, GREEDY[:60])
        steps: list[tuple[list[tuple[int, int]], list[int]]] = []
        scheduler = scheduler_of(llm)
        schedule = scheduler.schedule

        def watched_schedule(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            tokens = [(stepper.ids.index(name), num) for name, num in output.num_scheduled_tokens.items()]
            steps.append((tokens, stepper.running))
            return output

        scheduler.schedule = watched_schedule
        stepper.finish()
        return steps


def differing_finished(stepper: Stepper, base: Base) -> list[int]:
    """The same of the jobs that were not aborted."""
    return [index for index, ids in stepper.tokens.items() if ids != base[stepper.jobs[index]]]


def worker_connector() -> Any:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group()


def kv_caches_of(llm: Any) -> list[Any]:
    """The attention layers' tensors of the worker, which runs in this process too."""
    executor = llm.llm_engine.engine_core.engine_core.model_executor
    return list(executor.driver_worker.worker.model_runner.kv_caches)
