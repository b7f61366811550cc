"""One simulated engine: a replica's scheduler as vLLM 0.29's, step by step, in virtual time.

Rules:
- Running requests first, each a token or what the budget leaves of its prefill; then those who wait, while there are budget,
  places and blocks. Who is short of a block preempts the last of the running. A step that preempts admits nobody.
- Preemption runs the product's own objects (`cluster.simulated_preemption`); without them it is vLLM's own.
- Steps are scheduled one by one, on what the step before has delivered. (vLLM schedules ahead on GPUs: the same steps, but
  that a request's blocks are free a step later.)
- At most one prefill is under way between steps, and it is the last of the running: it is not done because it had all the
  budget that was left, so that nobody was admitted after it.
- Steps in which nothing but decodes can happen are one stride. What comes in ends it at the next step's begin. Strides and
  single steps give the same.

Source: vLLM 0.29 `v1/core/sched/scheduler.py` (`schedule`, `update_from_output`), `v1/core/kv_cache_manager.py`.
"""

import math
from bisect import bisect_left
from collections.abc import Callable

from cluster.simulated_admission import SimulatedAdmission
from cluster.simulated_fairness import FairWaiting
from cluster.simulated_offload import SimulatedOffload
from cluster.simulated_preemption import SimulatedPreemption
from cluster.simulated_queue import FirstCome, WaitingQueue
from cluster.simulated_request import SimulatedRequest, Status
from cluster.simulated_running import RunningRequests
from cluster.simulated_step import SimulatedSettings, Step
from cluster.simulated_time import StepTimes

Observer = Callable[[list[tuple[str, int]], list[str]], None]
"""Sees each step: who computes how many tokens, in order, and who was preempted."""

EMPTY_STEP_S = 1e-3
"""What a step takes that schedules nobody: the engine asks again."""


class SimulatedEngine:
    """Waiting queue, running requests and KV blocks of one replica, and the step under way."""

    def __init__(
        self,
        settings: SimulatedSettings,
        times: StepTimes,
        *,
        waiting: WaitingQueue | None = None,
        preemption: SimulatedPreemption | SimulatedOffload | None = None,
        observe: Observer | None = None,
    ) -> None:
        """Begin without requests.

        Args:
            times: What steps really take.
            waiting: None: first come, first served.
            preemption: None: vLLM's own, without offloading.
            observe: Called with every step; strides are off then.
        """
        self.settings, self.preemption = settings, preemption
        self.running = RunningRequests(settings)
        self.blocks, self.batch = self.running.blocks, self.running.batch
        self.waiting: WaitingQueue = FirstCome() if waiting is None else waiting
        self.loading: list[SimulatedRequest] = []
        """Waiting requests that were passed over: blocks are loaded for them, or the link is not free for that."""
        self.loaded: set[str] = set()
        """Those whose load is done."""
        self.next_s = math.inf
        """When `run` is to be called next: the step under way ends, or something can begin."""
        self.num_steps = self.num_scheduled_tokens = self.num_output_tokens = self.num_preemptions = 0
        self.num_waiting_tokens = 0
        """Of those in the waiting queue."""
        self.waiting_tokens: dict[str, int] = {}
        """The same by tenant."""
        self.least_free_blocks = self.known_free_blocks = self.blocks.num_free
        """At any time, and when requests last came to run, ended or gave way: both the same with and without strides."""
        self._times, self._observe = times, observe
        self._stock_watermark = int(settings.watermark * settings.num_blocks)
        self._strides = settings.strides and observe is None and not isinstance(preemption, SimulatedOffload)
        self._step: Step | None = None
        self._preempted: list[SimulatedRequest] = []
        self.leaving: list[SimulatedRequest] = []
        self.holders: set[SimulatedRequest] = set()
        """Those who wait and hold blocks for a load."""
        self.fair = self.waiting if isinstance(self.waiting, FairWaiting) else None
        if self.fair is not None:
            self.fair.attach(self)
        self._admission = SimulatedAdmission(self)
        self._gone: dict[str, SimulatedRequest] = {}
        """Those who have left while blocks were loaded for them."""

    @property
    def num_requests(self) -> int:
        """All that are here."""
        return len(self.running) + len(self.waiting) + len(self.loading)

    def add(self, request: SimulatedRequest, now_s: float) -> None:
        """Take in a request; it is seen when the next step begins.

        Raises:
            ValueError: It is longer than the engine allows, or does not fit into its KV blocks.
        """
        settings, num_tokens = self.settings, request.prompt_tokens + request.output_tokens
        if request.prompt_tokens < 1 or request.output_tokens < 1:
            raise ValueError(f"Request {request.request_id} must have at least one prompt and one output token.")
        if num_tokens > settings.max_model_len or num_tokens > (settings.num_blocks - 1) * settings.block_size:
            raise ValueError(
                f"Request {request.request_id} has {num_tokens} tokens: it must fit into max_model_len "
                f"({settings.max_model_len}) and into {settings.num_blocks - 1} KV blocks of {settings.block_size}."
            )
        self.waiting.add(request, now_s)
        self.count_waiting(request, request.num_tokens)
        self.interrupt(now_s)

    def count_waiting(self, request: SimulatedRequest, num_tokens: int) -> None:
        """Count tokens of a request that waits from now on, or less than none of one that waits no more."""
        self.num_waiting_tokens += num_tokens
        of_tenant = self.waiting_tokens.get(request.tenant, 0) + num_tokens
        if of_tenant:
            self.waiting_tokens[request.tenant] = of_tenant
        else:
            del self.waiting_tokens[request.tenant]

    def abort(self, request: SimulatedRequest, now_s: float) -> None:
        """Its client has left; its blocks are free when the next step begins."""
        self.leaving.append(request)
        self.interrupt(now_s)

    def run(self, now_s: float) -> list[SimulatedRequest]:
        """End the step under way and begin the next; return those who have finished, and those who have left."""
        assert now_s == self.next_s, f"called at {now_s} s instead of {self.next_s} s"
        over = self._end_step(now_s)
        if self.fair is not None:
            self.fair.take_in()
        for request in self.leaving:
            if request.status is not Status.FINISHED:
                self._leave(request)
                over.append(request)
        self.leaving = []
        self._begin_step(now_s)
        if over or self._preempted or (self._step is not None and self._step.prefills):
            self.known_free_blocks = self.blocks.num_free
        return over

    def settle(self, now_s: float) -> None:
        """Write down how far each running request is; a stride may be under way."""
        self.running.settle(after=self._num_ended(self._step, now_s) if self._step is not None else 0)

    def interrupt(self, now_s: float) -> None:
        """Let the next step begin as soon as it can: a stride ends with the step under way."""
        if self._step is None:
            self.next_s = min(self.next_s, now_s)
        elif self._step.num_steps > 1:
            self._cut(self._step, now_s)

    def _begin_step(self, now_s: float) -> None:
        self._preempted = []
        if self.fair is not None:
            self.fair.begin_step(now_s)
        closed = self.preemption is not None and self.preemption.make_room(self, now_s)
        self._grow(now_s)
        step = self._step = Step(
            start_s=now_s, num_decodes=self.batch.num_requests,
            num_context_tokens=self.batch.num_context_tokens, prefills=[],
        )  # fmt: skip
        budget = self._continue_prefill(step, self.settings.max_num_batched_tokens - step.num_decodes, now_s)
        closed = closed or bool(self._preempted)
        if not closed:
            self._admission.admit(step, budget, now_s)
        self.least_free_blocks = min(self.least_free_blocks, self.blocks.num_free)
        wait_s = self.preemption.copy(self, step, now_s) if self.preemption is not None else 0.0
        if self._observe is not None:
            self._show(self._observe, step)
        if not step.num_decodes and not step.prefills:
            self._step = None
            self.next_s = self._nobody_scheduled(now_s, wait_s)
            return
        self.num_steps += 1
        step.wait_s = wait_s
        if self._strides and not step.prefills and not closed and self._is_quiet():
            free_steps = self.batch.num_steps_within(self.blocks.num_free, after=1)
            step.num_steps = min(self.batch.num_steps_to_end, 1 + free_steps)
        self.next_s = step.end_s(self._times, step.num_steps)
        if step.num_steps > 1 and self.preemption is not None:
            self._cut(step, self.preemption.first_load_s)

    def _cut(self, step: Step, until_s: float) -> None:
        """Let a stride end with its first step that ends at a time or after it."""
        if self.next_s > until_s:
            step.num_steps = 1 + self._num_ended(step, until_s)
            self.next_s = step.end_s(self._times, step.num_steps)

    def _num_ended(self, step: Step, now_s: float) -> int:
        """Steps of a stride that have ended before a time, not counting the last one."""
        return bisect_left(range(1, step.num_steps), now_s, key=lambda number: step.end_s(self._times, number))

    def _is_quiet(self) -> bool:
        """Whether nobody will be admitted while those who run only decode: all who wait were tried in this step."""
        if self.num_requests > len(self.running) and (
            self.settings.reserve_output
            or self.settings.steps_between_admissions > 1
            or (self.fair is not None and len(self.running) < self.settings.max_num_seqs)
        ):
            return False  # reservations shrink as tokens come, and the order changes with what tenants get
        if self.preemption is None:
            return True
        if any(request.status is not Status.LOADING for request in self.loading):
            return False  # the link may be free for them at any time
        return not self.waiting or self.preemption.num_headroom_blocks == 0

    def _nobody_scheduled(self, now_s: float, wait_s: float) -> float:
        """When to try again after a step without anybody."""
        if not self.num_requests:
            return math.inf
        retry_s = now_s + max(wait_s, EMPTY_STEP_S)
        load_s = self.preemption.first_load_s if self.preemption is not None else math.inf
        if isinstance(self.preemption, SimulatedOffload) and not self.running:
            self.preemption.nobody_runs(load_s < math.inf)
        if self._preempted or any(request.status is not Status.LOADING for request in self.loading):
            return retry_s
        assert load_s < math.inf or self.loaded, "requests wait and nothing will ever change"
        return min(max(load_s, now_s), retry_s) if load_s < math.inf else retry_s

    def _grow(self, now_s: float) -> None:
        """Give every request of the batch the block that it needs; while there is none, the last one running gives way."""
        needed = self.batch.num_needed_blocks()
        while True:
            taken = min(needed, self.blocks.num_free)
            self.blocks.take(taken)
            needed -= taken
            if not needed:
                return
            victim = self.running.last
            if victim is not self.running.prefill:
                needed -= self.batch.needs_block(victim)
            self.preempt(victim, now_s)

    def _continue_prefill(self, step: Step, budget: int, now_s: float) -> int:
        """Schedule what fits of the prefill under way, if there is one; return what is left of the budget."""
        request = self.running.prefill
        if request is None or budget == 0:
            return budget
        num_new = min(request.num_tokens - request.num_computed, budget)
        num_blocks = self.running.num_blocks_of(request.num_computed + num_new)
        if num_blocks - request.num_blocks > self.blocks.num_free:
            self.preempt(request, now_s)
            return budget
        step.prefills.append((request, request.num_computed, num_new))
        self.running.extend(request, num_new, num_blocks)
        return budget - num_new

    def preempt(self, request: SimulatedRequest, now_s: float) -> None:
        """Take a running request's blocks away; it waits again, ahead of all others."""
        self.running.stop(request)
        if self.preemption is not None:
            self.preemption.take_away(self, request, now_s)
        else:
            request.recomputes += 1
        self.running.free(request)
        request.status = Status.PREEMPTED
        request.num_preemptions += 1
        self.num_preemptions += 1
        self._preempted.append(request)
        self.waiting.prepend(request, now_s)
        self.count_waiting(request, request.num_tokens)

    @property
    def watermark_blocks(self) -> int:
        """Blocks that stay free when a request is admitted beside others."""
        return self._stock_watermark + (self.preemption.num_headroom_blocks if self.preemption is not None else 0)

    def _end_step(self, now_s: float) -> list[SimulatedRequest]:
        """Deliver what the step under way has computed; return those who have all their tokens."""
        step, self._step = self._step, None
        finished = self._complete(step, now_s) if step is not None else []
        if self.preemption is not None:
            self._take_loaded(self.preemption.end_copies(now_s))
            if step is not None:
                self.preemption.learn(self, step, step.ends_s(self._times, now_s))
        return finished

    def _complete(self, step: Step, now_s: float) -> list[SimulatedRequest]:
        """Count what a step has computed, and let go of those who have all their tokens."""
        if num_more := step.num_steps - 1:
            self.blocks.take(self.batch.num_needed_blocks(num_more, after=1))
            self.least_free_blocks = min(self.least_free_blocks, self.blocks.num_free)
            self.num_steps += num_more
        num_decoded = step.num_steps * step.num_decodes
        self.num_scheduled_tokens += num_decoded
        self.num_output_tokens += num_decoded
        finished = self.batch.advance(step.num_steps)
        for request, _, num_new in step.prefills:
            self.num_scheduled_tokens += num_new
            request.num_computed += num_new
            if request.num_computed < request.num_tokens:
                continue
            if request.first_token_s is None:
                request.first_token_s = now_s
            self.num_output_tokens += 1
            if self.running.deliver(request):
                finished.append(request)
        for request in finished:
            request.status, request.finish_s = Status.FINISHED, now_s
            if self.fair is not None:
                self.fair.ended(request)
            self.running.end(request)
            if self.preemption is not None:
                self.preemption.forget(request)
        return finished

    def _take_loaded(self, names: list[str]) -> None:
        """Loads are done: their requests can run, or give their blocks back if they are not wanted any more."""
        for name in names:
            if (request := self._gone.pop(name, None)) is not None:
                self.running.free(request)
            else:
                self.loaded.add(name)

    def _leave(self, request: SimulatedRequest) -> None:
        """Let go of a request whose client has left, wherever it is."""
        assert request.status is not Status.ABORTED, f"{request.request_id} has left twice"
        if request.status is Status.RUNNING:
            self.running.stop(request)
        elif request in self.loading:
            self.loading.remove(request)
        else:
            self.waiting.remove(request)
            self.count_waiting(request, -request.num_tokens)
        if self.fair is not None:
            self.fair.ended(request)
        self.holders.discard(request)
        if self.preemption is not None:
            self.preemption.forget(request)
        if request.status is Status.LOADING and request.request_id not in self.loaded:
            self._gone[request.request_id] = request  # its blocks are still being filled
        else:
            self.loaded.discard(request.request_id)
            if request.num_blocks:
                self.running.free(request)
        request.status = Status.ABORTED

    def _show(self, observe: Observer, step: Step) -> None:
        late = {request for request, _, _ in step.prefills}
        decodes = [(request.request_id, 1) for request in self.running if request not in late and request.end >= 0]
        assert len(decodes) == step.num_decodes, f"{len(decodes)} decodes in the queue, {step.num_decodes} in the batch"
        others = [(request.request_id, num) for request, _, num in step.prefills]
        observe([*decodes, *others], [request.request_id for request in self._preempted])

    @property
    def most_host_blocks(self) -> int:
        """KV blocks that were in host memory at once, at most."""
        if isinstance(self.preemption, SimulatedOffload):
            return self.preemption.host.most_blocks
        swaps = self.preemption.swaps if self.preemption is not None else None
        return swaps.pool.most_used_slots if swaps is not None else 0

    def check(self) -> None:
        """Assert that every block and request is in one place; between two calls of `run`."""
        self.running.check(self._step, [*self.holders, *self._gone.values()])
        assert all(request.status is not Status.RUNNING for request in self.loading), "a request waits and runs"
        if self.preemption is not None:
            self.preemption.check()
