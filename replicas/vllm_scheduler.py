"""vLLM scheduler whose victims are swapped or recomputed by our decision (shell around `replicas.preemption`).

Rules:
- vLLM's `schedule()` is never copied. The seams are few: `_preempt_request` (what happens to a victim), `schedule` and
  `update_from_output` (channel and counters around vLLM's own work), `_select_waiting_queue_for_scheduling` and the two
  waiting queues (whose turn it is), `_free_blocks` (a request's last count), `reset_prefix_cache` (nothing survives it).
- Victims are chosen ahead of vLLM's running loop, so that it finds room, by policies that choose them and where tenants are
  told apart. In such a step nobody is admitted, as in any step of vLLM's that preempts: a victim never comes back in the
  step in which it went.
- Blocks are kept free at admission through vLLM's own watermark, set anew in every step.
- Without a connector, a channel or a stamp, nothing differs from vLLM's own scheduler until memory runs out, and then
  only the fate of the victim's blocks does.

Source: vLLM 0.29 `v1/core/sched/scheduler.py` (`_preempt_request`, `_free_request_blocks`), `async_scheduler.py`.
"""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from cost_service.charges import ServiceKind, ServiceUnit
from cost_service.service_messages import ENGINE_INTERVAL_S, heaviest
from replicas.admission import AdmissionSettings, RequestAdmission
from replicas.channel import EngineEnd
from replicas.config import PreemptionPolicy, SwapConfig, parse_policy
from replicas.decision_log import DecisionLog
from replicas.fair_queue import Admission
from replicas.guard import GuardSettings
from replicas.messages import CostSamples, EngineTotals, SetPolicy, SetShares
from replicas.parent_watch import watch_parent
from replicas.preemption import Action, PreemptionDecision
from replicas.preemption_cost import Candidate, Pressure
from replicas.preemptor import Preemptor, Recorder
from replicas.vllm_admission import EngineAdmission
from replicas.vllm_costs import costs_of, newer_costs, with_copies
from replicas.vllm_internals import (
    AsyncScheduler,
    PauseState,
    Request,
    RequestQueue,
    RequestStatus,
    Scheduler,
    SchedulerOutput,
    SchedulingPolicy,
)
from replicas.vllm_memory import MemoryView, prefills_of, tenant_of
from replicas.vllm_swap import SwapConnector

logger = logging.getLogger(__name__)


class _AdaptiveMixin(Scheduler):
    """What both schedulers add to vLLM's; `super()` is the synchronous or the asynchronous one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        watch_parent()
        self._epoch = os.urandom(8).hex()
        self._swap = self.connector if isinstance(self.connector, SwapConnector) else None
        self._unsafe = self._why_no_swap()
        if self._swap is not None and self._unsafe is not None:
            logger.warning("Nothing is swapped in this engine: %s.", self._unsafe)
        config = self._swap.config if self._swap else None
        self.preemptor = Preemptor(
            config.preemption if config else PreemptionPolicy.RECOMPUTE,
            costs_of(self.vllm_config, self.kv_cache_config, config),
            meter=self._swap.scheduling.meter if self._swap else None,
            guard=GuardSettings() if config and config.guard else None,
            record=self._open_log(config.decision_log_folder) if config and config.decision_log_folder else None,
        )
        self.admission = self._ordered(config)
        self._memory = MemoryView(self) if len(self.kv_cache_config.kv_cache_groups) == 1 else None
        self._foresees = self._why_vllm_chooses() is None
        self._decided: dict[str, PreemptionDecision] = {}
        self._resetting = False
        if self._swap is not None:
            # vLLM holds freed blocks back while a step may still write them, because it expects connectors to fill them
            # out of order. Ours copies in stream order, and held-back blocks would make one shortage preempt everybody.
            self.defer_block_free = False
        self._channel = EngineEnd.from_environment()
        if self._channel is not None:  # others of our kind may have learned more than we can know now
            self._channel.send(CostSamples(costs=self.preemptor.costs.to_json(), samples=[]))
        self._next_totals_s = 0.0
        self._sequence = 0
        self.num_steps = self.num_scheduled_tokens = 0
        self._num_output_tokens_of_freed = 0
        self.num_swapped_out_blocks = self.num_swapped_in_blocks = 0
        self.last_decision: PreemptionDecision | None = None
        self._stock_watermark_blocks = self.kv_cache_manager.watermark_blocks
        self._step_began_s: float | None = None
        """End of the step before, or begin of this one; None while the engine has nothing to do."""
        self._reported = (0, 0)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """vLLM's step, after what arrived on the channel and with room made where it was short."""
        if self._channel is not None:
            self._take_messages(self._channel)
        if self._step_began_s is None:
            self._step_began_s = time.monotonic()
        if self.admission is not None:
            self.admission.begin_step()
        self.kv_cache_manager.watermark_blocks = self._stock_watermark_blocks + self.preemptor.headroom.num_blocks
        with self._nobody_admitted() if self._make_room() else nullcontext():
            output = super().schedule(*args, **kwargs)
        if self.admission is not None:
            self.admission.end_step(output)
        self.num_steps += 1
        self.num_scheduled_tokens += output.total_num_scheduled_tokens
        if self._memory is not None:
            self._memory.scheduled(output.total_num_scheduled_tokens)
        if self._swap is not None and (plan := output.kv_connector_metadata.plan):
            self.num_swapped_out_blocks += len(plan.out_blocks)
            self.num_swapped_in_blocks += len(plan.in_blocks)
        return output

    def _select_waiting_queue_for_scheduling(self) -> RequestQueue | None:
        """Whose turn it is, asked by vLLM before each admission."""
        if self.admission is None:
            return super()._select_waiting_queue_for_scheduling()
        return self.admission.select()

    def _ordered(self, config: SwapConfig | None) -> EngineAdmission | None:
        """Take vLLM's waiting queues over; None where requests have priorities, whose order is vLLM's."""
        if self.policy is SchedulingPolicy.PRIORITY:
            return None
        config = config or SwapConfig()
        settings = AdmissionSettings(unit=ServiceUnit(config.service), predicts_output=config.predicts_output)
        return EngineAdmission(self, RequestAdmission(config.admission, settings), self.preemptor)

    def _take_messages(self, channel: EngineEnd) -> None:
        for message in channel.receive():
            if isinstance(message, SetPolicy):
                if message.preemption is not None:
                    self.preemptor.follow(parse_policy(message.preemption))
                if message.admission is not None and self.admission is not None:
                    self.admission.core.follow(message.admission)
            elif isinstance(message, SetShares):
                if self.admission is not None:
                    self.admission.learn(message)
            elif (costs := newer_costs(self.preemptor.costs, message.snapshot)) is not None:
                self.preemptor.costs = costs

    def update_from_output(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        """vLLM's update, then what the step teaches, counters, and the report to the server."""
        outputs = super().update_from_output(scheduler_output, *args, **kwargs)
        now_s = time.monotonic()
        self._learn(scheduler_output, now_s)
        # No step follows the one that leaves the engine idle, so its report cannot wait for the interval.
        if now_s >= self._next_totals_s or not self.requests:
            self._next_totals_s = now_s + ENGINE_INTERVAL_S
            self._report(now_s)
        return outputs

    def _learn(self, scheduled: SchedulerOutput, now_s: float) -> None:
        """Let meter and headroom know how long the step took, and the costs what the workers have measured."""
        if self._swap is not None and (speeds := self._swap.take_speeds()) is not None:
            self.preemptor.costs = with_copies(self.preemptor.costs, speeds)
        began_s, self._step_began_s = self._step_began_s, now_s if self.running else None
        if began_s is None or not scheduled.num_scheduled_tokens:
            return
        tokens = scheduled.num_scheduled_tokens
        prefills = prefills_of(scheduled) if scheduled.total_num_scheduled_tokens > len(tokens) else []
        self.preemptor.step_ended(
            now_s, now_s - began_s, num_decodes=len(tokens) - len(prefills), prefills=prefills,
            num_running=len(self.running),
        )  # fmt: skip
        if self._swap is not None:
            self._swap.scheduling.step_s = now_s - began_s

    def _report(self, now_s: float) -> None:
        """Tell the guard what was delivered since the last report, and the server how things stand."""
        tokens, preemptions = self.num_output_tokens, sum(self.preemptor.num_preemptions.values())
        before_tokens, before_preemptions = self._reported
        self._reported = (tokens, preemptions)
        self.preemptor.report(
            now_s, num_tokens=tokens - before_tokens, num_preemptions=preemptions - before_preemptions,
            num_running=len(self.running),
        )  # fmt: skip
        if self._channel is not None:
            self._channel.send(self.totals())
            if self.admission is not None and (report := self.admission.report(self._epoch)) is not None:
                self._channel.send(report)
            if samples := self.preemptor.meter.take_samples():
                self._channel.send(CostSamples(costs=self.preemptor.costs.to_json(), samples=samples))

    def _free_blocks(self, request: Request) -> None:
        """Count the request's tokens, then let vLLM forget it: finished, aborted or failed, each comes here once."""
        self._num_output_tokens_of_freed += request.num_output_tokens
        self.preemptor.meter.forget(request.request_id)
        if self.admission is not None:
            self.admission.ended(request)
        super()._free_blocks(request)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated since the engine started; counted when asked, which is less often than every step."""
        return self._num_output_tokens_of_freed + sum(request.num_output_tokens for request in self.requests.values())

    def _preempt_request(self, request: Request, timestamp: float, drop_stale_output: bool = False) -> None:
        """Decide the victim's fate while its blocks are still its own, then let vLLM preempt it."""
        decision = self._decided.pop(request.request_id, None)
        if decision is None:
            decision = self.preemptor.decide(self._candidate(request), self._pressure(num_needed_blocks=1))
        num_tokens, num_copied = request.num_computed_tokens, None
        if decision.action is Action.SWAP:
            assert self._swap is not None, "a swap was decided without a connector"
            (block_ids,) = self.kv_cache_manager.get_block_ids(request.request_id)
            # Zeroed by vLLM below. Tokens of steps in flight count: their KV is written before any copy of it is made.
            num_copied = self._swap.scheduling.swap_out(
                request.request_id, tenant=tenant_of(request), num_tokens=num_tokens, block_ids=block_ids,
                now_s=time.monotonic(),
            )  # fmt: skip
            if num_copied is None:
                # Another victim of this step took the room, with what this one had retained there.
                decision = replace(decision, action=Action.RECOMPUTE, reason="the host pool has no room any more")
        if num_copied is None and self._swap is not None:
            self._swap.planning.release(request.request_id)  # copies of blocks that are computed anew
        if not self._resetting:
            self.last_decision = decision
            if self.admission is not None:
                self.admission.core.gave_way(decision)
            self.preemptor.preempted(
                decision, now_s=timestamp, num_tokens=num_tokens, num_running=max(1, len(self.running)),
                num_copied_blocks=num_copied or 0,
            )  # fmt: skip
        super()._preempt_request(request, timestamp, drop_stale_output)

    def _make_room(self) -> bool:
        """Preempt ahead of vLLM's running loop what it would otherwise have to; whether anybody was."""
        is_fair = self.admission is not None and self.admission.core.is_fair
        if not self._foresees or len(self.running) < 2 or not self.preemptor.may_lead(is_fair=is_fair):
            return False
        assert self._memory is not None, "several KV cache groups"
        missing = self._memory.num_missing_blocks()
        if missing == 0:
            return False
        if self.admission is not None and is_fair:
            self.admission.settle()  # victims are chosen by what tenants have had, to the token
        candidates = [self._candidate(request) for request in self.running]
        if not self.preemptor.lead(candidates):
            return False
        decisions = self.preemptor.choose(candidates, self._pressure(num_needed_blocks=missing))
        self._decided = {decision.request_id: decision for decision in decisions}
        now_s = time.monotonic()
        for request in [request for request in self.running if request.request_id in self._decided]:
            self.running.remove(request)
            self._preempt_request(request, now_s, drop_stale_output=self.requires_kv_delivery)
        assert not self._decided, "a decision was not carried out"
        self._line_up_preempted()
        return bool(decisions)

    def _open_log(self, folder: str) -> Recorder:
        log = DecisionLog(Path(folder), self._epoch)
        logger.info("Decisions on preemption are logged to %s.", log.path)
        return log.write

    def _line_up_preempted(self) -> None:
        """Let those who gave way come back in the order of their arrival, as vLLM's own victims do."""
        victims = []
        while self.waiting and self.waiting.peek_request().status == RequestStatus.PREEMPTED:
            victims.append(self.waiting.pop_request())
        for request in sorted(victims, key=lambda request: request.arrival_time, reverse=True):
            self.waiting.prepend_request(request)

    @contextmanager
    def _nobody_admitted(self) -> Iterator[None]:
        """What vLLM's `schedule` does by itself after it has preempted."""
        state = self.pause_state
        self._pause_state = max(state, PauseState.PAUSED_NEW)  # the setter would log it
        try:
            yield
        finally:
            self._pause_state = state

    def _candidate(self, request: Request) -> Candidate:
        if self._memory is None:
            tokens = request.num_computed_tokens
            return Candidate(request_id=request.request_id, num_tokens=tokens, num_blocks=0, num_freed_blocks=0)
        pool = self._swap.planning.pool if self._swap else None
        service = self.admission.core.service_of(request.request_id) if self.admission is not None else 0.0
        return self._memory.candidate(request, pool, survival=self.preemptor.meter.survival, service=service)

    def _pressure(self, *, num_needed_blocks: int) -> Pressure:
        return self.preemptor.pressure(
            self._swap.scheduling if self._swap else None,
            num_needed_blocks=num_needed_blocks,
            num_pool_blocks=self.kv_cache_manager.block_pool.num_gpu_blocks,
            num_running=len(self.running),
            now_s=time.monotonic(),
            unsafe="the cache is being reset" if self._resetting else self._unsafe,
        )

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
        if (why := self._why_vllm_chooses()) is not None:
            return why
        if self.use_v2_model_runner:
            return "model runner v2 copies out after it may have overwritten"
        return None

    def _why_vllm_chooses(self) -> str | None:
        """Why victims must not be chosen ahead of vLLM's loop, or None: what a step will need is not foreseen there."""
        if len(self.kv_cache_config.kv_cache_groups) != 1:
            return "several KV cache groups"
        if self.block_size != self.vllm_config.cache_config.block_size:
            return "context parallelism spreads a block's tokens over several workers"
        if self.num_spec_tokens:
            return "speculative decoding"
        if self.policy is SchedulingPolicy.PRIORITY:
            return "priority scheduling can preempt a request whose blocks are not computed yet"
        return None

    def totals(self) -> EngineTotals:
        """Gauges of this moment and counters since the engine started."""
        self._sequence += 1
        pool = self._swap.planning.pool if self._swap else None
        block_pool, preemptor = self.kv_cache_manager.block_pool, self.preemptor
        admission = self.admission.core if self.admission is not None else None
        waiting_tokens = self._waiting_tokens()
        return EngineTotals(
            epoch=self._epoch,
            sequence=self._sequence,
            preemption=preemptor.name.value,
            admission=(admission.admission if admission is not None else Admission.FIRST_COME).value,
            service_kind=(admission.settings.unit.kind if admission is not None else ServiceKind.TOKENS).value,
            service=admission.service.total if admission is not None else 0.0,
            num_pool_tokens=block_pool.num_gpu_blocks * self.block_size,
            max_num_seqs=self.max_num_running_reqs,
            max_model_len=self.max_model_len,
            num_running=len(self.running),
            num_waiting=len(self.waiting) + len(self.skipped_waiting),
            num_kv_blocks=block_pool.num_gpu_blocks,
            num_free_kv_blocks=block_pool.get_num_free_blocks(),
            num_host_slots=pool.num_slots if pool else 0,
            num_used_host_slots=pool.num_used_slots if pool else 0,
            steps=self.num_steps,
            scheduled_tokens=self.num_scheduled_tokens,
            output_tokens=self.num_output_tokens,
            swaps=preemptor.num_preemptions[Action.SWAP],
            recomputes=preemptor.num_preemptions[Action.RECOMPUTE],
            guarded=preemptor.guarded,
            guarded_steps=preemptor.num_guarded_steps,
            headroom_blocks=preemptor.headroom.num_blocks,
            num_retained_host_slots=pool.num_retained_slots if pool else 0,
            predicted_swap_s=preemptor.predicted_s[Action.SWAP],
            measured_swap_s=preemptor.measured_s[Action.SWAP],
            predicted_recompute_s=preemptor.predicted_s[Action.RECOMPUTE],
            measured_recompute_s=preemptor.measured_s[Action.RECOMPUTE],
            swapped_out_blocks=self.num_swapped_out_blocks,
            swapped_in_blocks=self.num_swapped_in_blocks,
            costs_version=preemptor.costs.version,
            block_size=self.block_size,
            num_waiting_tokens=sum(waiting_tokens.values()),
            queued_s=admission.queued_s(self._num_at_once()) if admission is not None else 0.0,
            backlog=heaviest(waiting_tokens),
            dropped_messages=self._channel.num_dropped if self._channel else 0,
        )

    def _num_at_once(self) -> int:
        """Requests that decode together: those that run, or that will when a first step has admitted them."""
        return len(self.running) or min(self.max_num_running_reqs, len(self.waiting) + len(self.skipped_waiting))

    def _waiting_tokens(self) -> dict[str, int]:
        """Tokens of those who wait, by tenant."""
        if self.admission is not None:
            return self.admission.core.waiting_tokens()
        return {"": sum(request.num_tokens for queue in (self.waiting, self.skipped_waiting) for request in queue)}


class AdaptiveScheduler(_AdaptiveMixin):
    """For engines that schedule synchronously (CPU). `scheduler_cls: replicas.vllm_scheduler.AdaptiveScheduler`."""


class AdaptiveAsyncScheduler(_AdaptiveMixin, AsyncScheduler):
    """For engines that schedule ahead of the running step (GPU; vLLM's default there)."""
