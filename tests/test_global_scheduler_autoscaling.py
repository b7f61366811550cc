"""Goal: there are as many replicas as the load asks for, and their number changes slowly, within limits and for a reason.

Method: plain values and times that the test says; then random loads over random times, where every decision is held against
the rules of the module, and a cluster of one formula that the policy scales.
"""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cost_service.service_messages import AutoscalingStats
from global_scheduler.autoscaling import (
    AutoscalerSettings,
    AutoscalerState,
    Observed,
    ScalingDecision,
    decide,
    demand,
)

AIMS = AutoscalerSettings(min_replicas=1, max_replicas=10)
AT_ONCE = replace(AIMS, up_delay_s=0.0, down_delay_s=0.0, up_cooldown_s=0.0, down_cooldown_s=0.0)


def seen(full: float = 0.5, **changes: Any) -> Observed:
    """A replica with so much of its memory in use."""
    rate = changes.pop("preemptions_per_s", 0.0)
    numbers = {"num_running": 4, "num_blocks": 1000, "num_free_blocks": round(1000 * (1 - full)), "max_num_seqs": 64}
    return Observed(stats=AutoscalingStats(**numbers | changes), preemptions_per_s=rate)


class Driven:
    """A policy and the number that it has set, driven through time."""

    def __init__(self, aims: AutoscalerSettings, num: int, now_s: float = 0.0) -> None:
        self.aims, self.num, self.now_s = aims, num, now_s
        self.state = AutoscalerState.begin(now_s, aims)

    def after(self, seconds: float, *replicas: Observed, num_running: int | None = None) -> ScalingDecision:
        self.now_s += seconds
        running = len(replicas) if num_running is None else num_running
        decision, self.state = decide(
            self.state, replicas, num_running=running, num_target=self.num, settings=self.aims, now_s=self.now_s
        )
        self.state.check()
        self.num = decision.num_replicas
        return decision


def asked(*replicas: Observed, aims: AutoscalerSettings = AIMS, num_running: int | None = None) -> int:
    return demand(replicas, num_running=num_running or len(replicas), settings=aims).num_replicas


def test_memory_is_shared_out_so_that_the_target_is_in_use() -> None:
    assert asked(seen(0.8)) == 1
    assert asked(seen(0.81)) == 2
    assert asked(seen(0.9), seen(0.9)) == 3
    assert asked(seen(0.1), seen(0.1), seen(0.1)) == 1


def test_seats_count_like_memory() -> None:
    assert asked(seen(0.1, num_running=64)) == 2


def test_what_waits_is_to_be_served_within_the_target() -> None:
    assert asked(seen(queued_s=10.0)) == 1
    assert asked(seen(queued_s=30.0), seen(queued_s=15.0)) == 5
    assert "30.0 s of predicted work wait" in demand([seen(queued_s=30.0)], num_running=1, settings=AIMS).why


def test_who_preempts_often_is_short_of_memory_however_full_it_is_at_the_moment() -> None:
    assert asked(seen(0.5, preemptions_per_s=1.0), seen(0.5, preemptions_per_s=1.0)) == 2
    assert asked(seen(0.5, preemptions_per_s=3.0), seen(0.5, preemptions_per_s=0.0)) == 3


def test_a_replica_that_has_not_worked_yet_is_empty() -> None:
    assert asked(Observed(stats=AutoscalingStats()), seen(0.9)) == 2


def test_who_says_nothing_is_taken_for_an_average_one() -> None:
    assert asked(seen(0.8), num_running=3) == 3


def test_limits_hold_whatever_is_asked_for() -> None:
    assert asked(seen(queued_s=1e9)) == 10
    assert asked(seen(0.0, num_running=0), aims=replace(AIMS, min_replicas=3)) == 3


def test_more_must_be_asked_for_a_while_and_comes_in_steps() -> None:
    driven = Driven(replace(AIMS, max_step_up=2), 1)
    flooded = seen(1.0, queued_s=100.0, num_waiting=50)
    assert driven.after(0.0, flooded).num_replicas == 1
    assert "must last 5 s more" in driven.after(0.0, flooded).why
    assert driven.after(5.0, flooded).num_replicas == 3
    assert "must last 5 s more" in driven.after(1.0, flooded).why
    assert "cool-down lasts 24 s more" in driven.after(5.0, flooded).why
    assert driven.after(5.0, flooded).num_replicas == 3
    assert driven.after(19.0, flooded).num_replicas == 5


def test_a_load_that_stops_asking_begins_anew() -> None:
    driven = Driven(AIMS, 1)
    for _ in range(5):
        assert driven.after(3.0, seen(1.0)).num_replicas == 1
        assert driven.after(3.0, seen(0.7)).num_replicas == 1


def test_the_same_load_asks_for_the_same_number_while_replicas_start() -> None:
    driven = Driven(replace(AT_ONCE, max_step_up=1), 2)
    assert driven.after(1.0, seen(1.0), seen(1.0)).num_replicas == 3
    for _ in range(20):
        assert driven.after(1.0, seen(1.0), seen(1.0)).num_replicas == 3, "two run, the third one starts"
    preempting = seen(0.5, preemptions_per_s=5.0)
    for _ in range(20):
        assert driven.after(1.0, preempting, preempting).num_replicas == 3


def test_less_falls_one_at_a_time_to_what_was_needed_lately() -> None:
    driven = Driven(AIMS, 4)
    quiet = [seen(0.1)] * 4
    assert "must last 120 s more" in driven.after(0.0, *quiet).why
    decisions = [driven.after(1.0, *quiet[: driven.num]) for _ in range(1500)]
    numbers = [each.num_replicas for each in decisions]
    assert numbers == sorted(numbers, reverse=True)
    assert set(numbers) == {4, 3, 2, 1}
    changes = [place for place in range(1, 1500) if numbers[place] != numbers[place - 1]]
    assert all(later - earlier >= 300 for earlier, later in pairwise(changes))


def test_a_peak_within_the_delay_keeps_what_it_needed() -> None:
    aims = replace(AT_ONCE, down_delay_s=100.0, max_step_down=9)
    driven = Driven(aims, 8)
    for second in range(100):
        driven.after(1.0, *[seen(0.4 if second == 50 else 0.1)] * 8)
    assert driven.num == 8
    driven.after(1.0, *[seen(0.1)] * 8)
    assert driven.num == 6, "0.4 of eight asks for six of 0.6"


def test_nothing_falls_while_somebody_waits() -> None:
    driven = Driven(AT_ONCE, 3)
    assert "1 requests wait" in driven.after(9.0, seen(0.1), seen(0.1, num_waiting=1), seen(0.1)).why
    assert driven.num == 3
    assert driven.after(1.0, *[seen(0.1)] * 3).num_replicas == 2


def test_nothing_falls_while_a_replica_is_silent() -> None:
    driven = Driven(AT_ONCE, 3)
    assert "1 of 3 replicas say nothing" in driven.after(9.0, seen(0.1), seen(0.1), num_running=3).why
    assert driven.after(1.0, seen(0.1), seen(0.1), seen(0.1, age_s=31.0)).num_replicas == 3
    assert driven.after(1.0, num_running=3).num_replicas == 3
    idle = seen(0.0, age_s=1e6, num_running=0)
    assert driven.after(1.0, idle, idle, idle).num_replicas == 2, "who has nothing to do has nothing to say"


def test_a_number_out_of_the_limits_is_put_right_at_once() -> None:
    driven = Driven(AIMS, 20)
    assert driven.after(0.0, *[seen(1.0, num_waiting=3)] * 20).num_replicas == 10
    assert Driven(replace(AIMS, min_replicas=4), 1).after(0.0, seen(0.1)).num_replicas == 4


def test_a_clock_that_jumps_back_stands_still() -> None:
    driven = Driven(AIMS, 1, now_s=1000.0)
    driven.after(0.0, seen(1.0))
    driven.after(-900.0, seen(1.0))
    assert driven.num == 1
    assert driven.state.now_s == 1000.0
    driven.now_s = 1005.0
    assert driven.after(0.0, seen(1.0)).num_replicas == 2


def test_a_state_survives_as_plain_values() -> None:
    driven = Driven(AIMS, 3)
    driven.after(5.0, seen(0.1), seen(0.1), seen(0.1))
    assert driven.state.below_since_s == 5.0
    assert AutoscalerState(**driven.state.to_mapping()) == driven.state


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"min_replicas": 0}, "min_replicas"),
        ({"min_replicas": 5, "max_replicas": 4}, "min_replicas must not be above max_replicas"),
        ({"target_kv_use": 0.0}, "target_kv_use"),
        ({"target_kv_use": 1.5}, "target_kv_use"),
        ({"target_queued_s": -1.0}, "target_queued_s"),
        ({"max_step_down": 0}, "max_step_down"),
        ({"down_margin": 1.0}, "down_margin"),
        ({"down_delay_s": float("nan")}, "down_delay_s"),
        ({"max_preemptions_per_s": float("inf")}, "max_preemptions_per_s"),
    ],
)
def test_impossible_settings_are_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        AutoscalerSettings(**changes)


REPLICA = st.builds(
    seen, st.floats(0.0, 1.0), queued_s=st.floats(0.0, 100.0), num_waiting=st.integers(0, 3),
    num_running=st.integers(0, 70), age_s=st.sampled_from([0.0, 5.0, 100.0]), preemptions_per_s=st.floats(0.0, 3.0),
)  # fmt: skip
SETTINGS = st.builds(
    AutoscalerSettings, min_replicas=st.integers(1, 3), max_replicas=st.integers(3, 9),
    target_kv_use=st.floats(0.1, 1.0), target_queued_s=st.floats(0.1, 50.0), max_step_up=st.integers(1, 4),
    max_step_down=st.integers(1, 3), up_delay_s=st.floats(0.0, 20.0), down_delay_s=st.floats(0.0, 60.0),
    up_cooldown_s=st.floats(0.0, 40.0), down_cooldown_s=st.floats(0.0, 80.0), down_margin=st.floats(0.0, 0.5),
)  # fmt: skip
LOOK = st.tuples(st.floats(-5.0, 60.0), st.lists(REPLICA, max_size=9), st.integers(0, 3))
"""Seconds since the last one, what was reported, and replicas that have never reported."""


@settings(max_examples=300, deadline=None)
@given(SETTINGS, st.integers(3, 3), st.lists(LOOK, min_size=1, max_size=25))
def test_every_decision_keeps_the_rules(
    aims: AutoscalerSettings, num: int, looks: list[tuple[float, list[Observed], int]]
) -> None:
    driven = Driven(aims, num)
    changed_s = -float("inf")
    latest_s = 0.0
    for seconds, replicas, num_missing in looks:
        before = driven.num
        decision = driven.after(seconds, *replicas, num_running=len(replicas) + num_missing)
        latest_s = max(latest_s, driven.now_s)
        assert aims.min_replicas <= decision.num_replicas <= aims.max_replicas
        assert -aims.max_step_down <= decision.num_replicas - before <= aims.max_step_up
        assert str(decision.num_replicas) in decision.why
        assert decision.why.endswith(".")
        if decision.num_replicas < before:
            assert not any(one.stats.num_waiting for one in replicas)
            assert not num_missing
            assert not any(one.is_silent(aims.max_report_age_s) for one in replicas)
            assert latest_s - changed_s >= aims.down_cooldown_s - 1e-6
        if decision.num_replicas > before:
            assert latest_s - changed_s >= aims.up_cooldown_s - 1e-6
        if decision.num_replicas != before:
            changed_s = latest_s


@settings(max_examples=200, deadline=None)
@given(st.floats(0.0, 8.0), st.integers(1, 10), SETTINGS)
def test_a_steady_load_moves_the_number_one_way_and_then_no_more(
    load: float, num: int, aims: AutoscalerSettings
) -> None:
    """`load` replicas' memory is in use, shared out evenly, and replicas come at once."""
    num = min(max(num, aims.min_replicas), aims.max_replicas)
    driven, numbers = Driven(aims, num), [num]
    for _ in range(300):
        driven.after(10.0, *[seen(min(1.0, load / driven.num), num_running=1)] * driven.num)
        numbers.append(driven.num)
    assert numbers in (sorted(numbers), sorted(numbers, reverse=True)), numbers
    assert len(set(numbers[150:])) == 1, "it has come to rest"
