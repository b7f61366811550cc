"""Reads out of vLLM's scheduler what a preemption decision must know (shell; nothing is changed here).

Source: vLLM 0.29 `v1/core/sched/scheduler.py` (`schedule`, the running loop), `v1/core/single_type_kv_cache_manager.py`
(`req_to_blocks`), `v1/core/kv_cache_utils.py` (`KVCacheBlock.ref_cnt`).
"""

from bisect import bisect_left
from collections.abc import Mapping
from typing import Any

from replicas.host_pool import HostBlockPool
from replicas.preemption_cost import Candidate
from replicas.preemption_meter import Prefill
from replicas.request_stamp import remaining_tokens, tenant_in
from replicas.vllm_internals import Request, Scheduler, SchedulerOutput


class MemoryView:
    """KV blocks and requests of one scheduler with one KV cache group."""

    def __init__(self, scheduler: Scheduler) -> None:
        assert len(scheduler.kv_cache_config.kv_cache_groups) == 1, "several KV cache groups"
        self._scheduler = scheduler
        self._pool = scheduler.kv_cache_manager.block_pool
        (manager,) = scheduler.kv_cache_manager.coordinator.single_type_managers
        self._blocks: dict[str, list[Any]] = manager.req_to_blocks
        self._block_size: int = scheduler.block_size
        tokens = scheduler.max_num_scheduled_tokens + scheduler.max_num_running_reqs * scheduler.num_lookahead_tokens
        self._most_needed_beside_one_each = -(-tokens // self._block_size)
        self._only_decodes = False

    def scheduled(self, num_tokens: int) -> None:
        """A step with so many tokens was scheduled: below its budget nobody has more than a token left to compute."""
        scheduler = self._scheduler
        self._only_decodes = (
            num_tokens < scheduler.max_num_scheduled_tokens
            and scheduler.scheduler_config.long_prefill_token_threshold == 0
            and scheduler.num_lookahead_tokens == 0
        )

    @property
    def num_free_blocks(self) -> int:
        return int(self._pool.get_num_free_blocks())

    def num_missing_blocks(self) -> int:
        """Blocks that the running requests want in the next step beyond the free ones; 0 when they all get theirs.

        What vLLM's running loop would ask for, in its order and within its budget. It can be a block more where that loop
        skips a request; never less for decodes and prefills of text models.
        """
        scheduler, free = self._scheduler, self.num_free_blocks
        if self._only_decodes:
            if free >= len(scheduler.running):
                return 0
            # A request that computes one token needs a block where the last one is full.
            size = self._block_size
            return max(0, sum(request.num_computed_tokens % size == 0 for request in scheduler.running) - free)
        if free >= len(scheduler.running) + self._most_needed_beside_one_each:
            return 0
        budget, needed = scheduler.max_num_scheduled_tokens, 0
        long_prefill = scheduler.scheduler_config.long_prefill_token_threshold
        for request in scheduler.running:
            if budget <= 0:
                break
            new = request.num_tokens_with_spec + request.num_output_placeholders - request.num_computed_tokens
            if 0 < long_prefill < new:
                new = long_prefill
            new = min(new, budget, scheduler.max_model_len - request.num_computed_tokens)
            budget -= new
            slots = min(request.num_computed_tokens + new + scheduler.num_lookahead_tokens, scheduler.max_model_len)
            needed += max(0, -(-slots // self._block_size) - len(self._blocks[request.request_id]))
        return max(0, needed - free)

    def candidate(
        self, request: Request, host: HostBlockPool | None, *, survival: float, service: float = 0.0
    ) -> Candidate:
        """The request as a candidate for giving way.

        Args:
            survival: Share of a victim's tokens that is likely to be in the prefix cache when it comes back.
            service: Normalised service of its tenant.
        """
        stamp = stamp_of(request)
        tenant = tenant_in(stamp)
        blocks = self._blocks.get(request.request_id, [])
        # A block is shared only by requests that share all blocks before it too: the counts never rise along the list.
        shares = bool(blocks) and blocks[0].ref_cnt > 1
        num_shared = bisect_left(blocks, True, key=lambda block: block.ref_cnt <= 1) if shares else 0
        num_blocks = -(-request.num_computed_tokens // self._block_size)
        num_host_blocks, num_host_slots = host.room_of(tenant, request.request_id) if host else (0, 0)
        return Candidate(
            request_id=request.request_id,
            tenant=tenant,
            service=service,
            num_tokens=request.num_computed_tokens,
            num_blocks=num_blocks,
            num_freed_blocks=len(blocks) - num_shared,
            num_surviving_tokens=min(
                max(num_shared, int(survival * num_blocks)) * self._block_size, request.num_computed_tokens
            ),
            num_host_blocks=num_host_blocks,
            num_host_slots=num_host_slots,
            num_remaining_tokens=remaining_tokens(stamp, request.num_output_tokens, request.max_tokens),
            num_preemptions=request.num_preemptions,
            # A resumable session's tokens may be replaced, so that its blocks in host memory would be another text's.
            can_load=not request.skip_reading_prefix_cache and not request.resumable,
        )


def stamp_of(request: Request) -> Mapping[str, Any]:
    """What the ingress stamped into the request (`replicas.request_stamp`), among whatever else is there."""
    params = request.sampling_params
    return params.extra_args or {} if params is not None else {}


def tenant_of(request: Request) -> str:
    """The tenant that the ingress stamped into the request; empty without a stamp."""
    return tenant_in(stamp_of(request))


def prefills_of(scheduled: SchedulerOutput) -> list[Prefill]:
    """A step's prefills, also those of requests that end with it."""
    cached, tokens = scheduled.scheduled_cached_reqs, scheduled.num_scheduled_tokens
    first = {request.req_id: request.num_computed_tokens for request in scheduled.scheduled_new_reqs}
    first |= zip(cached.req_ids, cached.num_computed_tokens, strict=True)
    return [Prefill(request_id=name, first=first[name], num_tokens=num) for name, num in tokens.items() if num > 1]
