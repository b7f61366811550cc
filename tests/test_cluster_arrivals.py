"""Goal: arrivals have the rate, the bursts, the ramps and the pauses that are asked for.

Method: steady beats, whose times can be written down; long random streams, whose means are known; the integral of the rate.
"""

import itertools
import random
import statistics
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.arrivals import Arrivals


def times_s(num: int = 10_000, seed: int = 1, **settings: float | None) -> list[float]:
    return list(islice(Arrivals(**settings).times_s(random.Random(seed)), num))  # type: ignore[arg-type]


def test_a_steady_beat_begins_at_the_start_and_ends_before_the_end() -> None:
    assert times_s(rate=0.5, cv=0, start_s=10, duration_s=8) == [10, 12, 14, 16]


@pytest.mark.parametrize("rate", [0, float("inf")])
def test_without_a_finite_rate_all_come_at_the_start(rate: float) -> None:
    assert times_s(3, rate=rate, start_s=2) == [2, 2, 2]


@pytest.mark.parametrize("cv", [0.3, 1.0, 3.0])
def test_gaps_have_the_mean_of_the_rate_and_the_asked_variation(cv: float) -> None:
    gaps_s = [after - before for before, after in itertools.pairwise(times_s(rate=50, cv=cv))]
    assert statistics.fmean(gaps_s) == pytest.approx(1 / 50, rel=0.1)
    assert statistics.stdev(gaps_s) / statistics.fmean(gaps_s) == pytest.approx(cv, rel=0.1)


def test_nothing_comes_in_a_pause_and_the_beat_goes_on_after_it() -> None:
    assert times_s(rate=0.5, cv=0, on_s=4, off_s=6, duration_s=24) == [0, 2, 10, 12, 20, 22]


@given(st.floats(0.5, 5), st.floats(0, 5), st.just(0.0) | st.floats(0.01, 3), st.integers(0, 9))
def test_all_arrivals_are_in_order_and_while_the_stream_is_on(on_s: float, off_s: float, cv: float, seed: int) -> None:
    made = times_s(rate=3, cv=cv, on_s=on_s, off_s=off_s, duration_s=30, seed=seed)
    assert made == sorted(made)
    for at_s in made:
        assert at_s < 30
        since_s = at_s % (on_s + off_s)
        assert since_s <= on_s + 1e-6 or since_s >= on_s + off_s - 1e-6  # at a period's begin, to rounding


@given(st.floats(0, 20), st.floats(0, 20), st.booleans())
def test_a_steady_ramp_brings_one_request_for_each_unit_of_the_rates_integral(
    rate: float, rate_end: float, pauses: bool
) -> None:
    if max(rate, rate_end) < 0.1:
        return
    pause = {"on_s": 5.0, "off_s": 5.0} if pauses else {}
    made = times_s(rate=rate, rate_end=rate_end, cv=0, duration_s=40, **pause)
    seconds_on = 20.0 if pauses else 40.0
    assert len(made) == pytest.approx((rate + rate_end) / 2 * seconds_on, abs=1.01)
    slope = (rate_end - rate) / seconds_on
    for number, at_s in enumerate(made):
        on_s = at_s // 10 * 5 + min(at_s % 10, 5) if pauses else at_s
        assert rate * on_s + slope * on_s**2 / 2 == pytest.approx(number, abs=1e-6)


def test_a_ramp_between_equal_rates_is_none() -> None:
    assert times_s(rate=2, rate_end=2, cv=0, duration_s=50) == pytest.approx(times_s(rate=2, cv=0, duration_s=50))


def test_a_random_ramp_has_its_mean_rate_in_both_halves() -> None:
    made = times_s(100_000, rate=10, rate_end=30, duration_s=1000)
    first = sum(one < 500 for one in made)
    assert (first, len(made) - first) == (pytest.approx(7500, rel=0.05), pytest.approx(12_500, rel=0.05))
