"""vLLM's two waiting queues in the order of `replicas.admission` (shell).

Rules:
- The queues are replaced once, when the scheduler is made, and only under vLLM's own `fcfs` policy. Requests without a
  stamp, and all of them under `first-come`, stand as in vLLM's deque.
- `select` is asked right before vLLM looks at a head: what is free is exact then, and the order stands until it pops.
- What running requests were given is counted when somebody waits for a fair turn, when they end, and for reports: not in
  every step.

Source: vLLM 0.29 `v1/core/sched/scheduler.py` (`schedule`, the waiting loop), `request_queue.py` (`FCFSRequestQueue`),
`v1/core/kv_cache_manager.py` (`allocate_slots`, what must be free).
"""

import time
from collections.abc import Iterable, Iterator

from replicas.admission import RequestAdmission, service_alone_s
from replicas.bypass import Need, Room
from replicas.fair_queue import FairQueue
from replicas.messages import ServiceReport, SetShares
from replicas.preemption_cost import prefill_s
from replicas.preemptor import Preemptor
from replicas.request_stamp import TENANT, age_s_in, remaining_tokens, tenant_in, user_in, weight_in
from replicas.turnaround import Turnarounds
from replicas.vllm_internals import Request, RequestQueue, RequestStatus, Scheduler, SchedulerOutput
from replicas.vllm_memory import stamp_of


class FairRequestQueue(RequestQueue):
    """One of the two queues, as vLLM's scheduler uses it."""

    def __init__(self, engine: "EngineAdmission", queue: FairQueue) -> None:
        self._engine, self.queue = engine, queue

    def add_request(self, request: Request) -> None:
        """See `RequestQueue`."""
        self._engine.wait(request, self.queue)

    def pop_request(self) -> Request:
        """See `RequestQueue`."""
        return self._engine.requests[self.queue.pop().request_id]

    def peek_request(self) -> Request:
        """See `RequestQueue`."""
        return self._engine.requests[self.queue.peek().request_id]

    def prepend_request(self, request: Request) -> None:
        """See `RequestQueue`."""
        self._engine.wait(request, self.queue, front=True)

    def prepend_requests(self, requests: RequestQueue) -> None:
        """See `RequestQueue`: the last of them will be the first, as in vLLM's deque."""
        for request in requests:
            self.prepend_request(request)

    def remove_request(self, request: Request) -> None:
        """See `RequestQueue`."""
        self.queue.remove(request.request_id)

    def remove_requests(self, requests: Iterable[Request]) -> None:
        """See `RequestQueue`; those that wait elsewhere are left out."""
        for request in requests:
            if request.request_id in self.queue:
                self.queue.remove(request.request_id)

    def __bool__(self) -> bool:
        return len(self.queue) > 0

    def __len__(self) -> int:
        return len(self.queue)

    def __iter__(self) -> Iterator[Request]:
        """All that wait, as they came."""
        return (self._engine.requests[each.request_id] for each in self.queue)


class EngineAdmission:
    """Admission in one vLLM scheduler."""

    def __init__(self, scheduler: Scheduler, core: RequestAdmission, preemptor: Preemptor) -> None:
        """Take the scheduler's queues over; nobody waits there yet."""
        assert not scheduler.waiting, "requests came before admission was set up"
        self._scheduler, self.core, self._preemptor = scheduler, core, preemptor
        self.requests: dict[str, Request] = {}
        self.waiting = FairRequestQueue(self, core.waiting)
        self.skipped = FairRequestQueue(self, core.skipped)
        self._queues = {id(core.waiting): self.waiting, id(core.skipped): self.skipped}
        scheduler.waiting, scheduler.skipped_waiting = self.waiting, self.skipped
        self.turnarounds = Turnarounds()
        self._tells_everything = False

    def wait(self, request: Request, queue: FairQueue, *, front: bool = False) -> None:
        """Let a request wait: it has arrived, was passed over, or has given way."""
        request_id = request.request_id
        if request_id in self.requests:
            self.core.delivered(request_id, request.num_output_tokens, token_us=self._token_us())
            self.core.put_back(request_id, queue, front=front)
            return
        stamp = stamp_of(request)
        self.requests[request_id] = request
        num_output, preemptor = remaining_tokens(stamp, 0, request.max_tokens), self._preemptor
        self.core.add(
            request_id, tenant=tenant_in(stamp), user=user_in(stamp), queue=queue,
            weight=weight_in(stamp) if TENANT in stamp else None, arrival_s=time.monotonic() - age_s_in(stamp),
            num_prompt_tokens=request.num_tokens, num_output_tokens=num_output,
            prompt_s=prefill_s([(0, request.num_tokens)], num_decodes=0, costs=preemptor.costs),
            service_s=service_alone_s(
                request.num_tokens, num_output, costs=preemptor.costs, step_s=preemptor.step_s
            ),
        )  # fmt: skip

    def begin_step(self) -> None:
        """Before vLLM's `schedule`."""
        holders: list[str] = []
        if self.skipped:
            loading = RequestStatus.WAITING_FOR_REMOTE_KVS
            holders = [
                each.request_id for each in self.skipped if each.status == loading or each.num_computed_tokens > 0
            ]
        if len(self.core) and self.core.is_fair:
            self.settle()
        self.core.begin_step(time.monotonic(), holders)

    def select(self) -> FairRequestQueue | None:
        """Return the queue whose head vLLM is to try next."""
        queue = self.core.select(self._room, self._need, self._has_blocks)
        return None if queue is None else self._queues[id(queue)]

    def end_step(self, output: SchedulerOutput) -> None:
        """After vLLM's `schedule`: charge the prompts of those who were admitted."""
        resumed = output.scheduled_cached_reqs.resumed_req_ids
        if output.scheduled_new_reqs or resumed:
            cached = output.scheduled_cached_reqs
            numbers = {each.req_id: each.num_computed_tokens for each in output.scheduled_new_reqs}
            numbers |= {
                request_id: num
                for request_id, num in zip(cached.req_ids, cached.num_computed_tokens, strict=True)
                if request_id in resumed
            }
            for request_id, num_cached in numbers.items():
                num_computed = self.requests[request_id].num_tokens - num_cached
                seconds = prefill_s([(num_cached, num_computed)], num_decodes=1, costs=self._preemptor.costs)
                self.core.admitted(
                    request_id, num_computed_tokens=num_computed, num_cached_tokens=num_cached,
                    engine_us=max(0, round(seconds * 1e6)),
                )  # fmt: skip
        self.core.end_step(self._has_blocks)
        self.turnarounds.note_step(self._preemptor.step_s)

    def settle(self) -> None:
        """Charge what the running requests were given since the last time."""
        running = self._scheduler.running
        totals = ((request.request_id, request.num_output_tokens) for request in running)
        self.core.delivered_to(totals, token_us=self._token_us())

    def ended(self, request: Request) -> None:
        """The request has finished, was aborted or has failed."""
        if self.requests.pop(request.request_id, None) is not None:
            self.core.delivered(request.request_id, request.num_output_tokens, token_us=self._token_us())
            if request.status in (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED):
                self._count_turnaround(request)
            self.core.ended(request.request_id)

    def learn(self, message: SetShares) -> None:
        """Take the cluster's word of tenants."""
        self._tells_everything = self._tells_everything or message.wants_everything
        self.core.learn(message.shares, answered=message.answered)

    def report(self, epoch: str) -> ServiceReport | None:
        """What tenants were served and the cluster does not know yet; None where there is nothing to say."""
        self.settle()
        everything, self._tells_everything = self._tells_everything, False
        accounts = self.core.take_report(everything=everything)
        if not accounts and not everything:
            return None
        known = dict(self.core.service.known()) if everything else None
        return ServiceReport(
            epoch=epoch, sequence=self.core.sequence, accounts=list(accounts.items()), known=known,
            ended=self.turnarounds.of(account.tenant for account in accounts),
        )  # fmt: skip

    def left_idle(self) -> str | None:
        """A request that fits what the last step left and should have been admitted in it, or None; for tests."""
        return self.core.bypass.left_idle([self._need(each.request_id) for each in self.core.order()], self._room())

    def _count_turnaround(self, request: Request) -> None:
        step_s = self.turnarounds.alone_step_s
        alone_s = service_alone_s(
            request.num_prompt_tokens, request.num_output_tokens, costs=self._preemptor.costs, step_s=step_s
        )
        self.turnarounds.add(
            tenant_in(stamp_of(request)), alone_s=alone_s if step_s else 0.0,
            turnaround_s=time.monotonic() - self.core.arrival_s(request.request_id),
        )  # fmt: skip

    def _has_blocks(self, request_id: str) -> bool:
        return self.requests[request_id].status in (RequestStatus.RUNNING, RequestStatus.WAITING_FOR_REMOTE_KVS)

    def _room(self) -> Room:
        """What is left for an admission; the batch's rest is vLLM's to know."""
        scheduler, manager = self._scheduler, self._scheduler.kv_cache_manager
        num_kept = manager.watermark_blocks if scheduler.running else 0
        return Room(
            num_free_blocks=manager.block_pool.get_num_free_blocks() - num_kept,
            num_batch_tokens=scheduler.max_num_scheduled_tokens,
            num_seqs=scheduler.max_num_running_reqs - len(scheduler.running),
        )

    def _token_us(self) -> float:
        """Microseconds of engine time that a token takes: those who run share the step."""
        return self._preemptor.step_s * 1e6 / max(1, len(self._scheduler.running))

    def _need(self, request_id: str) -> Need:
        """What a waiting request takes, as `allocate_slots` would count it."""
        scheduler, request = self._scheduler, self.requests[request_id]
        tenant, service = tenant_in(stamp_of(request)), self.core.service
        key, weight = service.tenant_key(tenant), service.weight(tenant)
        if request.status not in (RequestStatus.WAITING, RequestStatus.PREEMPTED) or request.num_computed_tokens:
            return Need(request_id=request_id, num_blocks=0, num_tokens=1, key=key, weight=weight, tenant=tenant)
        manager = scheduler.kv_cache_manager
        hit, num_cached, _ = manager.get_computed_blocks(request)
        num_new = request.num_tokens - num_cached
        if not scheduler.scheduler_reserve_full_isl:
            num_new = min(num_new, scheduler.max_num_scheduled_tokens)
        num_blocks = manager.coordinator.get_num_blocks_to_allocate(
            request_id=request_id, num_tokens=num_cached + num_new, new_computed_blocks=hit.blocks,
            num_encoder_tokens=0, total_computed_tokens=num_cached, num_local_computed_tokens=num_cached,
            num_tokens_main_model=num_cached + num_new, apply_admission_cap=scheduler.scheduler_reserve_full_isl,
        )  # fmt: skip
        chunked = scheduler.scheduler_config.enable_chunked_prefill
        return Need(
            request_id=request_id, num_blocks=num_blocks, num_tokens=num_new, key=key, weight=weight, tenant=tenant,
            holds_back=request.status is RequestStatus.PREEMPTED and not self._preemptor.headroom.num_blocks,
            min_batch_tokens=1 if chunked else min(num_new, scheduler.max_num_scheduled_tokens),
        )  # fmt: skip
