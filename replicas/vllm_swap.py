"""KV connector that keeps swapped-out requests' KV blocks in host memory (shell around `SwapPlanner` and `BlockCopier`).

Rules:
- The scheduler decides and plans, the worker copies. In a step the worker zeroes slots that change hands, then copies out
  (`handle_preemptions`, before anything can overwrite a freed block), then in (`start_load_kv`).
- Where steps are scheduled one by one (CPU), loads are synchronous: vLLM starts them before the forward pass that reads the
  blocks, and no request waits between steps holding blocks.
- Where steps are scheduled ahead (GPU), they are asynchronous: vLLM cannot take a token back that a step under way samples
  from blocks whose load failed. So they are over a throttled link: they end when the link's clock says so
  (`get_finished`); nothing ever sleeps, and a load is planned only when the link is free within a step, so that no block
  waits in a queue.
- A connector miss is never fatal: the request recomputes (`kv_load_failure_policy: recompute`).
- Stats of this connector feed metrics only; the control channel carries what decisions need.

Source: vLLM 0.29 `distributed/kv_transfer/kv_connector/v1/base.py`, `v1/core/sched/scheduler.py`,
`v1/worker/gpu_model_runner.py` and `v1/worker/kv_connector_model_runner_mixin.py` (order of the calls).
"""

import time
from dataclasses import dataclass, field
from typing import Any

from replicas.config import SwapConfig
from replicas.host_memory import available_memory_bytes
from replicas.parent_watch import watch_parent
from replicas.swap_planner import SwapPlan, SwapPlanner
from replicas.swap_scheduling import SwapScheduling
from replicas.throttled_link import Direction
from replicas.vllm_block_copy import BlockCopier, CopySpeeds, bytes_per_block
from replicas.vllm_internals import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorOutput,
    KVConnectorRole,
    Request,
    SchedulerOutput,
    current_platform,
)
from replicas.vllm_swap_worker import SwapReport, SwapWorker


@dataclass
class SwapMetadata(KVConnectorMetadata):
    """One step's copies, from the scheduler to every worker."""

    plan: SwapPlan = field(default_factory=SwapPlan)
    written_blocks: list[int] | None = None
    """Blocks that are allocated in this step; None: not said."""
    loads: list[tuple[str, float]] = field(default_factory=list)
    """Asynchronous loads of this step: request, and when it counts as done (`time.monotonic`)."""


class SwapConnector(KVConnectorBase_V1):
    """vLLM KV connector for `kv_connector_module_path: replicas.vllm_swap`. Settings: `replicas.config.SwapConfig`."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.config = SwapConfig.from_mapping(self._kv_transfer_config.kv_connector_extra_config)
        self._block_bytes = bytes_per_block(kv_cache_config)
        self._on_cpu = current_platform.is_cpu()
        if self.config.verify_checksums and not self._on_cpu:
            raise ValueError(
                "verify_checksums must be false on a GPU: a copy may still be under way when it is asked for."
            )
        # An unlimited host pool is of no use beyond a few times the device's own.
        self.num_slots = min(self.config.host_pool_bytes // self._block_bytes, 64 * kv_cache_config.num_blocks)
        self._speeds: CopySpeeds | None = None
        self._scheduling: SwapScheduling | None = None
        self._working: SwapWorker | None = None
        if role is KVConnectorRole.SCHEDULER:
            self._scheduling = SwapScheduling(
                self.config, self.num_slots, self._block_bytes, block_size=vllm_config.cache_config.block_size,
                num_pool_blocks=kv_cache_config.num_blocks,
                asynchronous=vllm_config.scheduler_config.async_scheduling,
            )  # fmt: skip
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
        return self.scheduling.num_loadable_tokens(
            request.request_id, num_tokens=request.num_tokens, num_cached_tokens=num_computed_tokens,
            now_s=time.monotonic(),
        )  # fmt: skip

    def update_state_after_alloc(self, request: Request, blocks: Any, num_external_tokens: int) -> None:
        """Plan the load of a resumed request; a copy that is not wanted any more is released."""
        self.scheduling.load(
            request.request_id, num_tokens=request.num_tokens, num_loaded_tokens=num_external_tokens,
            block_ids=blocks.get_block_ids()[0], now_s=time.monotonic(),
        )  # fmt: skip

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> SwapMetadata:
        """Hand the step's plan to the workers."""
        plan, loads = self.scheduling.take()
        return SwapMetadata(plan, None if self._on_cpu else written_blocks(scheduler_output), loads)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Tell the meter what the workers' copies took."""
        report = connector_output.kv_connector_worker_meta
        if report is not None:
            assert isinstance(report, SwapReport), type(report)
            self._speeds = report.speeds
            self.scheduling.lose(report.failed_slots)
            for one in report.transfers:
                self.scheduling.meter.transferred(one.direction, one.num_blocks, one.seconds, shared=one.shared)
            for direction in Direction:
                if report.num_blocks[direction]:
                    self.scheduling.meter.copied(direction, report.num_blocks[direction], report.seconds[direction])

    def take_speeds(self) -> CopySpeeds | None:
        """Return what the workers have measured, once."""
        speeds, self._speeds = self._speeds, None
        return speeds

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Release what a finished or aborted request still holds in host memory; its device blocks may go at once."""
        self.scheduling.forget(request.request_id)
        return False, None

    def reset_cache(self) -> bool:
        """Drop every host copy: the weights or the cache they belong to are gone."""
        self.planning.drop_all()
        return True

    @property
    def scheduling(self) -> SwapScheduling:
        """The scheduler's half; only in the scheduler's process."""
        assert self._scheduling is not None, "a scheduler-side call on a worker's connector"
        return self._scheduling

    @property
    def planning(self) -> SwapPlanner:
        """The books of the scheduler's half."""
        return self.scheduling.planner

    # Worker side

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Build the views and the host buffer; called once, before the first step.

        Raises:
            ValueError: The host has no room for the buffer.
        """
        wanted, free = self.num_slots * self._block_bytes, available_memory_bytes()
        if wanted > free:
            raise ValueError(
                f"host_pool_bytes must fit the host: {wanted / 1e9:.1f} GB are wanted and {free / 1e9:.1f} GB free."
            )
        copier = BlockCopier(kv_caches, num_blocks=self._kv_cache_config.num_blocks, num_slots=self.num_slots)
        self._working = SwapWorker(copier, verify_checksums=self.config.verify_checksums)

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """Copy victims' blocks out; vLLM calls it every step, before it updates or zeroes any block."""
        assert isinstance(kv_connector_metadata, SwapMetadata), type(kv_connector_metadata)
        self._worker.copy_out(kv_connector_metadata.plan, kv_connector_metadata.written_blocks)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Copy resumed requests' blocks in: ahead of the forward pass when anything in the step loads synchronously."""
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, SwapMetadata), type(metadata)
        self._worker.copy_in(metadata.plan, metadata.loads)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Requests whose asynchronous load is done."""
        return None, self._worker.take_finished(time.monotonic()) or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks of this step whose load failed; vLLM recomputes their tokens."""
        return self._worker.take_failed_blocks()

    def build_connector_worker_meta(self) -> SwapReport | None:
        """What this step's copies took."""
        return self._worker.take_report() or None

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: loads are complete, or ordered by the stream, before the forward pass."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is written through layer by layer."""

    def wait_for_save(self) -> None:
        """Nothing to wait for."""

    @property
    def _worker(self) -> SwapWorker:
        assert self._working is not None, "a copy before register_kv_caches"
        return self._working


def written_blocks(scheduled: SchedulerOutput) -> list[int]:
    """Device blocks that requests get in this step, and may write for the first time."""
    new = [request.block_ids for request in scheduled.scheduled_new_reqs]
    more = [ids for ids in scheduled.scheduled_cached_reqs.new_block_ids if ids is not None]
    return [block for groups in new + more for group in groups for block in group]
