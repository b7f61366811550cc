"""Goal: the highest rate of a total is found, whatever the readings' distances; `PeakRate.read` takes any clock.

Method: totals by hand, and random ones against all pairs of readings.
"""

from hypothesis import example, given
from hypothesis import strategies as st

from replicas.peak_rate import WINDOW_S, PeakRate


def test_a_peak_stays() -> None:
    rate = PeakRate()
    for now_s, total in ((0.0, 0.0), (1.0, 10.0), (2.0, 60.0), (3.0, 61.0)):
        rate.read(now_s, total)
    assert rate.per_s == 50.0


def test_two_readings_in_quick_succession_are_no_peak() -> None:
    rate = PeakRate()
    rate.read(0.0, 0.0)
    rate.read(0.001, 5.0)
    assert rate.per_s == 5.0 / WINDOW_S


def test_a_total_that_begins_anew_is_no_rate() -> None:
    rate = PeakRate()
    for now_s, total in ((0.0, 900.0), (1.0, 0.0), (2.0, 10.0)):
        rate.read(now_s, total)
    assert rate.per_s == 10.0


@given(st.lists(st.tuples(st.floats(0.01, 2.0), st.integers(0, 100)), min_size=2, max_size=30))
@example([(1.0, 0), (2.0, 0), (0.25, 1), (0.5, 0)])  # one window was left for another before it was looked at
def test_it_is_between_the_rates_of_windows_and_of_steps(steps: list[tuple[float, int]]) -> None:
    rate, now_s, total = PeakRate(), 0.0, 0.0
    readings = []
    for step_s, added in steps:
        now_s, total = now_s + step_s, total + added
        readings.append((now_s, total))
        rate.read(now_s, total)
    pairs = [(a, b) for number, a in enumerate(readings) for b in readings[number + 1 :]]
    highest = max((b[1] - a[1]) / max(WINDOW_S, b[0] - a[0]) for a, b in pairs)
    long = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairs if b[0] - a[0] >= WINDOW_S]
    assert rate.per_s <= highest * (1 + 1e-9)
    assert rate.per_s >= 2 / 3 * max(long, default=0.0) * (1 - 1e-9)
