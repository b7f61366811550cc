"""KV connector that keeps swapped-out requests' KV blocks in host memory (shell around `SwapPlanner` and `BlockCopier`).

Rules:
- The scheduler decides and plans, the worker copies. In a step the worker zeroes slots that change hands, then copies out
  (`handle_preemptions`, before anything can overwrite a freed block), then in (`start_load_kv`).
- Without a throttle loads are synchronous: vLLM starts them before the forward pass that reads the blocks, and no request
  waits between steps holding blocks. Over a throttled link they are asynchronous: they end when the link's clock says so
  (`get_finished`); nothing ever sleeps, and a load is planned only when the link is free, so that no block waits in a queue.
- A connector miss is never fatal: the request recomputes (`kv_load_failure_policy: recompute`).
- Stats of this connector feed metrics only; the control channel carries what decisions need.

Source: vLLM 0.29 `distributed/kv_transfer/kv_connector/v1/base.py`, `v1/core/sched/scheduler.py`,
`v1/worker/gpu_model_runner.py` and `v1/worker/kv_connector_model_runner_mixin.py` (order of the calls).
"""

import time
from dataclasses import dataclass, field
from typing import Any

from replicas.config import SwapConfig
from replicas.host_pool import HostBlockPool
from replicas.parent_watch import watch_parent
from replicas.swap_planner import SwapPlan, SwapPlanner
from replicas.throttled_link import Direction, LinkSettings, ThrottledLink
from replicas.vllm_block_copy import BlockCopier, bytes_per_block
from replicas.vllm_internals import KVConnectorBase_V1, KVConnectorMetadata, KVConnectorRole, Request, SchedulerOutput


@dataclass
class SwapMetadata(KVConnectorMetadata):
    """One step's copies, from the scheduler to every worker."""

    plan: SwapPlan = field(default_factory=SwapPlan)
    loads: list[tuple[str, float]] = field(default_factory=list)
    """Asynchronous loads of this step: request, and when it counts as done (`time.monotonic`)."""


class SwapConnector(KVConnectorBase_V1):
    """vLLM KV connector for `kv_connector_module_path: replicas.vllm_swap`. Settings: `replicas.config.SwapConfig`."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.config = SwapConfig.from_mapping(self._kv_transfer_config.kv_connector_extra_config)
        self._block_bytes = bytes_per_block(kv_cache_config)
        # An unlimited host pool is of no use beyond a few times the device's own.
        self.num_slots = min(self.config.host_pool_bytes // self._block_bytes, 64 * kv_cache_config.num_blocks)
        self._scheduling: _SchedulerSide | None = None
        self._working: _WorkerSide | None = None
        if role is KVConnectorRole.SCHEDULER:
            self._scheduling = _SchedulerSide(
                self.config, self.num_slots, self._block_bytes, block_size=vllm_config.cache_config.block_size
            )
        else:
            watch_parent()

    @property
    def requires_kv_delivery(self) -> bool:
        """False: a preempted request's tokens in flight stay valid, its KV is only moved (base class: producer role)."""
        return False

    # Scheduler side

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens to load beyond vLLM's own prefix cache (None: not yet), and whether the load is asynchronous."""
        if request.skip_reading_prefix_cache:
            return 0, False  # CVE-2026-116180: prompt log-probabilities must never be read over loaded blocks
        return self.scheduling.num_loadable_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Request, blocks: Any, num_external_tokens: int) -> None:
        """Plan the load of a resumed request; a copy that is not wanted any more is released."""
        self.scheduling.load(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> SwapMetadata:
        """Hand the step's plan to the workers."""
        return self.scheduling.take()

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Release what a finished or aborted request still holds in host memory; its device blocks may go at once."""
        self.scheduling.forget(request)
        return False, None

    def reset_cache(self) -> bool:
        """Drop every host copy: the weights or the cache they belong to are gone."""
        self.planning.drop_all()
        return True

    @property
    def scheduling(self) -> "_SchedulerSide":
        """The scheduler's half; only in the scheduler's process."""
        assert self._scheduling is not None, "a scheduler-side call on a worker's connector"
        return self._scheduling

    @property
    def planning(self) -> SwapPlanner:
        """The books of the scheduler's half."""
        return self.scheduling.planner

    # Worker side

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Build the views and the host buffer; called once, before the first step."""
        copier = BlockCopier(kv_caches, num_blocks=self._kv_cache_config.num_blocks, num_slots=self.num_slots)
        self._working = _WorkerSide(copier)

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """Copy victims' blocks out; vLLM calls it every step, before it updates or zeroes any block."""
        assert isinstance(kv_connector_metadata, SwapMetadata), type(kv_connector_metadata)
        self._worker.copy_out(kv_connector_metadata.plan)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Copy resumed requests' blocks in: ahead of the forward pass when anything in the step loads synchronously."""
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, SwapMetadata), type(metadata)
        self._worker.copy_in(metadata)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Requests whose asynchronous load is done."""
        return None, self._worker.take_finished(time.monotonic()) or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks of this step whose load failed; vLLM recomputes their tokens."""
        return self._worker.take_failed_blocks()

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: loads are complete, or ordered by the stream, before the forward pass."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is written through layer by layer."""

    def wait_for_save(self) -> None:
        """Nothing to wait for."""

    @property
    def _worker(self) -> "_WorkerSide":
        assert self._working is not None, "a copy before register_kv_caches"
        return self._working


class _SchedulerSide:
    """Plans copies, and keeps the clock of the throttled link."""

    def __init__(self, config: SwapConfig, num_slots: int, block_bytes: int, *, block_size: int) -> None:
        pool = HostBlockPool(num_slots)
        self.planner = SwapPlanner(pool, block_size=block_size)
        self._block_bytes = block_bytes
        self._link: ThrottledLink | None = None
        if config.throttled_link_bytes_per_s is not None:
            self._link = ThrottledLink(
                LinkSettings(bytes_per_s=config.throttled_link_bytes_per_s, latency_s=config.throttled_link_latency_s)
            )
        self._arrived_s: dict[str, float] = {}
        """When a swapped-out request's copy has left the link."""
        self._loads: list[tuple[str, float]] = []

    def swap_out(self, request: Request, block_ids: list[int]) -> None:
        """Plan the copy of a victim's blocks, whose room was checked when the swap was decided."""
        num_tokens = request.num_computed_tokens
        planned = self.planner.swap_out(request.request_id, num_tokens=num_tokens, block_ids=block_ids)
        assert planned, "a swap was decided that the host pool has no room for"
        if self._link is not None:
            self._arrived_s[request.request_id] = self._link.submit(
                Direction.OUT, self._num_bytes(num_tokens), time.monotonic()
            )

    def num_loadable_tokens(self, request: Request, num_cached_tokens: int) -> tuple[int | None, bool]:
        """See `SwapConnector.get_num_new_matched_tokens`."""
        num_tokens = self.planner.num_loadable_tokens(
            request.request_id, num_tokens=request.num_tokens, num_cached_tokens=num_cached_tokens
        )
        if self._link is None or num_tokens == 0:
            return num_tokens, False
        now_s = time.monotonic()
        if self._arrived_s.get(request.request_id, 0.0) > now_s or self._link.queue_s(Direction.IN, now_s) > 0:
            return None, False
        return num_tokens, True

    def load(self, request: Request, block_ids: list[int], num_external_tokens: int) -> None:
        """See `SwapConnector.update_state_after_alloc`."""
        saved = self.planner.pool.get(request.request_id)
        if saved is None:
            return
        total = min(saved.num_tokens, request.num_tokens - 1)
        self.planner.swap_in(
            request.request_id,
            num_cached_tokens=total - num_external_tokens if num_external_tokens else 0,
            num_loaded_tokens=num_external_tokens,
            block_ids=block_ids,
        )
        self._arrived_s.pop(request.request_id, None)
        if self._link is not None and num_external_tokens:
            # The bytes are copied in this step, so the slots are free after it; only the clock goes on.
            done_s = self._link.submit(Direction.IN, self._num_bytes(num_external_tokens), time.monotonic())
            self._loads.append((request.request_id, done_s))

    def forget(self, request: Request) -> None:
        """The request has finished or was aborted."""
        self.planner.pool.release(request.request_id)
        self._arrived_s.pop(request.request_id, None)

    def _num_bytes(self, num_tokens: int) -> int:
        return self.planner.num_blocks(num_tokens) * self._block_bytes

    def take(self) -> SwapMetadata:
        """Return the step's copies and start the next step's."""
        loads, self._loads = self._loads, []
        return SwapMetadata(self.planner.take_plan(), loads)

    def out_queue_s(self, now_s: float) -> float:
        """Seconds until the throttled link is free for a copy out; 0 without one."""
        return self._link.queue_s(Direction.OUT, now_s) if self._link is not None else 0.0


class _WorkerSide:
    """Executes plans on one worker's memory."""

    def __init__(self, copier: BlockCopier) -> None:
        self._copier = copier
        self._done_s: dict[str, float] = {}
        self._failed_blocks: set[int] = set()

    def copy_out(self, plan: SwapPlan) -> None:
        if plan.out_blocks:
            self._copier.copy_out(plan.out_blocks, plan.out_slots)

    def copy_in(self, metadata: SwapMetadata) -> None:
        plan = metadata.plan
        if plan.in_blocks:
            self._copier.copy_in(plan.in_slots, plan.in_blocks)
        self._done_s.update(metadata.loads)

    def take_finished(self, now_s: float) -> set[str]:
        done = {request_id for request_id, done_s in self._done_s.items() if done_s <= now_s}
        for request_id in done:
            del self._done_s[request_id]
        return done

    def take_failed_blocks(self) -> set[int]:
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed
