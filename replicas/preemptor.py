"""The engine's decisions on preemption, kept honest: policy, guard and meter in one place.

Data flow: choose -> PreemptionDecision -> carried out by the engine -> `preempted` -> PreemptionMeter (what it really cost)
-> Guard (is the prediction any good?) -> choose as the policy says, or as vLLM does.

Rules:
- The guard only rules over policies that choose victims themselves; while it is active their victims and actions are
  vLLM's: the last running request, recomputed. Probes are exempt.
- Where tenants are told apart the last one is that of the most-served tenant, whatever the policy and guarded or not: the
  last of all is whom the fair order has just put there, so that it would be admitted and preempted again and again.
- No clock, no engine: engine and simulator drive the same object.
"""

import logging
from collections.abc import Callable, Sequence

from cost_service.snapshot import CostSnapshot
from replicas.config import PreemptionPolicy
from replicas.guard import Guard, GuardSettings
from replicas.headroom import Headroom
from replicas.preemption import Action, FixedPolicy, Policy, PreemptionDecision, policy_of
from replicas.preemption_cost import Candidate, Pressure, prefill_s
from replicas.preemption_meter import PreemptionMeter, Prefill
from replicas.swap_scheduling import SwapScheduling
from replicas.throttled_link import Direction

logger = logging.getLogger(__name__)

HARMLESS_SHARE = 0.5
"""A swap that takes no longer than this share of what the recomputation was to take was no mistake."""

OTHER_PRICES = 1.5
"""Costs that price a preemption so many times higher, or lower, are others than before; within it they are refined."""

EXAMPLE_TOKENS = 256
"""Of the preemption whose prices are compared."""

STEP_WEIGHT = 0.1
"""Of the newest step in the mean."""

Recorder = Callable[[PreemptionPolicy, Sequence[Candidate], Pressure, CostSnapshot, Sequence[PreemptionDecision]], None]
"""Takes note of a choice: policy in force, what it was asked, at what costs, what it answered."""


class Preemptor:
    """Chooses victims and actions, and learns what they cost."""

    def __init__(
        self,
        policy: PreemptionPolicy,
        costs: CostSnapshot,
        *,
        meter: PreemptionMeter | None = None,
        guard: GuardSettings | None = None,
        record: Recorder | None = None,
    ) -> None:
        """Begin with a policy and costs.

        Args:
            meter: The one that the copies are reported to; None: there are none.
            guard: None: nothing ever takes over from the policy.
            record: Called with every choice.
        """
        self._costs = costs
        self.guard = Guard(guard) if guard is not None else None
        self.meter = meter if meter is not None else PreemptionMeter()
        self.headroom = Headroom()
        self._record = record
        self._stock = FixedPolicy(Action.RECOMPUTE)
        self._probing = False
        self.num_preemptions = dict.fromkeys(Action, 0)
        self.num_measured = dict.fromkeys(Action, 0)
        self.predicted_s = dict.fromkeys(Action, 0.0)
        """Of those that were measured."""
        self.measured_s = dict.fromkeys(Action, 0.0)
        self.num_guarded_steps = 0
        self._step_costs_s = 0.0
        self.step_s = 0.0
        """Mean of the last steps."""

        self.follow(policy)

    @property
    def costs(self) -> CostSnapshot:
        """What preemptions are priced by."""
        return self._costs

    @costs.setter
    def costs(self, costs: CostSnapshot) -> None:
        factors = (new / old for new, old in zip(_example_s(costs), _example_s(self._costs), strict=True))
        self._costs = costs
        if self.guard is not None and any(not 1 / OTHER_PRICES < factor < OTHER_PRICES for factor in factors):
            was = self.guard.active
            self.guard.start_over()
            self._say(was)

    def follow(self, policy: PreemptionPolicy) -> None:
        """Decide by this policy from now on."""
        self.name, self._policy = policy, policy_of(policy)

    @property
    def guarded(self) -> bool:
        """Whether the guard keeps the policy from deciding."""
        return self._policy.ahead and self.guard is not None and self.guard.active

    def may_lead(self, *, is_fair: bool) -> bool:
        """Whether `lead` is asked at a shortage: the policy chooses victims itself, or tenants are told apart."""
        return self._policy.ahead or is_fair

    def pressure(
        self,
        swaps: SwapScheduling | None,
        *,
        num_needed_blocks: int,
        num_pool_blocks: int,
        num_running: int,
        now_s: float,
        unsafe: str | None,
    ) -> Pressure:
        """What surrounds the candidates, with all that is remembered of steps and preemptions.

        Args:
            swaps: None: there is no host memory.
            num_running: Requests that run now; 0 where the only one gives way.
            unsafe: Why nothing may be swapped, or None.
        """
        pool = swaps.planner.pool if swaps is not None else None
        queues_s = swaps.queues_s(now_s) if swaps is not None else dict.fromkeys(Direction, 0.0)
        return Pressure(
            num_needed_blocks=num_needed_blocks,
            num_pool_blocks=num_pool_blocks,
            num_running=max(1, num_running),
            num_batch_tokens=num_running,
            num_free_host_slots=pool.num_free_slots + pool.num_retained_slots if pool is not None else 0,
            out_queue_s=queues_s[Direction.OUT],
            in_queue_s=queues_s[Direction.IN],
            step_s=self.step_s,
            resume_wait_s=self.meter.resume_wait_s,
            swap_excess_s=self.meter.swap_excess_s,
            unsafe=unsafe,
        )

    def lead(self, candidates: Sequence[Candidate]) -> bool:
        """Whether `choose` may take this shortage out of vLLM's hands; to be asked once for each."""
        self._probing = self.guarded and self.guard is not None and self.guard.allow_probe()
        tenants_differ = len({candidate.service for candidate in candidates}) > 1
        return tenants_differ or self._probing or (self._policy.ahead and not self.guarded)

    def choose(self, candidates: Sequence[Candidate], pressure: Pressure) -> list[PreemptionDecision]:
        """Choose victims until enough blocks are free; after `lead` said yes."""
        policy, name = (self._policy, self.name) if self._probing else self._in_force
        decisions = policy.choose(candidates, pressure, self.costs)
        self._probing = False
        self._note(name, candidates, pressure, decisions)
        return decisions

    def decide(self, victim: Candidate, pressure: Pressure) -> PreemptionDecision:
        """Choose the action for a victim of vLLM's choice."""
        policy, name = self._in_force
        (decision,) = policy.choose([victim], pressure, self.costs)
        self._note(name, [victim], pressure, [decision])
        return decision

    @property
    def _in_force(self) -> tuple[Policy, PreemptionPolicy]:
        return (self._stock, PreemptionPolicy.RECOMPUTE) if self.guarded else (self._policy, self.name)

    def preempted(
        self,
        decision: PreemptionDecision,
        *,
        now_s: float,
        num_tokens: int,
        num_running: int,
        num_copied_blocks: int = 0,
    ) -> None:
        """The engine has carried out a decision; arguments as `PreemptionMeter.preempted`."""
        prices = decision.prices
        self.num_preemptions[decision.action] += 1
        self._step_costs_s += prices.swap_s if decision.action is Action.SWAP else prices.recompute_s
        self.meter.preempted(
            decision, now_s=now_s, num_tokens=num_tokens, num_running=num_running, num_copied_blocks=num_copied_blocks
        )

    def step_ended(
        self, now_s: float, step_s: float, *, num_decodes: int, prefills: Sequence[Prefill], num_running: int
    ) -> None:
        """Draw conclusions from a step of a busy engine: the headroom, and whether the prices are right."""
        self.step_s += STEP_WEIGHT * (step_s - self.step_s) if self.step_s else step_s
        extra_s = self.meter.step(step_s, num_decodes=num_decodes, prefills=prefills)
        costs_s, self._step_costs_s = self._step_costs_s, 0.0
        guarded = self.guarded
        if guarded or not self._policy.ahead:
            self.headroom.reset()
        elif step_s > 0.0:
            self.headroom.step(costs_s, step_s, num_running=num_running)
        self.num_guarded_steps += guarded
        if extra_s is not None:
            # Every prefill tells whether recomputations are priced well, also where none is ever chosen.
            chunks = [(prefill.first, prefill.num_tokens) for prefill in prefills]
            predicted_s = prefill_s(chunks, num_decodes=num_decodes, costs=self.costs)
            self._observe(now_s, Action.RECOMPUTE, predicted_s=predicted_s, measured_s=extra_s)
        for one in self.meter.take():
            self.num_measured[one.action] += 1
            self.predicted_s[one.action] += one.predicted_s
            self.measured_s[one.action] += one.measured_s
            if one.action is Action.SWAP:
                self._observe(
                    now_s, Action.SWAP, predicted_s=one.predicted_s, measured_s=one.measured_s,
                    harmless_s=HARMLESS_SHARE * one.alternative_s,
                )  # fmt: skip

    def quiet_steps(self, seconds: Sequence[float], *, num_decodes: int, num_running: int) -> None:
        """Steps of decodes alone have ended in which nothing was preempted or copied: as many `step_ended` would."""
        assert not self._step_costs_s, "preemptions in a quiet step"
        step_s = self.step_s
        for one in seconds:
            step_s += STEP_WEIGHT * (one - step_s) if step_s else one
        self.step_s = step_s
        self.meter.quiet_steps(seconds, num_decodes=num_decodes)
        guarded = self.guarded
        if guarded or not self._policy.ahead:
            self.headroom.reset()
        else:
            self.headroom.quiet_steps(len(seconds), num_running=num_running)
        self.num_guarded_steps += guarded * len(seconds)

    def report(self, now_s: float, *, num_tokens: int, num_preemptions: int, num_running: int) -> None:
        """Show the guard what was delivered since the last report."""
        if self.guard is not None and self._policy.ahead:
            was = self.guard.active
            self.guard.observe_throughput(
                now_s, num_tokens=num_tokens, num_preemptions=num_preemptions, num_running=num_running, adaptive=not was
            )
            self._say(was)

    def _observe(
        self, now_s: float, action: Action, *, predicted_s: float, measured_s: float, harmless_s: float = 0.0
    ) -> None:
        if self.guard is not None and self._policy.ahead:
            was = self.guard.active
            self.guard.observe(now_s, action, predicted_s=predicted_s, measured_s=measured_s, harmless_s=harmless_s)
            self._say(was)

    def _note(
        self,
        name: PreemptionPolicy,
        candidates: Sequence[Candidate],
        pressure: Pressure,
        decisions: Sequence[PreemptionDecision],
    ) -> None:
        if self._record is not None:
            self._record(name, candidates, pressure, self.costs, decisions)

    def _say(self, was: bool) -> None:
        assert self.guard is not None, "nothing to say without a guard"
        if self.guard.active and not was:
            logger.warning("Preemptions follow vLLM's own behaviour for now: %s", self.guard.reason)
        elif was and not self.guard.active:
            logger.warning("Preemptions follow the %s policy again: its predictions are good.", self.name)


def _example_s(costs: CostSnapshot) -> tuple[float, float]:
    """Prices of recomputing and of swapping a request of common size, at least a microsecond each."""
    blocks = -(-EXAMPLE_TOKENS // costs.block_size)
    block_s = costs.out_block_s + costs.in_block_s + costs.link_out_block_s + costs.link_in_block_s
    swap_s = 2 * (costs.swap_fixed_s + costs.link_latency_s) + blocks * block_s
    return max(1e-6, prefill_s([(0, EXAMPLE_TOKENS)], num_decodes=0, costs=costs)), max(1e-6, swap_s)
