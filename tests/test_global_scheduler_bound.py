"""Goal: the bound says its terms, max-min shares are max-min, and the checker never reports less than the true gap.

Method: examples by hand; every level of shares against linear programming on random reaches; the checker against all pairs
on random histories.
"""

import random
from itertools import combinations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from cost_service.service_messages import ReplicaLimits
from global_scheduler.bound import FairnessBound, VictimRule, fairness_bound, num_refilled_tokens
from global_scheduler.fairness_checker import FairnessChecker
from global_scheduler.max_min import max_min_levels

REPLICA = ReplicaLimits(
    num_pool_tokens=10_000, max_num_seqs=64, max_tokens=1024, max_service_per_s=2000.0, max_decode_tokens_per_s=500.0
)


def test_the_bound_is_the_formula_of_the_reference() -> None:
    bound = fairness_bound([REPLICA] * 4, max_input_tokens=256, interval_s=0.1, round_trip_s=0.05)
    assert bound.unit == max(256.0, 2.0 * 40_000) + 0.25 * 8000.0
    assert bound.decode_stale_service == pytest.approx(2.0 * 2000.0 * 0.15), "as section 7 of the reference has it"
    assert bound.pair(1.0, 1.0) == 2.0 * 82_000.0
    assert bound.pair(1.0, 4.0) == 1.25 * 82_000.0
    for term in (
        "prompt 256",
        "memory 80000",
        "M = 40000 tokens",
        "most-served tenant",
        "stale 2000",
        "decode alone 600",
        "= 82000",
        "164000",
    ):
        assert term in str(bound)


def test_a_time_without_the_scheduler_counts_what_all_replicas_but_one_can_give_in_it() -> None:
    here = fairness_bound([REPLICA] * 4, max_input_tokens=256, interval_s=0.1, round_trip_s=0.0)
    away = fairness_bound([REPLICA] * 4, max_input_tokens=256, interval_s=0.1, round_trip_s=0.0, away_s=30.0)
    assert away.unit == here.unit + 30.0 * 3 * 2000.0
    assert away.worst == here.worst + 30.0 * 3 * 2000.0
    assert "unheard 180000" in str(away)
    late = fairness_bound([REPLICA] * 4, max_input_tokens=256, interval_s=0.1, round_trip_s=0.0, absent_s=30.0)
    assert late == away, "who is absent may be as far ahead"
    alone = fairness_bound([REPLICA], max_input_tokens=256, interval_s=0.1, round_trip_s=0.0, away_s=30.0)
    assert alone.unheard_service == 0.0, "one replica sees all by itself"


def test_with_vllms_own_victims_memory_does_not_bound_a_leader() -> None:
    bound = fairness_bound(
        [REPLICA], max_input_tokens=256, interval_s=0.0, round_trip_s=0.0, victims=VictimRule.LAST_COME
    )
    assert bound.unit == 2.0 * 64 * 1024


def test_a_prompt_longer_than_memory_is_worth_decides() -> None:
    assert fairness_bound([REPLICA], max_input_tokens=100_000, interval_s=0.0, round_trip_s=0.0).unit == 100_000.0


def test_terms_without_meaning_are_refused() -> None:
    with pytest.raises(ValueError, match="output_weight must be at least input_weight"):
        fairness_bound([REPLICA], max_input_tokens=1, interval_s=0.0, round_trip_s=0.0, input_weight=3.0)
    with pytest.raises(ValueError, match=r"interval_s is -1\.0"):
        fairness_bound([REPLICA], max_input_tokens=1, interval_s=-1.0, round_trip_s=0.0)
    with pytest.raises(ValueError, match=r"away_s is -1\.0"):
        fairness_bound([REPLICA], max_input_tokens=1, interval_s=0.0, round_trip_s=0.0, away_s=-1.0)
    with pytest.raises(ValueError, match="round_trip_s is nan"):
        fairness_bound([REPLICA], max_input_tokens=1, interval_s=0.0, round_trip_s=float("nan"))


def generated(prompts: list[int], num_pool_tokens: int, max_tokens: int, chance: random.Random) -> int:
    """Tokens that requests generate in a pool of their own until none is left: they grow alike, a full pool takes one."""
    outputs = [[prompt, 0] for prompt in prompts]
    num = 0
    while outputs:
        free = num_pool_tokens - sum(map(sum, outputs))
        if free <= 0 and len(outputs) == 1:
            return num
        if free <= 0:
            outputs.remove(chance.choice(outputs))
            continue
        for each in outputs[:free]:
            each[1] += 1
            num += 1
        outputs = [each for each in outputs if each[1] < max_tokens]
    return num


@given(st.lists(st.integers(0, 60), min_size=1, max_size=12), st.integers(60, 300), st.integers(0, 99))
@settings(deadline=None, max_examples=300)
def test_a_leaders_requests_generate_no_more_than_the_refills_allow(
    prompts: list[int], num_pool_tokens: int, seed: int
) -> None:
    limits = msgspec.structs.replace(
        REPLICA, num_pool_tokens=num_pool_tokens, max_num_seqs=len(prompts), max_tokens=100
    )
    while sum(prompts) > num_pool_tokens:
        prompts = prompts[1:]
    num = generated(prompts, num_pool_tokens, 100, random.Random(seed))
    assert num <= num_refilled_tokens(limits, 60) + 2 * limits.max_num_seqs, "whole tokens make it a little more"


def test_requests_without_prompts_do_generate_that_much() -> None:
    limits = msgspec.structs.replace(REPLICA, num_pool_tokens=20_000, max_num_seqs=8, max_tokens=20_000)
    num = generated([0] * 8, 20_000, 20_000, random.Random(1))
    assert num == pytest.approx(num_refilled_tokens(limits, 0), rel=0.01)
    assert num > 2.7 * 20_000, "M alone is no bound"


def shares(reach: dict[str, str], weights: dict[str, float] | None = None, **rates: float) -> dict[str, float]:
    levels = max_min_levels(
        weights or dict.fromkeys(reach, 1.0), {name: frozenset(where) for name, where in reach.items()}, rates
    )
    return {name: level.rate for level in levels for name in level.tenants}


def test_who_reaches_everything_shares_everything() -> None:
    assert shares({"f": "ab", "g": "ab"}, a=1.0, b=1.0) == {"f": 1.0, "g": 1.0}


def test_a_tenant_pinned_to_half_of_the_replicas_still_has_half() -> None:
    assert shares({"f": "abcd", "g": "ab"}, a=1.0, b=1.0, c=1.0, d=1.0) == {"f": 2.0, "g": 2.0}


def test_a_tenant_pinned_to_one_of_four_has_that_one() -> None:
    assert shares({"f": "abcd", "g": "a"}, a=1.0, b=1.0, c=1.0, d=1.0) == {"f": 3.0, "g": 1.0}


def test_the_middle_of_three_levels_is_found() -> None:
    assert shares({"f": "a", "g": "a", "h": "ab", "i": "abc"}, a=2.0, b=3.0, c=9.0) == {
        "f": 1.0,
        "g": 1.0,
        "h": 3.0,
        "i": 9.0,
    }


def test_weights_count() -> None:
    assert shares({"f": "ab", "g": "ab"}, {"f": 3.0, "g": 1.0}, a=2.0, b=2.0) == {"f": 1.0, "g": 1.0}


def test_a_tenant_that_reaches_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="'f' reaches none"):
        shares({"f": "z"}, a=1.0)


@st.composite
def clusters(draw: st.DrawFn) -> tuple[dict[str, float], dict[str, frozenset[str]], dict[str, float]]:
    rates = {name: float(draw(st.integers(1, 9))) for name in "abcd"[: draw(st.integers(1, 4))]}
    names = "fghijk"[: draw(st.integers(1, 6))]
    reach = {name: draw(st.frozensets(st.sampled_from(sorted(rates)), min_size=1)) for name in names}
    return {name: float(draw(st.integers(1, 4))) for name in names}, reach, rates


def largest_least_rate(
    weights: dict[str, float], reach: dict[str, frozenset[str]], rates: dict[str, float], fixed: dict[str, float]
) -> float:
    """The largest rate that all tenants who are not fixed can have at once, by linear programming."""
    edges = [(name, where) for name in weights for where in sorted(reach[name])]
    cost = [0.0] * len(edges) + [-1.0]
    upper = [[1.0 if where == place else 0.0 for _, where in edges] + [0.0] for place in rates]
    limits = list(rates.values())
    for name, weight in weights.items():
        wanted = 0.0 if name in fixed else weight
        upper.append([-1.0 if name == each else 0.0 for each, _ in edges] + [wanted])
        limits.append(-fixed[name] * weight * (1 - 1e-9) if name in fixed else 0.0)
    return float(linprog(cost, A_ub=upper, b_ub=limits).x[-1])


@given(clusters())
@settings(max_examples=60, deadline=None)
def test_every_level_is_the_most_that_all_who_are_left_can_have(
    cluster: tuple[dict[str, float], dict[str, frozenset[str]], dict[str, float]],
) -> None:
    weights, reach, rates = cluster
    levels = max_min_levels(weights, reach, rates)
    assert frozenset().union(*(level.tenants for level in levels)) == set(weights)
    assert [level.rate for level in levels] == sorted(level.rate for level in levels)
    fixed: dict[str, float] = {}
    for level in levels:
        assert level.rate == pytest.approx(largest_least_rate(weights, reach, rates, fixed), rel=1e-6)
        fixed |= dict.fromkeys(level.tenants, level.rate)


class AllPairs:
    """The gap by definition: what each pair's difference ranges over while both wait."""

    def __init__(self, weights: dict[str, float]) -> None:
        self.weights = weights
        self.served = dict.fromkeys(weights, 0.0)
        self.waiting: set[str] = set()
        self.ranges: dict[tuple[str, str], tuple[float, float]] = {}
        self.worst = dict.fromkeys(combinations(sorted(weights), 2), 0.0)

    def difference(self, pair: tuple[str, str]) -> float:
        return self.served[pair[0]] / self.weights[pair[0]] - self.served[pair[1]] / self.weights[pair[1]]

    def set_waiting(self, tenant: str, waiting: bool) -> None:
        (self.waiting.add if waiting else self.waiting.discard)(tenant)
        for pair in self.worst:
            if not set(pair) <= self.waiting:
                self.ranges.pop(pair, None)
            elif pair not in self.ranges:
                self.ranges[pair] = (self.difference(pair),) * 2

    def serve(self, tenant: str, service: float) -> None:
        self.served[tenant] += service
        for pair, (low, high) in self.ranges.items():
            now = self.difference(pair)
            self.ranges[pair] = low, high = min(low, now), max(high, now)
            self.worst[pair] = max(self.worst[pair], high - low)


UNIT = FairnessBound(
    prompt_service=0.0,
    memory_service=100.0,
    num_memory_tokens=50,
    refill_service=0.0,
    unheard_service=0.0,
    stale_service=0.0,
    decode_stale_service=0.0,
    victims=VictimRule.MOST_SERVED,
)
EVENTS = st.lists(
    st.tuples(st.sampled_from("fghi"), st.one_of(st.booleans(), st.integers(1, 60))), max_size=80
)  # fmt: skip


@given(EVENTS, st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=4, max_size=4))
@settings(deadline=None)
def test_the_checker_reports_no_less_than_the_true_gap_and_at_most_what_both_leads_range_over(
    events: list[tuple[str, bool | int]], chosen: list[float]
) -> None:
    weights = dict(zip("fghi", chosen, strict=True))
    checker, pairs = FairnessChecker(UNIT), AllPairs(weights)
    for tenant, weight in weights.items():
        checker.set_weight(tenant, weight)
    for tenant, what in events:
        if isinstance(what, bool):
            checker.set_waiting(tenant, what)
            pairs.set_waiting(tenant, what)
        elif tenant in pairs.waiting:
            checker.serve(tenant, float(what))
            pairs.serve(tenant, float(what))
        assert checker.gap().stray <= checker.worst.stray + 1e-12
        for (f, g), gap in pairs.worst.items():
            assert gap <= checker.worst.stray * UNIT.pair(weights[f], weights[g]) * (1 + 1e-9)


def test_alternating_tenants_stray_by_one_service_and_a_favoured_one_without_end() -> None:
    fair, unfair = FairnessChecker(UNIT), FairnessChecker(UNIT)
    for checker in (fair, unfair):
        for tenant in "fg":
            checker.set_waiting(tenant, True)
    for number in range(100):
        fair.serve("fg"[number % 2], 10.0)
        unfair.serve("f", 10.0)
    assert fair.gap().gap <= 20.0
    assert not fair.broken
    assert unfair.gap().gap == 1000.0
    assert unfair.broken


def test_an_event_looks_at_few_tenants_even_when_the_one_ahead_ceases_to_wait() -> None:
    checker, chance, num_looks = FairnessChecker(UNIT), random.Random(5), 0
    for number in range(2000):
        checker.set_waiting(f"t{number}", True)
    for number in range(2000):
        checker.serve(f"t{number}", chance.uniform(1.0, 1000.0))
    group = checker._groups[""]
    key = group.strays._key

    def counted(name: str) -> float:
        nonlocal num_looks
        num_looks += 1
        return key(name)

    group.strays._key = counted
    for _ in range(500):
        ahead = group.leaders()[0]
        checker.set_waiting(ahead, False)
        checker.set_waiting(ahead, True)
        checker.serve(ahead, 5.0)
    assert num_looks < 2000 + 500 * 20, "each entry is corrected once; then an event looks at a few"


def test_a_weight_out_of_range_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"weight is 0\.0"):
        FairnessChecker(UNIT).set_weight("f", 0.0)


def test_tenants_of_different_groups_are_not_compared() -> None:
    checker = FairnessChecker(UNIT)
    checker.set_group("g", "pinned")
    for tenant in "fg":
        checker.set_waiting(tenant, True)
    checker.serve("f", 5000.0)
    assert not checker.broken
    checker.set_group("g", "")
    checker.serve("f", 5000.0)
    assert checker.broken
