"""Goal: the benchmark's figures are what their definitions say.

Method: small inputs with results computed by hand.
"""

import pytest

from cluster.bench_figures import interval, jain_index, quantile


def test_jains_index_is_one_for_equal_shares_and_one_over_n_for_a_single_winner() -> None:
    assert jain_index([3, 3, 3]) == pytest.approx(1)
    assert jain_index([5, 0, 0, 0]) == pytest.approx(0.25)
    assert jain_index([0, 0]) == 1


def test_the_median_of_an_odd_number_of_values_is_the_middle_one() -> None:
    assert quantile([5, 1, 3], 0.5) == 3


def test_an_interval_needs_repeats_and_holds_their_mean() -> None:
    assert interval([1.0]) is None
    bounds = interval([1.0, 1.1, 0.9, 1.0])
    assert bounds is not None
    assert bounds[0] < 1.0 < bounds[1]
