"""Goal: policy, guard, meter and headroom work together as one, in the hands of an engine or a simulator.

Method: a made-up engine drives a preemptor through preemptions whose true costs are given.
"""

import logging
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from replicas.config import PreemptionPolicy
from replicas.guard import GuardSettings
from replicas.preemption import Action
from replicas.preemption_cost import Candidate
from replicas.preemption_meter import Prefill
from replicas.preemptor import Preemptor
from replicas.throttled_link import Direction
from tests.test_replicas_preemption import COSTS, candidate, pressure

DEAR_SWAPS = replace(COSTS, swap_fixed_s=10.0)
DECODE_S = 0.01
SERVICES = {"first of most": 9.0, "least": 1.0, "last of most": 9.0, "new": 2.0}
LARGE = Candidate(request_id="a", num_tokens=320, num_blocks=20, num_freed_blocks=20)


class Engine:
    """Preempts one request after the other; every one is away for ten steps."""

    def __init__(self, preemptor: Preemptor, *, token_s: float, swap_s: float) -> None:
        self.preemptor, self.token_s, self.swap_s = preemptor, token_s, swap_s
        self.now_s, self.num, self.actions = 0.0, 0, list[Action]()
        for _ in range(10):
            self.step()

    def step(self, prefill: Prefill | None = None) -> None:
        seconds = DECODE_S + (self.token_s * prefill.num_tokens if prefill else 0.0)
        self.now_s += seconds
        self.preemptor.step_ended(
            self.now_s, seconds, num_decodes=4, prefills=[prefill] if prefill else [], num_running=4
        )

    def preempt(self) -> None:
        """A shortage: our choice where the preemptor leads, else vLLM's victim."""
        self.num += 1
        victim = msgspec.structs.replace(LARGE, request_id=f"r{self.num}")
        running = [candidate("leader", 16), victim]
        if self.preemptor.may_lead(is_fair=False) and self.preemptor.lead(running):
            (decision,) = self.preemptor.choose(running, pressure())
        else:
            decision = self.preemptor.decide(victim, pressure())
        assert decision.request_id == victim.request_id
        self.actions.append(decision.action)
        swapped = decision.action is Action.SWAP
        self.preemptor.preempted(
            decision, now_s=self.now_s, num_tokens=320, num_running=4, num_copied_blocks=20 * swapped
        )
        if swapped:
            self.preemptor.meter.copied(Direction.OUT, 20, self.swap_s / 2)
        for _ in range(10):
            self.step()
        self.preemptor.meter.resumed(victim.request_id, self.now_s, num_cached_tokens=0)
        if swapped:
            self.preemptor.meter.loading(victim.request_id, num_blocks=20, num_pool_blocks=100)
            self.preemptor.meter.copied(Direction.IN, 20, self.swap_s / 2)
            self.step()
        else:
            self.step(Prefill(request_id=victim.request_id, first=0, num_tokens=320))


def adaptive(**changes: Any) -> Preemptor:
    return Preemptor(PreemptionPolicy.ADAPTIVE, COSTS, **{"guard": GuardSettings()} | changes)


def test_right_prices_leave_the_policy_in_charge_and_are_told_beside_what_was_measured() -> None:
    preemptor = adaptive()
    engine = Engine(preemptor, token_s=COSTS.token_s, swap_s=0.1)  # as priced: 2 * 10 ms and 2 * 20 * 2 ms
    for _ in range(30):
        engine.preempt()
    assert set(engine.actions) == {Action.SWAP}
    assert not preemptor.guarded
    assert preemptor.num_measured[Action.SWAP] == 30
    assert preemptor.measured_s[Action.SWAP] == pytest.approx(preemptor.predicted_s[Action.SWAP]) == pytest.approx(3.0)


def test_recomputations_that_cost_a_tenth_of_their_price_bring_back_what_vllm_does(
    caplog: pytest.LogCaptureFixture,
) -> None:
    preemptor = adaptive()
    engine = Engine(preemptor, token_s=COSTS.token_s / 10, swap_s=0.1)
    for _ in range(20):  # new requests' prefills tell it, though none is ever recomputed
        engine.step(Prefill(request_id="new", first=0, num_tokens=300))
    assert not preemptor.guarded
    with caplog.at_level(logging.WARNING, logger="replicas.preemptor"):
        for _ in range(40):
            engine.preempt()
    assert preemptor.guarded
    assert engine.actions[:8] == [Action.SWAP] * 8
    assert engine.actions[-15:].count(Action.RECOMPUTE) >= 14  # a probe may be among them
    assert preemptor.num_guarded_steps > 100
    assert preemptor.headroom.num_blocks == 0
    (record,) = caplog.records
    assert "vLLM's own behaviour" in record.getMessage()


def test_a_guarded_policy_still_takes_from_the_most_served_tenant_where_tenants_are_told_apart() -> None:
    preemptor = adaptive()
    engine = Engine(preemptor, token_s=COSTS.token_s / 10, swap_s=0.1)
    for _ in range(20):
        engine.step(Prefill(request_id="new", first=0, num_tokens=300))
    for _ in range(40):
        engine.preempt()
    assert preemptor.guarded
    while preemptor.guard.allow_probe():  # type: ignore[union-attr]
        pass  # the next one is none
    assert not preemptor.lead([candidate("one", 320, service=5.0), candidate("two", 320, service=5.0)])
    running = [
        candidate("light", 320, service=1.0), candidate("flood", 320, service=9.0), candidate("newest", 320, service=1.0)
    ]  # fmt: skip
    assert preemptor.lead(running)
    (decision,) = preemptor.choose(running, pressure())
    assert (decision.request_id, decision.action) == ("flood", Action.RECOMPUTE)


def test_without_a_guard_wrong_prices_go_on() -> None:
    engine = Engine(adaptive(guard=None), token_s=COSTS.token_s / 10, swap_s=0.1)
    for _ in range(40):
        engine.preempt()
    assert set(engine.actions) == {Action.SWAP}


def test_swaps_that_take_longer_than_priced_are_no_mistake_while_recomputing_would_take_longer_still() -> None:
    preemptor = adaptive()
    engine = Engine(preemptor, token_s=COSTS.token_s, swap_s=0.15)  # of 0.1 s; a recomputation takes 0.32 s
    for _ in range(40):
        engine.preempt()
    assert preemptor.guard is not None
    assert preemptor.guard.state().ratios[Action.SWAP] == pytest.approx(1.0)
    assert not preemptor.guarded


def test_dear_preemptions_keep_blocks_free_at_admission_and_a_fixed_policy_never_does() -> None:
    for policy, expected in ((PreemptionPolicy.ADAPTIVE, True), (PreemptionPolicy.RECOMPUTE, False)):
        preemptor = Preemptor(policy, DEAR_SWAPS)
        engine = Engine(preemptor, token_s=DEAR_SWAPS.token_s, swap_s=20.0)
        for _ in range(20):
            engine.preempt()
        assert set(engine.actions) == {Action.RECOMPUTE}
        assert (preemptor.headroom.num_blocks > 0) == expected


def test_another_policy_is_followed_from_the_next_choice_on() -> None:
    preemptor = adaptive()
    engine = Engine(preemptor, token_s=COSTS.token_s, swap_s=0.1)
    engine.preempt()
    preemptor.follow(PreemptionPolicy.RECOMPUTE)
    engine.preempt()
    assert engine.actions == [Action.SWAP, Action.RECOMPUTE]
    assert not preemptor.may_lead(is_fair=False)


@pytest.mark.parametrize("policy", [PreemptionPolicy.RECOMPUTE, PreemptionPolicy.SWAP, PreemptionPolicy.ADAPTIVE])
def test_where_tenants_differ_no_policy_leaves_the_victim_to_vllm(policy: PreemptionPolicy) -> None:
    preemptor = Preemptor(policy, COSTS)
    assert preemptor.may_lead(is_fair=True)
    served = [msgspec.structs.replace(candidate(name, 16), service=service) for name, service in SERVICES.items()]
    assert preemptor.lead(served)
    (decision,) = preemptor.choose(served, pressure())
    assert decision.request_id in ("first of most", "last of most")
    same = [msgspec.structs.replace(each, service=1.0) for each in served]
    assert preemptor.lead(same) == (policy is PreemptionPolicy.ADAPTIVE)


def guarded_by_wrong_prices() -> tuple[Preemptor, Engine]:
    preemptor = adaptive()
    engine = Engine(preemptor, token_s=COSTS.token_s / 10, swap_s=0.1)
    for _ in range(20):
        engine.step(Prefill(request_id="new", first=0, num_tokens=300))
    for _ in range(12):
        engine.preempt()
    assert preemptor.guarded
    return preemptor, engine


def test_other_prices_end_what_the_old_ones_have_brought_about() -> None:
    preemptor, engine = guarded_by_wrong_prices()
    preemptor.costs = replace(COSTS, token_s=COSTS.token_s / 10)
    assert not preemptor.guarded
    for _ in range(20):
        engine.preempt()
    assert not preemptor.guarded
    preemptor.guard.check()  # type: ignore[union-attr]


def test_prices_that_are_only_refined_are_judged_as_before() -> None:
    preemptor, _ = guarded_by_wrong_prices()
    preemptor.costs = replace(COSTS, token_s=COSTS.token_s / 1.2)
    assert preemptor.guarded


def test_other_prices_do_not_end_what_a_loss_of_throughput_has_brought_about() -> None:
    preemptor = adaptive(guard=GuardSettings(window_s=1.0))
    assert preemptor.guard is not None
    for second, (tokens, adaptively) in enumerate([(100, False)] * 4 + [(10, True)] * 4):
        preemptor.guard.observe_throughput(
            float(second), num_tokens=tokens, num_preemptions=1, num_running=8, adaptive=adaptively
        )
    assert preemptor.guarded
    preemptor.costs = replace(COSTS, token_s=COSTS.token_s / 10)
    assert preemptor.guarded


@pytest.mark.parametrize("token_s", [1e-3, 1.0], ids=["right prices", "wrong prices"])
def test_quiet_steps_at_once_teach_what_they_teach_one_by_one(token_s: float) -> None:
    seconds = [DECODE_S * (1.0 + 0.01 * number) for number in range(30)]
    remembered = []
    for at_once in (True, False):
        preemptor = Preemptor(PreemptionPolicy.ADAPTIVE, DEAR_SWAPS, guard=GuardSettings())
        engine = Engine(preemptor, token_s=token_s, swap_s=0.0)
        for _ in range(8):
            engine.preempt()
        assert preemptor.guarded == (token_s > 0.1)
        if at_once:
            preemptor.quiet_steps(seconds, num_decodes=3, num_running=4)
        else:
            for one in seconds:
                preemptor.step_ended(engine.now_s, one, num_decodes=3, prefills=[], num_running=4)
        blocks = preemptor.headroom.num_blocks
        preemptor.meter.step_copies_s = 0.0
        extra_s = preemptor.meter.step(0.5, num_decodes=2, prefills=[Prefill(request_id="new", first=0, num_tokens=10)])
        remembered.append((preemptor.step_s, blocks, preemptor.num_guarded_steps, extra_s))
    assert remembered[0] == remembered[1]
