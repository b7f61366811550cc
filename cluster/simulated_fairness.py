"""Fair admission in a simulated engine: what `replicas.vllm_admission` does in vLLM's scheduler, with the same objects.

Rule: order, bypass, charges and reports are the product's own; here are only a simulated engine's requests and blocks,
turned into what they are asked with.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from cluster.simulated_preemption import SimulatedPreemption
from cluster.simulated_request import SimulatedRequest, Status
from cost_service.charges import Account
from cost_service.service_messages import AccountReport
from cost_service.snapshot import CostSnapshot
from replicas.admission import RequestAdmission, service_alone_s
from replicas.bypass import Need, Room
from replicas.preemption_cost import prefill_s
from replicas.request_stamp import TENANT, age_s_in, remaining_tokens, user_in, weight_in

if TYPE_CHECKING:
    from cluster.simulated_engine import SimulatedEngine


class FairWaiting:
    """Both waiting queues of a simulated engine, in the product's order."""

    def __init__(
        self, core: RequestAdmission, costs: CostSnapshot, *, weights: Mapping[str, float] | None = None
    ) -> None:  # fmt: skip
        """Begin without requests.

        Args:
            costs: What services are predicted by where nothing has been learned.
            weights: Of tenants; 1 for others.
        """
        self.core, self._costs = core, costs
        self._engine: SimulatedEngine | None = None
        self._requests: dict[str, SimulatedRequest] = {}
        self._arrived: dict[SimulatedRequest, float] = {}
        """Since the last step began, with their times."""
        self._weights = weights or {}
        """All replicas share them: each tells its own of those alone who come."""

    @property
    def engine(self) -> "SimulatedEngine":
        """The engine whose requests wait here."""
        assert self._engine is not None, "a queue of no engine"
        return self._engine

    def attach(self, engine: "SimulatedEngine") -> None:
        """Serve an engine."""
        assert self._engine is None, "a queue of two engines"
        self._engine = engine

    def __len__(self) -> int:
        """Those that were not passed over."""
        return len(self.core.waiting) + len(self._arrived)

    def add(self, request: SimulatedRequest, now_s: float) -> None:
        """See `WaitingQueue`; it takes part when the step under way has ended, as in vLLM."""
        self._arrived[request] = now_s - age_s_in(request.stamp)

    def take_in(self) -> None:
        """Let those wait who arrived during the step that has ended."""
        for request, arrival_s in self._arrived.items():
            num_output = remaining_tokens(request.stamp, 0, request.max_tokens)
            self._requests[request.request_id] = request
            self.core.add(
                request.request_id, tenant=request.tenant, user=user_in(request.stamp), arrival_s=arrival_s,
                weight=weight_in(request.stamp) if TENANT in request.stamp else self._weights.get(request.tenant),
                num_prompt_tokens=request.num_tokens, num_output_tokens=num_output,
                prompt_s=prefill_s([(0, request.num_tokens)], num_decodes=0, costs=self.costs),
                service_s=service_alone_s(request.num_tokens, num_output, costs=self.costs, step_s=self.step_s),
            )  # fmt: skip
        self._arrived.clear()

    def prepend(self, request: SimulatedRequest, now_s: float) -> None:
        """See `WaitingQueue`."""
        self.core.put_back(request.request_id, self.core.waiting, front=True)

    def peek(self, now_s: float) -> SimulatedRequest:
        """See `WaitingQueue`: of both queues."""
        queue = self.core.select(self._room, self._need, self._has_blocks)
        assert queue is not None, "nobody waits"
        return self._requests[queue.peek().request_id]

    def pop(self, now_s: float) -> SimulatedRequest:
        """See `WaitingQueue`: of both queues."""
        queue = self.core.selected
        assert queue is not None, "nobody was chosen"
        return self._requests[queue.pop().request_id]

    def remove(self, request: SimulatedRequest) -> None:
        """See `WaitingQueue`; `ended` does it."""

    def begin_step(self, now_s: float) -> None:
        """Before anything of the step is scheduled."""
        if len(self.core):
            self.settle()
        requests = (self._requests[each.request_id] for each in self.core.skipped)
        self.core.begin_step(now_s, [one.request_id for one in requests if one.num_blocks])

    def end_step(self, admitted: Sequence[SimulatedRequest], passed: Sequence[SimulatedRequest]) -> None:
        """After the last admission: charge what requests begin to run with; `passed` were passed over."""
        for request in passed[::-1]:
            self.core.put_back(request.request_id, self.core.skipped, front=True)
        for request in admitted:
            num_cached = request.num_computed
            num_computed = request.num_tokens - num_cached
            seconds = prefill_s([(num_cached, num_computed)], num_decodes=1, costs=self.costs)
            self.core.admitted(
                request.request_id, num_computed_tokens=num_computed, num_cached_tokens=num_cached,
                engine_us=max(0, round(seconds * 1e6)),
            )  # fmt: skip
        self.core.end_step(self._has_blocks)

    def settle(self) -> None:
        """Charge what the running requests were given; a stride may be under way only if nobody asks for its middle."""
        self.engine.running.settle()
        self._charge()

    def report(self, *, everything: bool) -> Mapping[Account, AccountReport]:
        """The lines of the next report to the cluster's scheduler; the engine is settled to this moment."""
        self._charge()
        return self.core.take_report(everything=everything)

    def ended(self, request: SimulatedRequest) -> None:
        """The request has finished or its client has left."""
        name = request.request_id
        if self._requests.pop(name, None) is not None:
            for queue in (self.core.waiting, self.core.skipped):
                if name in queue:
                    queue.remove(name)
            self.core.delivered(name, request.num_output, token_us=self._token_us())
            self.core.ended(name)

    def line_up_preempted(self) -> None:
        """Let those who gave way come back in the order of their arrival, where that is not the queue's own."""
        victims, queue = [], self.core.waiting
        while len(queue) and self._requests[queue.peek().request_id].status is Status.PREEMPTED:
            victims.append(self._requests[queue.pop().request_id])
        for request in sorted(victims, key=lambda request: request.arrival_s, reverse=True):
            self.core.put_back(request.request_id, queue, front=True)

    @property
    def costs(self) -> CostSnapshot:
        """What services are predicted by."""
        preemption = self.engine.preemption
        return preemption.preemptor.costs if isinstance(preemption, SimulatedPreemption) else self._costs

    @property
    def step_s(self) -> float:
        """Seconds of a step as of late."""
        preemption = self.engine.preemption
        return preemption.preemptor.step_s if isinstance(preemption, SimulatedPreemption) else 0.0

    def _charge(self) -> None:
        """Charge running requests up to where they are written down to be."""
        totals = ((request.request_id, request.num_output) for request in self.engine.running)
        self.core.delivered_to(totals, token_us=self._token_us())

    def _token_us(self) -> float:
        return self.step_s * 1e6 / max(1, len(self.engine.running))

    def _has_blocks(self, request_id: str) -> bool:
        return self._requests[request_id].status in (Status.RUNNING, Status.LOADING)

    def _room(self) -> Room:
        engine = self.engine
        return Room(
            num_free_blocks=engine.blocks.num_free - (engine.watermark_blocks if engine.running else 0),
            num_batch_tokens=engine.settings.max_num_batched_tokens,
            num_seqs=engine.settings.max_num_seqs - len(engine.running),
        )

    def _need(self, request_id: str) -> Need:
        """What a waiting request takes, as `SimulatedAdmission` counts it."""
        engine, request = self.engine, self._requests[request_id]
        settings, service = engine.settings, self.core.service
        key, weight = service.tenant_key(request.tenant), service.weight(request.tenant)
        if request.status is Status.LOADING or request.num_computed:
            return Need(
                request_id=request_id, num_blocks=0, num_tokens=1, key=key, weight=weight, tenant=request.tenant
            )
        hit = engine.blocks.find(request.holding, (request.num_tokens - 1) // settings.block_size)
        num_cached = hit.num_blocks * settings.block_size
        num_new = request.num_tokens - num_cached
        if not settings.reserve_full_isl:
            num_new = min(num_new, settings.max_num_batched_tokens)
        headroom = engine.preemption.num_headroom_blocks if engine.preemption is not None else 0
        num_blocks = engine.running.num_blocks_of(num_cached + num_new) - hit.num_blocks + hit.num_free_blocks
        return Need(
            request_id=request_id, num_blocks=num_blocks, num_tokens=num_new, key=key, weight=weight,
            tenant=request.tenant, holds_back=request.status is Status.PREEMPTED and not headroom,
            min_batch_tokens=1 if settings.enable_chunked_prefill else min(num_new, settings.max_num_batched_tokens),
        )  # fmt: skip
