"""Preemption in a simulated engine: what `replicas.vllm_scheduler` does around vLLM's scheduler, with the same objects.

Rule: policy, guard, meter, headroom, host pool and plans of copies are the product's own; here are only a simulated engine's
requests and blocks, turned into what they are asked with.
"""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from cluster.simulated_request import SimulatedRequest, Status
from cluster.simulated_swaps import SimulatedSwaps
from cost_service.learner import CostLearner
from cost_service.service import REFIT_INTERVAL_S
from cost_service.snapshot import CostSnapshot
from replicas.preemption import Action, PreemptionDecision
from replicas.preemption_cost import Candidate, Pressure
from replicas.preemption_meter import Prefill
from replicas.preemptor import Preemptor
from replicas.request_stamp import remaining_tokens

if TYPE_CHECKING:
    from cluster.simulated_engine import SimulatedEngine
    from cluster.simulated_step import Step

REPORT_INTERVAL_S = 0.1
"""As `cost_service.service_messages.ENGINE_INTERVAL_S`."""


class SimulatedCosts:
    """The cost service of a simulated cluster: what all replicas of one kind have measured, learned as the product does."""

    def __init__(self, start: CostSnapshot) -> None:
        """Begin with what is believed before anything is measured."""
        self._learner = CostLearner(start)
        self._next_refit_s = 0.0
        self._has_news = False

    def exchange(self, preemptor: Preemptor, now_s: float) -> None:
        """Take what a replica has measured, and give it the newest costs."""
        if samples := preemptor.meter.take_samples():
            self._learner.observe(samples)
            self._has_news = True
        if self._has_news and now_s >= self._next_refit_s:
            self._next_refit_s, self._has_news = now_s + REFIT_INTERVAL_S, False
            self._learner.refit()
        if preemptor.costs.version < self._learner.snapshot.version:
            preemptor.costs = self._learner.snapshot


class SimulatedPreemption:
    """The decisions of one simulated engine."""

    def __init__(
        self, preemptor: Preemptor, swaps: SimulatedSwaps | None, costs: "SimulatedCosts | None" = None
    ) -> None:
        """Begin without requests.

        Args:
            preemptor: With the meter of `swaps`, if there are any.
            swaps: None: nothing is ever swapped.
            costs: Where they are learned; None: they stay as they are.
        """
        self.preemptor, self.swaps, self._costs = preemptor, swaps, costs
        self._decided: dict[str, PreemptionDecision] = {}
        self._next_report_s = 0.0
        self._reported = (0, 0)

    @property
    def num_headroom_blocks(self) -> int:
        """Blocks to keep free at admission."""
        return self.preemptor.headroom.num_blocks

    @property
    def first_load_s(self) -> float:
        """When the next load is done; infinite without any."""
        return self.swaps.first_load_s if self.swaps is not None else float("inf")

    def make_room(self, engine: "SimulatedEngine", now_s: float) -> bool:
        """Preempt ahead of the running loop what it would otherwise have to; whether anybody was."""
        if engine.loading:
            engine.loading.sort(key=lambda request: not request.num_blocks)
        is_fair = engine.fair is not None and engine.fair.core.is_fair
        if len(engine.running) < 2 or not self.preemptor.may_lead(is_fair=is_fair):
            return False
        missing = engine.running.num_missing_blocks()
        if missing == 0:
            return False
        engine.running.settle()
        if engine.fair is not None:
            engine.fair.settle()
        candidates = [self._candidate(engine, request) for request in engine.running]
        if not self.preemptor.lead(candidates):
            return False
        decisions = self.preemptor.choose(candidates, self._pressure(engine, missing, now_s))
        self._decided = {decision.request_id: decision for decision in decisions}
        for request in [request for request in engine.running if request.request_id in self._decided]:
            engine.preempt(request, now_s)
        assert not self._decided, "a decision was not carried out"
        self._line_up_preempted(engine, now_s)
        return bool(decisions)

    def take_away(self, engine: "SimulatedEngine", request: SimulatedRequest, now_s: float) -> None:
        """Decide a victim's fate while its blocks are still its own; it does not run any more."""
        decision = self._decided.pop(request.request_id, None)
        if decision is None:
            decision = self.preemptor.decide(self._candidate(engine, request), self._pressure(engine, 1, now_s))
        num_copied = None
        if decision.action is Action.SWAP:
            assert self.swaps is not None, "a swap was decided without a connector"
            num_copied = self.swaps.swap_out(request, now_s)
            if num_copied is None:
                decision = PreemptionDecision(
                    decision.request_id, Action.RECOMPUTE, decision.num_blocks, decision.prices,
                    "the host pool has no room any more",
                )  # fmt: skip
        if num_copied is None and self.swaps is not None:
            self.swaps.release(request)
        if decision.action is Action.SWAP:
            request.swaps += 1
        else:
            request.recomputes += 1
        self.preemptor.preempted(
            decision, now_s=now_s, num_tokens=request.num_computed, num_running=max(1, len(engine.running)),
            num_copied_blocks=num_copied or 0,
        )  # fmt: skip
        if engine.fair is not None:
            engine.fair.core.gave_way(decision)

    def num_loadable_tokens(
        self, request: SimulatedRequest, num_cached_tokens: int, now_s: float
    ) -> tuple[int | None, bool]:
        """Tokens to load beyond the cached ones (None: not yet), and whether asynchronously."""
        if self.swaps is None:
            return 0, False
        return self.swaps.scheduling.num_loadable_tokens(
            request.request_id, num_tokens=request.num_tokens, num_cached_tokens=num_cached_tokens, now_s=now_s
        )

    def load(self, request: SimulatedRequest, num_loaded_tokens: int, now_s: float) -> None:
        """A waiting request has blocks: let what it has in host memory be loaded."""
        if self.swaps is not None:
            self.swaps.load(request, num_loaded_tokens, now_s)

    def copy(self, engine: "SimulatedEngine", step: "Step", now_s: float) -> float:
        """Let the step's copies begin; return for how many seconds the engine waits for them."""
        return self.swaps.execute(now_s) if self.swaps is not None else 0.0

    def end_copies(self, now_s: float) -> list[str]:
        """The step has ended; return the requests whose loads are done by now."""
        return self.swaps.finish(now_s) if self.swaps is not None else []

    def forget(self, request: SimulatedRequest) -> None:
        """The request has finished or was aborted."""
        self.preemptor.meter.forget(request.request_id)
        if self.swaps is not None:
            self.swaps.forget(request.request_id)

    def check(self) -> None:
        """Assert that host memory and open measurements agree with themselves."""
        if self.swaps is not None:
            self.swaps.pool.check()
            self.preemptor.meter.check()

    def learn(self, engine: "SimulatedEngine", step: "Step", ends_s: Sequence[float]) -> None:
        """Let the preemptor know how long each step of a stride took, the last of which has just ended.

        Args:
            ends_s: When each of them ended.
        """
        num_running = step.num_decodes + len(step.prefills)
        tokens = engine.num_output_tokens - (step.num_steps - 1) * step.num_decodes
        prefills = [
            Prefill(request_id=request.request_id, first=cached, num_tokens=num)
            for request, cached, num in step.prefills
            if num > 1
        ]
        num_decodes, last = num_running - len(prefills), step.num_steps - 1
        number, start_s = 0, step.start_s
        while number <= last:
            if number:  # what was preempted or copied was so in the first step
                quiet = min(bisect_left(ends_s, self._next_report_s), last)
                seconds = [end_s - before_s for before_s, end_s in pairwise(ends_s[number - 1 : quiet])]
                self.preemptor.quiet_steps(seconds, num_decodes=num_decodes, num_running=num_running)
                number += len(seconds)
                start_s = ends_s[number - 1]
            end_s, left = ends_s[number], len(engine.running) if number == last else num_running
            self.preemptor.step_ended(
                end_s, end_s - start_s, num_decodes=num_decodes, prefills=prefills, num_running=left
            )
            if end_s >= self._next_report_s or (number == last and not engine.num_requests):
                self._next_report_s = end_s + REPORT_INTERVAL_S
                self._report(end_s, tokens + number * step.num_decodes, left)
            number += 1
        if self.swaps is not None:
            self.swaps.scheduling.step_s = end_s - start_s

    def _report(self, now_s: float, num_tokens: int, num_running: int) -> None:
        """Tell the guard what was delivered since the last report."""
        num_preemptions = sum(self.preemptor.num_preemptions.values())
        before_tokens, before_preemptions = self._reported
        self._reported = (num_tokens, num_preemptions)
        self.preemptor.report(
            now_s, num_tokens=num_tokens - before_tokens, num_preemptions=num_preemptions - before_preemptions,
            num_running=num_running,
        )  # fmt: skip
        if self._costs is not None:
            self._costs.exchange(self.preemptor, now_s)

    def _line_up_preempted(self, engine: "SimulatedEngine", now_s: float) -> None:
        """Let those who gave way come back in the order of their arrival."""
        if engine.fair is not None:
            engine.fair.line_up_preempted()
            return
        victims = []
        while engine.waiting and engine.waiting.peek(now_s).status is Status.PREEMPTED:
            victims.append(engine.waiting.pop(now_s))
        for request in sorted(victims, key=lambda request: request.arrival_s, reverse=True):
            engine.waiting.prepend(request, now_s)

    def _candidate(self, engine: "SimulatedEngine", request: SimulatedRequest) -> Candidate:
        """The request as a candidate for giving way; its numbers are settled."""
        num_host_blocks, num_host_slots = 0, 0
        if self.swaps is not None:
            num_host_blocks, num_host_slots = self.swaps.pool.room_of(request.tenant, request.request_id)
        num_shared = engine.blocks.num_shared(request.holding)
        num_surviving = max(num_shared, int(self.preemptor.meter.survival * request.num_blocks))
        return Candidate(
            request_id=request.request_id,
            tenant=request.tenant,
            service=engine.fair.core.service_of(request.request_id) if engine.fair is not None else 0.0,
            num_tokens=request.num_computed,
            num_blocks=request.num_blocks,
            num_freed_blocks=request.num_blocks - num_shared,
            num_surviving_tokens=min(num_surviving * engine.settings.block_size, request.num_computed),
            num_host_blocks=num_host_blocks,
            num_host_slots=num_host_slots,
            num_remaining_tokens=remaining_tokens(request.stamp, request.num_output, request.max_tokens),
            num_preemptions=request.num_preemptions,
        )

    def _pressure(self, engine: "SimulatedEngine", num_needed_blocks: int, now_s: float) -> Pressure:
        return self.preemptor.pressure(
            self.swaps.scheduling if self.swaps is not None else None,
            num_needed_blocks=num_needed_blocks,
            num_pool_blocks=engine.settings.num_blocks,
            num_running=len(engine.running),
            now_s=now_s,
            unsafe=None if self.swaps is not None else "no SwapConnector is configured",
        )
