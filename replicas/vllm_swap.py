"""KV connector that keeps swapped-out requests' KV blocks in host memory (shell around `SwapPlanner` and `BlockCopier`).

Rules:
- The scheduler decides and plans, the worker copies. In a step the worker copies out first (`handle_preemptions`, before
  anything can overwrite a freed block) and in afterwards (`start_load_kv`, before the forward pass that reads the blocks:
  loads are synchronous, so vLLM calls it first and no request waits between steps holding blocks).
- A connector miss is never fatal: the request recomputes.
- Stats of this connector feed metrics only; the control channel carries what decisions need.

Source: vLLM 0.29 `distributed/kv_transfer/kv_connector/v1/base.py`, `v1/core/sched/scheduler.py`,
`v1/worker/gpu_model_runner.py` (order of the calls).
"""

from dataclasses import dataclass, field
from typing import Any

from replicas.config import SwapConfig
from replicas.host_pool import HostBlockPool
from replicas.parent_watch import watch_parent
from replicas.swap_planner import SwapPlan, SwapPlanner
from replicas.vllm_block_copy import BlockCopier, bytes_per_block
from replicas.vllm_internals import KVConnectorBase_V1, KVConnectorMetadata, KVConnectorRole, Request, SchedulerOutput


@dataclass
class SwapMetadata(KVConnectorMetadata):
    """One step's copies, from the scheduler to every worker."""

    plan: SwapPlan = field(default_factory=SwapPlan)


class SwapConnector(KVConnectorBase_V1):
    """vLLM KV connector for `kv_connector_module_path: replicas.vllm_swap`. Settings: `replicas.config.SwapConfig`."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.config = SwapConfig.from_mapping(self._kv_transfer_config.kv_connector_extra_config)
        # An unlimited host pool is of no use beyond a few times the device's own.
        self.num_slots = min(
            self.config.host_pool_bytes // bytes_per_block(kv_cache_config), 64 * kv_cache_config.num_blocks
        )
        self._planner: SwapPlanner | None = None
        self._copier: BlockCopier | None = None
        if role is KVConnectorRole.SCHEDULER:
            self._planner = SwapPlanner(HostBlockPool(self.num_slots), block_size=vllm_config.cache_config.block_size)
        else:
            watch_parent()

    @property
    def requires_kv_delivery(self) -> bool:
        """False: a preempted request's tokens in flight stay valid, its KV is only moved (base class: producer role)."""
        return False

    # Scheduler side

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens to load beyond vLLM's own prefix cache, and False: loads are synchronous."""
        if request.skip_reading_prefix_cache:
            return 0, False  # CVE-2026-116180: prompt log-probabilities must never be read over loaded blocks
        num_tokens = self.planning.num_loadable_tokens(
            request.request_id, num_tokens=request.num_tokens, num_cached_tokens=num_computed_tokens
        )
        return num_tokens, False

    def update_state_after_alloc(self, request: Request, blocks: Any, num_external_tokens: int) -> None:
        """Plan the load of a resumed request; a copy that is not wanted any more is released."""
        planner = self.planning
        saved = planner.pool.get(request.request_id)
        if saved is None:
            return
        total = min(saved.num_tokens, request.num_tokens - 1)
        planner.swap_in(
            request.request_id,
            num_cached_tokens=total - num_external_tokens if num_external_tokens else 0,
            num_loaded_tokens=num_external_tokens,
            block_ids=blocks.get_block_ids()[0],
        )

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> SwapMetadata:
        """Hand the step's plan to the workers."""
        return SwapMetadata(self.planning.take_plan())

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Release what a finished or aborted request still holds in host memory; its device blocks may go at once."""
        self.planning.pool.release(request.request_id)
        return False, None

    def reset_cache(self) -> bool:
        """Drop every host copy: the weights or the cache they belong to are gone."""
        self.planning.drop_all()
        return True

    @property
    def planning(self) -> SwapPlanner:
        """The scheduler's half; only in the scheduler's process."""
        assert self._planner is not None, "a scheduler-side call on a worker's connector"
        return self._planner

    # Worker side

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Build the views and the host buffer; called once, before the first step."""
        self._copier = BlockCopier(kv_caches, num_blocks=self._kv_cache_config.num_blocks, num_slots=self.num_slots)

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """Copy victims' blocks out; vLLM calls it every step, before it updates or zeroes any block."""
        assert isinstance(kv_connector_metadata, SwapMetadata), type(kv_connector_metadata)
        plan = kv_connector_metadata.plan
        if plan.out_blocks:
            self._copying.copy_out(plan.out_blocks, plan.out_slots)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Copy resumed requests' blocks in, ahead of the forward pass."""
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, SwapMetadata), type(metadata)
        plan = metadata.plan
        if plan.in_blocks:
            self._copying.copy_in(plan.in_slots, plan.in_blocks)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: loads are complete, or ordered by the stream, before the forward pass."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is written through layer by layer."""

    def wait_for_save(self) -> None:
        """Nothing to wait for."""

    @property
    def _copying(self) -> BlockCopier:
        assert self._copier is not None, "a copy before register_kv_caches"
        return self._copier
