"""Goal: every policy chooses whom and what its name says, explains it, and never asks for what cannot be done.

Method: the same cases over every policy, then each policy's own choices in hand-made pressures with hand-made costs.
"""

import random
from dataclasses import replace
from typing import Any

import pytest

from cost_service.snapshot import CostSnapshot
from replicas.config import PreemptionPolicy
from replicas.preemption import Action, AdaptivePolicy, FixedPolicy, PreemptionDecision, RandomPolicy, policy_of
from replicas.preemption_cost import Candidate, Pressure, prices

POLICIES = list(PreemptionPolicy)
# A token costs 1 ms to compute, a block of 16 tokens 4 ms to copy out and in, a swap 20 ms on top: they meet at 27 tokens.
COSTS = CostSnapshot(
    version=1,
    model="m",
    hardware="h",
    parallelism=1,
    block_size=16,
    recompute_fixed_s=0.0,
    ridge_tokens=0.0,
    token_s=1e-3,
    attention_s=0.0,
    swap_fixed_s=10e-3,
    out_block_s=2e-3,
    in_block_s=2e-3,
)


def candidate(name: str, tokens: int, **changes: Any) -> Candidate:
    blocks = -(-tokens // 16)
    values = {"request_id": name, "num_tokens": tokens, "num_blocks": blocks, "num_freed_blocks": blocks}
    return Candidate(**values | changes)


def pressure(**changes: Any) -> Pressure:
    values = {
        "num_needed_blocks": 1, "num_pool_blocks": 100, "num_running": 4, "num_batch_tokens": 4,
        "num_free_host_slots": 1000,
    }  # fmt: skip
    return Pressure(**values | changes)


def chosen(decisions: list[PreemptionDecision]) -> list[tuple[str, str]]:
    return [(decision.request_id, decision.action.value) for decision in decisions]


# What holds for every policy


@pytest.mark.parametrize("name", POLICIES)
def test_vllms_own_victim_is_always_decided_on(name: PreemptionPolicy) -> None:
    for victim in (candidate("a", 200), candidate("a", 0), candidate("a", 5), candidate("a", 40, num_freed_blocks=0)):
        (decision,) = policy_of(name).choose([victim], pressure(), COSTS)
        assert decision.request_id == "a"


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize(
    ("victim", "around", "why"),
    [
        (candidate("a", 160), {"unsafe": "several KV cache groups"}, "several KV cache groups"),
        (candidate("a", 160), {"num_free_host_slots": 9}, "the host pool has no room"),
        (candidate("a", 160, num_host_slots=9), {}, "the tenant's share of the host pool is full"),
        (candidate("a", 0), {}, "nothing computed yet"),
        (candidate("a", 160, can_load=False), {}, "the request may not read loaded blocks"),
    ],
)
def test_what_cannot_be_swapped_is_recomputed(
    name: PreemptionPolicy, victim: Candidate, around: dict[str, Any], why: str
) -> None:
    (decision,) = policy_of(name).choose([victim], pressure(**around), COSTS)
    assert decision.action is Action.RECOMPUTE
    if name is PreemptionPolicy.SWAP:
        assert decision.reason == why


@pytest.mark.parametrize("name", POLICIES)
def test_decisions_are_explained_possible_and_enough(name: PreemptionPolicy) -> None:
    rng = random.Random(3)
    for _ in range(300):
        candidates = [
            candidate(str(index), rng.randint(1, 400), num_preemptions=rng.randint(0, 5), service=rng.random())
            for index in range(rng.randint(1, 12))
        ]
        around = pressure(num_needed_blocks=rng.randint(1, 60), num_free_host_slots=rng.randint(0, 60))
        decisions = policy_of(name).choose(candidates, around, COSTS)
        by_id = {one.request_id: one for one in candidates}
        victims = [by_id[decision.request_id] for decision in decisions]
        assert len({victim.request_id for victim in victims}) == len(victims) >= 1
        free_slots, freed = around.num_free_host_slots, 0
        for victim, decision in zip(victims, decisions, strict=True):
            assert freed < around.num_needed_blocks, "somebody gave way for nothing"
            freed += victim.num_freed_blocks
            assert decision.num_blocks == victim.num_freed_blocks
            assert decision.reason
            assert decision.prices.recompute_s > 0
            if decision.action is Action.SWAP:
                free_slots -= victim.num_blocks
        assert free_slots >= 0
        left = [one for one in candidates if one not in victims]
        assert freed >= around.num_needed_blocks or len(left) <= 1 or name is PreemptionPolicy.ADAPTIVE


@pytest.mark.parametrize("name", POLICIES)
def test_the_same_case_gives_the_same_decisions(name: PreemptionPolicy) -> None:
    candidates = [candidate(str(index), 30 * index + 10) for index in range(8)]
    first, again = (policy_of(name).choose(candidates, pressure(num_needed_blocks=9), COSTS) for _ in range(2))
    assert first == again


# Fixed policies


@pytest.mark.parametrize("action", Action)
def test_a_fixed_policy_takes_vllms_victims_from_the_last_one_on(action: Action) -> None:
    running = [candidate("a", 320), candidate("b", 32), candidate("c", 64)]
    decisions = FixedPolicy(action).choose(running, pressure(num_needed_blocks=5), COSTS)
    assert chosen(decisions) == [("c", action.value), ("b", action.value)]


def test_a_fixed_policy_takes_the_last_request_of_the_most_served_tenant_and_never_all() -> None:
    running = [candidate("a", 32, service=9.0), candidate("b", 32, service=9.0), candidate("c", 32, service=2.0)]
    decisions = FixedPolicy(Action.RECOMPUTE).choose(running, pressure(num_needed_blocks=99), COSTS)
    assert [decision.request_id for decision in decisions] == ["b", "a"]


def test_a_swapping_policy_recomputes_those_for_whom_no_room_is_left() -> None:
    running = [candidate("oldest", 64), candidate("a", 64), candidate("b", 64), candidate("c", 160)]
    decisions = FixedPolicy(Action.SWAP).choose(running, pressure(num_needed_blocks=18, num_free_host_slots=12), COSTS)
    assert chosen(decisions) == [("c", "swap"), ("b", "recompute"), ("a", "recompute")]


def test_the_random_policy_takes_both_actions_about_equally() -> None:
    actions = [RandomPolicy().choose([candidate(str(i), 99)], pressure(), COSTS)[0].action for i in range(400)]
    assert 150 < actions.count(Action.SWAP) < 250


# The adaptive policy


def test_short_requests_are_recomputed_and_long_ones_swapped() -> None:
    for tokens, action in ((16, "recompute"), (26, "recompute"), (32, "swap"), (400, "swap")):
        assert chosen(AdaptivePolicy().choose([candidate("a", tokens)], pressure(), COSTS)) == [("a", action)]


def test_the_victim_costs_least_per_block() -> None:
    dear = replace(COSTS, attention_s=1e-5)  # recomputing long contexts is out of proportion
    running = [candidate("leader", 16), candidate("long", 1600), candidate("short", 320)]
    recompute_only = pressure(unsafe="no connector")
    assert chosen(AdaptivePolicy().choose(running, recompute_only, dear)) == [("short", "recompute")]
    assert chosen(AdaptivePolicy().choose(running, pressure(), dear)) == [("long", "swap")]  # overhead per block


def test_a_request_that_shares_its_blocks_frees_too_few_to_be_worth_it() -> None:
    running = [candidate("leader", 16), candidate("shared", 320, num_freed_blocks=2), candidate("own", 320)]
    assert chosen(AdaptivePolicy().choose(running, pressure(), COSTS)) == [("own", "swap")]


def test_a_request_that_is_about_to_end_is_spared() -> None:
    running = [candidate("leader", 16), candidate("ending", 320, num_remaining_tokens=2), candidate("other", 304)]
    assert chosen(AdaptivePolicy().choose(running, pressure(), COSTS)) == [("other", "swap")]


def test_the_oldest_request_of_the_least_served_tenant_never_gives_way() -> None:
    running = [
        candidate("a1", 160, tenant="a", service=9.0),
        candidate("b1", 160, tenant="b", service=2.0),
        candidate("b2", 160, tenant="b", service=2.0),
    ]
    decisions = AdaptivePolicy().choose(running, pressure(num_needed_blocks=1000), COSTS)
    assert sorted(decision.request_id for decision in decisions) == ["a1", "b2"]


def test_the_most_served_tenant_gives_way_unless_another_is_far_cheaper() -> None:
    leader = candidate("leader", 800, tenant="light", service=0.0)
    dear = candidate("dear", 320, tenant="flood", service=900.0)
    cheap = candidate("cheap", 800, tenant="other", service=500.0)
    price = {each.request_id: prices(each, pressure(), COSTS).swap_s / each.num_freed_blocks for each in (dear, cheap)}
    ratio = price["dear"] / price["cheap"]
    assert ratio > 1.0
    for factor, victim in ((1.0, "cheap"), (0.99 * ratio, "cheap"), (1.01 * ratio, "dear"), (1e9, "dear")):
        policy = AdaptivePolicy(others_price_factor=factor)
        (decision,) = policy.choose([leader, dear, cheap], pressure(num_needed_blocks=1), COSTS)
        assert decision.request_id == victim, factor


def test_when_the_most_served_tenant_has_nothing_left_the_next_gives_way() -> None:
    everybody = [
        candidate("leader", 800, service=0.0), candidate("a", 160, service=500.0), candidate("b", 160, service=900.0)
    ]  # fmt: skip
    decisions = AdaptivePolicy(others_price_factor=100.0).choose(everybody, pressure(num_needed_blocks=15), COSTS)
    assert [decision.request_id for decision in decisions] == ["b", "a"]


def test_a_trade_off_that_favours_other_tenants_is_refused() -> None:
    with pytest.raises(ValueError, match="others_price_factor must be a number from 1 on"):
        AdaptivePolicy(others_price_factor=0.5)


def test_who_has_given_way_often_enough_is_spared_while_others_are_there() -> None:
    running = [candidate("leader", 16), candidate("tired", 320, num_preemptions=3), candidate("fresh", 48)]
    assert chosen(AdaptivePolicy().choose(running, pressure(num_needed_blocks=20), COSTS)) == [("fresh", "swap")]
    only_tired = [candidate("leader", 16), candidate("tired", 320, num_preemptions=3)]
    assert chosen(AdaptivePolicy().choose(only_tired, pressure(), COSTS)) == [("tired", "swap")]


def test_a_slow_link_turns_the_choice_and_a_backlog_on_it_too() -> None:
    victim = [candidate("a", 320)]
    assert chosen(AdaptivePolicy().choose(victim, pressure(), COSTS)) == [("a", "swap")]
    slow = replace(COSTS, link_out_block_s=50e-3, link_in_block_s=50e-3)
    assert chosen(AdaptivePolicy().choose(victim, pressure(), slow)) == [("a", "recompute")]
    fair = replace(COSTS, link_out_block_s=5e-3, link_in_block_s=5e-3)
    assert chosen(AdaptivePolicy().choose(victim, pressure(), fair)) == [("a", "swap")]
    backlog = pressure(out_queue_s=2.0)
    assert chosen(AdaptivePolicy().choose(victim, backlog, fair)) == [("a", "recompute")]


def test_the_prices_of_a_decision_are_those_of_its_victim_at_that_moment() -> None:
    running = [candidate("leader", 16), candidate("b", 320), candidate("c", 336)]
    fair = replace(COSTS, link_out_block_s=1e-3, link_in_block_s=1e-3)
    first, second = AdaptivePolicy().choose(running, pressure(num_needed_blocks=30), fair)
    assert first.prices == prices(running[2], pressure(num_needed_blocks=30), fair)
    assert second.prices.terms_s["swap_wait"] > prices(running[1], pressure(), fair).terms_s["swap_wait"]


# Room that lies idle


def test_cheap_preemptions_take_a_small_victim_and_dear_ones_a_large_one() -> None:
    """A step of 50 ms and 12 running: a block is grown in 67 ms, and a pool of 100 is worth 10 ms of it."""
    small, large = candidate("small", 48), candidate("large", 640)
    candidates = [candidate("leader", 400, service=-1.0), small, large]
    around = pressure(num_needed_blocks=1, num_running=12, num_pool_blocks=100, step_s=0.05)
    for price_s, victim in ((1e-4, "small"), (1.0, "large")):
        costs = replace(COSTS, recompute_fixed_s=price_s, swap_fixed_s=10 * price_s, token_s=0.0, attention_s=0.0)
        assert chosen(AdaptivePolicy().choose(candidates, around, costs)) == [(victim, "recompute")]


def test_without_a_known_step_idle_room_costs_nothing() -> None:
    candidates = [candidate("leader", 400, service=-1.0), candidate("small", 48), candidate("large", 640)]
    costs = replace(COSTS, recompute_fixed_s=1e-4, swap_fixed_s=1e-3, token_s=0.0, attention_s=0.0)
    around = pressure(num_needed_blocks=1, num_running=12, num_pool_blocks=100)
    assert chosen(AdaptivePolicy().choose(candidates, around, costs)) == [("large", "recompute")]
