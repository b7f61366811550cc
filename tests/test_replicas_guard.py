"""Goal: the guard trips when choices are likely wrong, leaves alone what is fine, comes back, and does not flap.

Method: sentences over short streams of samples and reports, with settings in which the numbers are easy to follow; at the
end random streams, where the guard is held against a slow reading of its own rules.
"""

import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import FrozenInstanceError, replace
from functools import partial

import pytest

from replicas.guard import CLIP_LIMITS, Guard, GuardSettings
from replicas.preemption import Action

SETTINGS = GuardSettings(hold_s=30.0, cooldown_s=300.0, max_hold_s=100.0, probe_every=5)
SWAP, RECOMPUTE = Action.SWAP, Action.RECOMPUTE


def feed(guard: Guard, action: Action, ratios: Iterable[float], *, now_s: float = 0.0) -> None:
    """Samples whose prediction was 100 ms."""
    for ratio in ratios:
        guard.observe(now_s, action, predicted_s=0.1, measured_s=0.1 * ratio)
        guard.check()


def tripped(ratio: float = 4.0, *, settings: GuardSettings = SETTINGS) -> Guard:
    """A guard that blames swaps since the time 0, and knows recomputations to be as predicted."""
    guard = Guard(settings)
    feed(guard, RECOMPUTE, [1.0] * 8)
    feed(guard, SWAP, [ratio] * 8)
    assert guard.active
    assert guard.state().blamed is SWAP
    return guard


def window(
    guard: Guard, start_s: float, tokens_per_s: int, *, adaptive: bool, running: int = 10, preemptions: int = 1
) -> None:
    """Reports of ten seconds, one a second; the first one only closes what was before."""
    for second in range(11):
        guard.observe_throughput(
            start_s + second,
            num_tokens=tokens_per_s if second else 0,
            num_preemptions=preemptions if second == 5 else 0,
            num_running=running,
            adaptive=adaptive,
        )
        guard.check()


# Tripping on predictions


def test_a_new_guard_is_not_active_and_has_nothing_to_say() -> None:
    guard = Guard(SETTINGS)
    state = guard.state()
    assert (guard.active, guard.reason, state.blamed, state.since_s) == (False, None, None, None)
    assert (state.ratios, state.num_samples) == ({}, {SWAP: 0, RECOMPUTE: 0})
    guard.check()


def test_good_predictions_never_trip_it() -> None:
    guard = Guard(SETTINGS)
    rng = random.Random(1)
    for _ in range(500):
        feed(guard, rng.choice([SWAP, RECOMPUTE]), [rng.lognormvariate(0.0, 0.4)])
    assert guard.state().since_s is None


def test_an_action_that_takes_far_longer_than_predicted_trips_it_at_the_last_sample_needed_and_says_why() -> None:
    guard = Guard(SETTINGS)
    feed(guard, SWAP, [4.0] * 7)
    assert not guard.active
    feed(guard, SWAP, [4.0], now_s=12.5)
    assert guard.active
    assert guard.reason == "swap takes 4 times as long as predicted."
    assert guard.state().since_s == 12.5


def test_an_error_below_the_trip_ratio_does_not_trip_it() -> None:
    guard = Guard(SETTINGS)
    feed(guard, SWAP, [2.9] * 100)
    assert not guard.active
    assert guard.state().ratios == pytest.approx({SWAP: 2.9})


@pytest.mark.parametrize("outlier", [1e6, 1e-6])
def test_a_few_outliers_however_far_off_do_not_trip_it(outlier: float) -> None:
    guard = Guard(SETTINGS)
    for _ in range(20):
        feed(guard, RECOMPUTE, [1.0] * 8)
        feed(guard, SWAP, [1.0] * 12 + [outlier] * 2)
    assert guard.state().since_s is None


def test_more_than_a_third_of_far_off_samples_trips_it() -> None:
    guard = Guard(SETTINGS)
    feed(guard, SWAP, [1e6, 1.0, 1.0] * 2 + [1e6])
    assert not guard.active
    feed(guard, SWAP, [1.0])
    assert guard.active


# Which errors spoil choices


@pytest.mark.parametrize("ratio", [5.0, 0.2])
def test_an_error_that_both_actions_share_changes_no_choice_and_does_not_trip_it(ratio: float) -> None:
    guard = Guard(replace(SETTINGS, min_samples=4))
    feed(guard, RECOMPUTE, [1.0] * 4)
    feed(guard, SWAP, [1.0] * 4)
    for _ in range(100):
        feed(guard, RECOMPUTE, [ratio])
        feed(guard, SWAP, [ratio])
    assert guard.state().since_s is None
    assert guard.state().ratios == pytest.approx({SWAP: ratio, RECOMPUTE: ratio}, rel=0.01)


@pytest.mark.parametrize("ratio", [10.0, 0.1])
def test_a_shared_error_beyond_the_square_of_the_trip_ratio_trips_it_all_the_same(ratio: float) -> None:
    guard = Guard(SETTINGS)
    for _ in range(100):
        feed(guard, RECOMPUTE, [ratio])
        feed(guard, SWAP, [ratio])
    assert guard.active


@pytest.mark.parametrize(("swap", "recompute"), [(2.0, 0.5), (0.5, 2.0)])
def test_small_errors_in_opposite_directions_trip_it(swap: float, recompute: float) -> None:
    guard = Guard(SETTINGS)
    feed(guard, RECOMPUTE, [recompute] * 20)
    assert not guard.active
    feed(guard, SWAP, [swap] * 8)
    assert guard.active
    assert (
        guard.reason == f"swap takes {swap:.2g} times and recompute takes {recompute:.2g} times as long as predicted."
    )


def test_the_only_action_known_does_no_harm_by_being_better_than_its_price() -> None:
    guard = Guard(SETTINGS)
    feed(guard, SWAP, [0.1] * 50)
    feed(guard, RECOMPUTE, [1.0] * 7)
    assert not guard.active
    feed(guard, RECOMPUTE, [1.0])
    assert guard.active  # now it is known that swaps were priced too high beside recomputations


@pytest.mark.parametrize("wrong", list(Action))
def test_the_action_that_is_further_off_is_blamed_whichever_sample_tripped_it(wrong: Action) -> None:
    other = RECOMPUTE if wrong is SWAP else SWAP
    guard = Guard(SETTINGS)
    feed(guard, wrong, [0.25] * 8)
    feed(guard, other, [1.1] * 8)
    assert guard.state().blamed is wrong


# What a measurement is


@pytest.mark.parametrize("measured_s", [0.0, -0.02, 0.001])
def test_a_measurement_of_nothing_or_less_counts_as_the_shortest_time_that_can_be_told(measured_s: float) -> None:
    guard = Guard(SETTINGS)
    guard.observe(0.0, RECOMPUTE, predicted_s=0.002, measured_s=measured_s)
    assert guard.state().ratios == pytest.approx({RECOMPUTE: 0.5})


def test_a_prediction_below_what_can_be_told_is_not_held_against_the_model() -> None:
    guard = Guard(SETTINGS)
    for _ in range(50):
        guard.observe(0.0, RECOMPUTE, predicted_s=0.0, measured_s=0.0009)
    assert guard.state().ratios == {RECOMPUTE: 1.0}


@pytest.mark.parametrize("measured_s", [math.nan, math.inf, -math.inf])
def test_a_measurement_that_is_not_finite_is_counted_and_not_used(measured_s: float) -> None:
    guard = Guard(SETTINGS)
    for _ in range(20):
        guard.observe(0.0, SWAP, predicted_s=0.1, measured_s=measured_s)
    assert not guard.active
    assert guard.state().num_unusable == 20
    assert guard.state().num_samples == {SWAP: 0, RECOMPUTE: 0}


@pytest.mark.parametrize("predicted_s", [math.nan, math.inf, -0.1])
def test_a_prediction_that_cannot_be_one_is_a_bug_of_the_caller(predicted_s: float) -> None:
    with pytest.raises(AssertionError, match="swap was predicted to take"):
        Guard(SETTINGS).observe(0.0, SWAP, predicted_s=predicted_s, measured_s=0.1)


def test_time_that_runs_backwards_is_a_bug_of_the_caller() -> None:
    guard = Guard(SETTINGS)
    feed(guard, SWAP, [1.0], now_s=5.0)
    for now_s in (4.9, math.nan):
        with pytest.raises(AssertionError, match="time ran backwards"):
            feed(guard, SWAP, [1.0], now_s=now_s)


# Returning


def test_it_returns_at_the_last_good_sample_needed_of_the_action_that_tripped_it() -> None:
    guard = tripped()
    feed(guard, RECOMPUTE, [1.0] * 50, now_s=40.0)
    feed(guard, SWAP, [1.0] * 7, now_s=40.0)
    assert guard.active
    feed(guard, SWAP, [1.0], now_s=41.0)
    assert not guard.active
    assert guard.reason is None
    assert guard.state().since_s == 41.0


def test_an_error_between_the_two_ratios_neither_trips_it_nor_lets_it_return() -> None:
    guard = tripped()
    feed(guard, SWAP, [2.5] * 50, now_s=40.0)
    assert guard.active
    feed(guard, SWAP, [1.0] * 16, now_s=40.0)
    assert not guard.active
    feed(guard, SWAP, [2.5] * 50, now_s=1000.0)
    assert not guard.active


def test_recomputations_bring_their_own_recovery_as_they_go_on_in_stock_mode() -> None:
    guard = Guard(SETTINGS)
    feed(guard, RECOMPUTE, [5.0] * 8)
    assert guard.state().blamed is RECOMPUTE
    feed(guard, RECOMPUTE, [1.2] * 8, now_s=31.0)
    assert not guard.active


def test_one_action_alone_is_forgiven_when_the_other_turns_out_to_err_likewise() -> None:
    guard = Guard(SETTINGS)
    feed(guard, SWAP, [3.5] * 8)
    assert guard.active
    feed(guard, SWAP, [3.5] * 8, now_s=40.0)
    assert guard.active
    feed(guard, RECOMPUTE, [3.5] * 8, now_s=40.0)
    assert not guard.active


def test_a_good_stream_does_not_bring_it_back_before_the_hold_is_over() -> None:
    guard = tripped()
    feed(guard, SWAP, [1.0] * 100, now_s=29.9)
    assert guard.active
    feed(guard, RECOMPUTE, [1.0], now_s=30.0)
    assert not guard.active


def test_a_report_of_throughput_is_enough_to_notice_that_the_hold_is_over() -> None:
    guard = tripped()
    feed(guard, SWAP, [1.0] * 8, now_s=10.0)
    guard.observe_throughput(30.0, num_tokens=0, num_preemptions=0, num_running=0, adaptive=False)
    assert not guard.active


# Probing


def test_one_preemption_in_every_so_many_may_probe_beginning_anew_with_each_trip() -> None:
    guard = tripped()
    assert [guard.allow_probe() for _ in range(12)] == [False, False, False, False, True] * 2 + [False, False]
    feed(guard, SWAP, [1.0] * 8, now_s=40.0)
    feed(guard, SWAP, [9.0] * 16, now_s=50.0)
    assert guard.active
    assert [guard.allow_probe() for _ in range(5)] == [False, False, False, False, True]


def test_asking_for_a_probe_while_decisions_are_adaptive_anyway_is_a_bug_of_the_caller() -> None:
    with pytest.raises(AssertionError, match="nothing to probe"):
        Guard(SETTINGS).allow_probe()


def test_probes_alone_bring_swaps_back_once_they_are_predicted_well() -> None:
    guard = tripped()
    num_preemptions = 0
    while guard.active:
        num_preemptions += 1
        action = SWAP if guard.allow_probe() else RECOMPUTE
        feed(guard, action, [1.0], now_s=float(num_preemptions))
        assert num_preemptions <= 8 * SETTINGS.probe_every
    assert num_preemptions == 8 * SETTINGS.probe_every


# Not flapping


def holds(guard: Guard, *, pause_s: float, num_trips: int) -> list[float]:
    """Return and trip again `pause_s` later, over and over; the hold after each trip."""
    seen = []
    now_s = 0.0
    for _ in range(num_trips):
        seen.append(guard.state().hold_s)
        feed(guard, SWAP, [1.0] * 16, now_s=now_s + 0.99 * seen[-1])
        assert guard.active
        now_s += seen[-1]
        feed(guard, SWAP, [1.0], now_s=now_s)
        assert not guard.active
        now_s += pause_s
        feed(guard, SWAP, [9.0] * 16, now_s=now_s)
        assert guard.active
        assert guard.state().since_s == now_s
    return seen


def test_every_relapse_soon_after_a_return_doubles_the_hold_up_to_its_bound() -> None:
    assert holds(tripped(), pause_s=299.0, num_trips=5) == [30.0, 60.0, 100.0, 100.0, 100.0]


def test_a_trip_long_after_the_last_return_is_no_relapse() -> None:
    guard = tripped()
    assert holds(guard, pause_s=10.0, num_trips=2) == [30.0, 60.0]
    now_s = guard.state().since_s
    assert now_s is not None
    feed(guard, SWAP, [1.0] * 16, now_s=now_s + 100.0)
    assert not guard.active
    feed(guard, SWAP, [9.0] * 16, now_s=now_s + 400.0)
    assert guard.active
    assert guard.state().hold_s == 30.0


def test_a_model_that_is_wrong_every_other_minute_mostly_leaves_stock_behaviour_in_force() -> None:
    guard = Guard(replace(SETTINGS, max_hold_s=3600.0))
    num_active = 0
    for second in range(20_000):
        feed(guard, SWAP, [9.0 if second // 60 % 2 else 1.0], now_s=float(second))
        num_active += guard.active
    assert num_active > 18_000


# Throughput


def test_an_adaptive_window_well_below_stock_throughput_trips_it_and_it_tries_again_after_the_hold() -> None:
    guard = Guard(SETTINGS)
    window(guard, 0, 100, adaptive=False)
    window(guard, 11, 79, adaptive=True)
    assert guard.active
    assert guard.reason == "79 tokens/s are delivered under pressure; stock behaviour gave 100."
    assert guard.state().blamed is None
    window(guard, 22, 100, adaptive=False)
    window(guard, 33, 100, adaptive=False)
    assert guard.active
    window(guard, 44, 100, adaptive=False)
    assert not guard.active


def test_an_adaptive_window_a_little_below_stock_throughput_is_no_reason() -> None:
    guard = Guard(SETTINGS)
    window(guard, 0, 100, adaptive=False)
    window(guard, 11, 81, adaptive=True)
    assert not guard.active


def test_without_a_stock_window_nothing_is_compared() -> None:
    guard = Guard(SETTINGS)
    window(guard, 0, 1000, adaptive=True)
    window(guard, 11, 1, adaptive=True)
    assert not guard.active


@pytest.mark.parametrize(
    ("stock", "adaptive"),
    [({"preemptions": 0}, {}), ({}, {"preemptions": 0}), ({}, {"running": 7}), ({}, {"running": 13})],
    ids=["stock without pressure", "adaptive without pressure", "fewer requests", "more requests"],
)
def test_windows_without_pressure_or_of_another_load_are_not_compared(
    stock: dict[str, int], adaptive: dict[str, int]
) -> None:
    guard = Guard(SETTINGS)
    window(guard, 0, 100, adaptive=False, **stock)
    window(guard, 11, 10, adaptive=True, **adaptive)
    assert not guard.active


@pytest.mark.parametrize("running", [8, 12])
def test_windows_of_about_the_same_load_are_compared(running: int) -> None:
    guard = Guard(SETTINGS)
    window(guard, 0, 100, adaptive=False, running=10)
    window(guard, 11, 10, adaptive=True, running=running)
    assert guard.active


def test_the_load_of_a_window_is_the_mean_over_its_reports_however_many() -> None:
    guard = Guard(SETTINGS)
    window(guard, 0, 100, adaptive=False, running=10)
    for now_s, num_running in ((11.0, 0), (16.0, 5), (21.0, 15)):
        guard.observe_throughput(now_s, num_tokens=50, num_preemptions=1, num_running=num_running, adaptive=True)
    assert guard.active


def test_stock_windows_of_another_load_replace_the_baseline_and_those_of_the_same_load_move_it() -> None:
    guard = Guard(SETTINGS)
    window(guard, 0, 1000, adaptive=False, running=30)
    window(guard, 11, 100, adaptive=False)
    window(guard, 22, 50, adaptive=False)  # the mean is 75 now, the floor 60
    window(guard, 33, 61, adaptive=True)
    assert not guard.active
    window(guard, 44, 59, adaptive=True)
    assert guard.active


def test_the_window_in_which_the_mode_changes_is_not_compared() -> None:
    guard = Guard(SETTINGS)
    window(guard, 0, 100, adaptive=False)
    for second in range(11, 100):
        guard.observe_throughput(second, num_tokens=0, num_preemptions=1, num_running=10, adaptive=second // 9 % 2 == 0)
    assert not guard.active


def test_a_window_with_a_gap_between_reports_is_not_compared() -> None:
    guard = Guard(SETTINGS)
    window(guard, 0, 100, adaptive=False)
    for now_s in (11.0, 16.0, 60.0):
        guard.observe_throughput(now_s, num_tokens=100, num_preemptions=1, num_running=10, adaptive=True)
    assert not guard.active


def test_stock_windows_while_it_is_active_are_a_baseline_for_afterwards() -> None:
    guard = tripped()
    window(guard, 0, 100, adaptive=False)
    feed(guard, SWAP, [1.0] * 8, now_s=40.0)
    assert not guard.active
    window(guard, 41, 50, adaptive=True)
    assert guard.active
    assert guard.state().hold_s == 60.0  # throughput relapses too


def test_predictions_that_went_wrong_meanwhile_keep_it_from_returning_after_a_trip_by_throughput() -> None:
    guard = Guard(SETTINGS)
    window(guard, 0, 100, adaptive=False)
    window(guard, 11, 10, adaptive=True)
    feed(guard, SWAP, [9.0] * 8, now_s=30.0)
    feed(guard, SWAP, [1.0], now_s=100.0)
    assert guard.active
    feed(guard, SWAP, [1.0] * 50, now_s=100.0)
    assert not guard.active


# Settings and state


@pytest.mark.parametrize(
    ("changes", "mend"),
    [
        ({"return_ratio": 3.0}, "return_ratio must be above 1 and below trip_ratio"),
        ({"return_ratio": 1.0}, "return_ratio must be above 1"),
        ({"trip_ratio": math.inf}, "must be finite"),
        ({"trip_ratio": math.nan}, "must be finite"),
        ({"min_samples": 0}, "min_samples must be at least 1"),
        ({"window_samples": 7}, "at most window_samples"),
        ({"probe_every": 0}, "probe_every must be at least 1"),
        ({"throughput_floor": 1.0}, "0 turns the throughput watch off"),
        ({"floor_s": 0.0}, "floor_s must be above 0"),
        ({"window_s": math.nan}, "window_s must be above 0"),
        ({"hold_s": math.inf}, "hold_s must be above 0 and finite"),
        ({"max_hold_s": 29.0}, "max_hold_s must be at least hold_s"),
        ({"cooldown_s": -1.0}, "0 never lengthens the hold"),
    ],
)
def test_a_setting_out_of_its_range_is_refused_with_the_mend(changes: dict[str, float], mend: str) -> None:
    with pytest.raises(ValueError, match=mend):
        replace(SETTINGS, **changes)  # type: ignore[arg-type]


def test_a_state_is_a_frozen_picture_of_its_moment() -> None:
    guard = Guard(SETTINGS)
    feed(guard, SWAP, [2.0])
    before = guard.state()
    feed(guard, SWAP, [1.0])
    assert before.ratios == pytest.approx({SWAP: 2.0})
    with pytest.raises(FrozenInstanceError):
        before.active = True  # type: ignore[misc]


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda guard: setattr(guard._errors[SWAP], "mean", 9.0), "beyond"),
        (lambda guard: setattr(guard, "_num_since_probe", 5), "no probe for 5"),
        (lambda guard: setattr(guard, "_hold_s", 101.0), "the hold is 101"),
        (lambda guard: setattr(guard, "_since_s", 1.0), "began in the future"),
        (lambda guard: setattr(guard, "_since_s", -math.inf), "without a beginning"),
        (lambda guard: setattr(guard, "_reason", None), "blamed for nothing"),
    ],
)
def test_check_finds_broken_books(spoil: Callable[[Guard], None], complaint: str) -> None:
    guard = tripped()
    spoil(guard)
    with pytest.raises(AssertionError, match=complaint):
        guard.check()


# Any stream


def random_calls(seed: int) -> Iterator[tuple[float, Callable[[Guard], object]]]:
    """Times and calls; both actions drift apart and together again, and some measurements are nonsense."""
    rng, now_s, drift = random.Random(seed), 0.0, 0.0
    for _ in range(600):
        now_s += rng.choice([0.0, 0.5, 3.0, 15.0])
        drift = rng.choice([drift] * 30 + [0.0, 1.5, -1.5])
        if rng.random() < 0.8:
            action = rng.choice([SWAP, RECOMPUTE])
            usual_s = 0.1 * math.exp(rng.gauss(drift if action is SWAP else -drift, 1.0))
            measured_s = rng.choice([usual_s] * 12 + [-0.1, 0.0, 1e9, math.nan, math.inf])
            predicted_s = rng.choice([0.1] * 12 + [0.0, 1e9])
            yield (
                now_s,
                partial(Guard.observe, now_s=now_s, action=action, predicted_s=predicted_s, measured_s=measured_s),
            )
        else:
            report = {
                "num_tokens": rng.randint(0, 200),
                "num_preemptions": 1,
                "num_running": rng.choice([9, 10, 11, 20]),
            }
            adaptive = rng.random() < 0.5  # whatever the guard says: a policy can be switched by hand
            yield now_s, partial(Guard.observe_throughput, now_s=now_s, adaptive=adaptive, **report)


def wrongness(guard: Guard) -> float:
    """The factor by which choices may be wrong, read from the state alone."""
    state = guard.state()
    logs = [math.log(r) for action, r in state.ratios.items() if state.num_samples[action] >= SETTINGS.min_samples]
    if len(logs) == 2:
        return math.exp(max(abs(logs[0] - logs[1]), abs(logs[0]) / 2, abs(logs[1]) / 2))
    return math.exp(max([0.0, *logs]))


@pytest.mark.parametrize("seed", range(40))
def test_in_any_stream_the_books_agree_and_modes_change_only_by_the_rules(seed: int) -> None:
    guard, twin = Guard(SETTINGS), Guard(SETTINGS)
    for now_s, call in random_calls(seed):
        before = guard.state()
        call(guard)
        call(twin)
        guard.check()
        after = guard.state()
        assert after == twin.state(), "the same calls gave different answers"
        assert all(abs(math.log(ratio)) <= CLIP_LIMITS * math.log(3.0) + 1e-6 for ratio in after.ratios.values())
        assert after.active or wrongness(guard) <= SETTINGS.trip_ratio + 1e-6
        if before.active and not after.active:
            assert before.since_s is not None
            assert now_s - before.since_s >= before.hold_s, "it returned before the hold was over"
            assert wrongness(guard) < SETTINGS.return_ratio + 1e-6, "it returned to bad predictions"
            assert before.blamed is None or after.num_samples[before.blamed] >= SETTINGS.min_samples
        if after.active and not before.active:
            relapsed = before.since_s is not None and now_s - before.since_s < SETTINGS.cooldown_s
            assert after.hold_s == (min(100.0, 2 * before.hold_s) if relapsed else 30.0)
            assert after.blamed is None or after.num_samples[after.blamed] == 0
        assert (after.since_s == before.since_s) or after.since_s == now_s


def test_those_streams_do_trip_it_in_both_ways_and_let_it_return() -> None:
    changes = set()
    for seed in range(40):
        guard = Guard(SETTINGS)
        for _, call in random_calls(seed):
            before = guard.reason
            call(guard)
            changes.add((before is None, guard.reason and guard.reason.split()[1]))
    assert changes == {
        (True, None),
        (True, "takes"),
        (True, "tokens/s"),
        (False, "takes"),
        (False, "tokens/s"),
        (False, None),
    }
