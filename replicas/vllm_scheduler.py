"""vLLM scheduler whose victims are swapped or recomputed by our decision (shell around `replicas.preemption`).

Rules:
- vLLM's `schedule()` is never copied. The seams are few: `_preempt_request` (what happens to a victim), `schedule` and
  `update_from_output` (channel and counters around vLLM's own work), `_free_blocks` (a request's last count),
  `reset_prefix_cache` (nothing survives it).
- Without a connector, a channel or a stamp, nothing differs from vLLM's own scheduler until memory runs out, and then
  only the fate of the victim's blocks does.

Source: vLLM 0.29 `v1/core/sched/scheduler.py` (`_preempt_request`, `_free_request_blocks`), `async_scheduler.py`.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from replicas.channel import EngineEnd
from replicas.config import PreemptionPolicy, parse_policy
from replicas.messages import EngineTotals
from replicas.parent_watch import watch_parent
from replicas.preemption import Action, PreemptionDecision, Victim, decide
from replicas.vllm_internals import AsyncScheduler, Request, Scheduler, SchedulerOutput, SchedulingPolicy
from replicas.vllm_swap import SwapConnector

TOTALS_INTERVAL_S = 0.1
"""Seconds between two messages to the server while the engine works; it also sends when it falls idle."""


class _AdaptiveMixin(Scheduler):
    """What both schedulers add to vLLM's; `super()` is the synchronous or the asynchronous one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        watch_parent()
        self._swap = self.connector if isinstance(self.connector, SwapConnector) else None
        self._policy = self._swap.config.preemption if self._swap else PreemptionPolicy.RECOMPUTE
        self._unsafe = self._why_no_swap()
        self._resetting = False
        if self._swap is not None:
            # vLLM holds freed blocks back while a step may still write them, because it expects connectors to fill them
            # out of order. Ours copies in stream order, and held-back blocks would make one shortage preempt everybody.
            self.defer_block_free = False
        self._channel = EngineEnd.from_environment()
        self._next_totals_s = 0.0
        self._epoch = os.urandom(8).hex()
        self._sequence = 0
        self.num_steps = self.num_scheduled_tokens = 0
        self._num_output_tokens_of_freed = 0
        self.num_preemptions = dict.fromkeys(Action, 0)
        self.num_swapped_out_blocks = self.num_swapped_in_blocks = 0
        self.last_decision: PreemptionDecision | None = None

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """vLLM's step, after what arrived on the channel."""
        if self._channel is not None:
            for message in self._channel.receive():
                self._policy = parse_policy(message.preemption)
        output = super().schedule(*args, **kwargs)
        self.num_steps += 1
        self.num_scheduled_tokens += output.total_num_scheduled_tokens
        if self._swap is not None and (plan := output.kv_connector_metadata.plan):
            self.num_swapped_out_blocks += len(plan.out_blocks)
            self.num_swapped_in_blocks += len(plan.in_blocks)
        return output

    def update_from_output(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's update, then counters and the report to the server."""
        outputs = super().update_from_output(*args, **kwargs)
        if self._channel is not None:
            now_s = time.monotonic()
            # No step follows the one that leaves the engine idle, so its report cannot wait for the interval.
            if now_s >= self._next_totals_s or not self.requests:
                self._next_totals_s = now_s + TOTALS_INTERVAL_S
                self._channel.send(self.totals())
        return outputs

    def _free_blocks(self, request: Request) -> None:
        """Count the request's tokens, then let vLLM forget it: finished, aborted or failed, each comes here once."""
        self._num_output_tokens_of_freed += request.num_output_tokens
        super()._free_blocks(request)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated since the engine started; counted when asked, which is less often than every step."""
        return self._num_output_tokens_of_freed + sum(request.num_output_tokens for request in self.requests.values())

    def _preempt_request(self, request: Request, timestamp: float, drop_stale_output: bool = False) -> None:
        """Decide the victim's fate while its blocks are still its own, then let vLLM preempt it."""
        # Zeroed by vLLM below. Tokens of steps in flight count: their KV is written before any copy of it is made.
        num_computed_tokens = request.num_computed_tokens
        num_blocks = -(-num_computed_tokens // self.block_size)
        victim = Victim(request.request_id, num_computed_tokens, num_blocks)
        decision = decide(
            victim,
            self._policy,
            num_free_host_slots=self._swap.planning.pool.num_free_slots if self._swap else 0,
            unsafe="the cache is being reset" if self._resetting else self._unsafe,
        )
        if decision.action is Action.SWAP:
            assert self._swap is not None, "a swap was decided without a connector"
            (block_ids,) = self.kv_cache_manager.get_block_ids(request.request_id)
            planned = self._swap.planning.swap_out(
                request.request_id, num_tokens=num_computed_tokens, block_ids=block_ids
            )
            assert planned, "a swap was decided that the host pool has no room for"
        if not self._resetting:
            self.num_preemptions[decision.action] += 1
            self.last_decision = decision
        super()._preempt_request(request, timestamp, drop_stale_output)

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        """vLLM's reset. KV from before it is invalid: nothing is swapped in its course and no host copy survives."""
        with self._reset_in_progress():
            return bool(super().reset_prefix_cache(*args, **kwargs))

    @contextmanager
    def _reset_in_progress(self) -> Iterator[None]:
        self._resetting = True
        try:
            if self._swap is not None:
                self._swap.reset_cache()
            yield
        finally:
            self._resetting = False

    def _why_no_swap(self) -> str | None:
        """Why this engine must not swap, or None. Only what tests have shown to be exact is allowed."""
        if self._swap is None:
            return "no SwapConnector is configured"
        if len(self.kv_cache_config.kv_cache_groups) != 1:
            return "several KV cache groups"
        if self.block_size != self._swap.planning.block_size:
            return "context parallelism spreads a block's tokens over several workers"
        if self.num_spec_tokens:
            return "speculative decoding"
        if self.policy is SchedulingPolicy.PRIORITY:
            return "priority scheduling can preempt a request whose blocks are not computed yet"
        if self.use_v2_model_runner:
            return "model runner v2 copies out after it may have overwritten"
        return None

    def totals(self) -> EngineTotals:
        """Gauges of this moment and counters since the engine started."""
        self._sequence += 1
        pool = self._swap.planning.pool if self._swap else None
        block_pool = self.kv_cache_manager.block_pool
        return EngineTotals(
            epoch=self._epoch,
            sequence=self._sequence,
            preemption=self._policy.value,
            num_running=len(self.running),
            num_waiting=len(self.waiting) + len(self.skipped_waiting),
            num_kv_blocks=block_pool.num_gpu_blocks,
            num_free_kv_blocks=block_pool.get_num_free_blocks(),
            num_host_slots=pool.num_slots if pool else 0,
            num_used_host_slots=pool.num_used_slots if pool else 0,
            steps=self.num_steps,
            scheduled_tokens=self.num_scheduled_tokens,
            output_tokens=self.num_output_tokens,
            swaps=self.num_preemptions[Action.SWAP],
            recomputes=self.num_preemptions[Action.RECOMPUTE],
            swapped_out_blocks=self.num_swapped_out_blocks,
            swapped_in_blocks=self.num_swapped_in_blocks,
            dropped_messages=self._channel.num_dropped if self._channel else 0,
        )


class AdaptiveScheduler(_AdaptiveMixin):
    """For engines that schedule synchronously (CPU). `scheduler_cls: replicas.vllm_scheduler.AdaptiveScheduler`."""


class AdaptiveAsyncScheduler(_AdaptiveMixin, AsyncScheduler):
    """For engines that schedule ahead of the running step (GPU; vLLM's default there)."""
