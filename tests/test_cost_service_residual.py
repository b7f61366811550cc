"""Goal: an interval holds nine of ten rows like the fitted ones, and becomes wider beyond them as much as is needed.

Method: times drawn around a base whose error grows with a size, as those of kernels do at long contexts.
"""

import numpy as np
import pytest
from numpy.typing import NDArray

from cost_service.residual import Residual


def rows(num: int, least: float, most: float, seed: int) -> tuple[NDArray[np.float64], ...]:
    """Features, base, measured and sizes; the error's spread follows the size's logarithm."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(rng.uniform(np.log(least), np.log(most), num))
    ratio = rng.uniform(0.0, 1.0, num)
    error = 0.02 * rng.normal(size=num) + 0.05 * np.log2(sizes / 64) * np.where(ratio > 0.5, 1.0, -1.0)
    return np.column_stack((ratio, np.log2(sizes))), sizes * 1e-6, sizes * 1e-6 * np.exp(error), sizes


def coverage(residual: Residual, drawn: tuple[NDArray[np.float64], ...], *, sized: bool) -> float:
    features, base, measured, sizes = drawn
    estimate = residual.estimate(features, base, sizes=sizes if sized else None)
    return float(((estimate.low_s <= measured) & (measured <= estimate.high_s)).mean())


def test_intervals_hold_nine_of_ten_rows_like_the_fitted_ones() -> None:
    residual = Residual()
    *fitted, _ = rows(800, 64, 1024, 1)
    residual.fit(*fitted)
    assert 0.85 <= coverage(residual, rows(800, 64, 1024, 2), sized=False) <= 0.97


def test_beyond_the_largest_size_they_are_as_wide_as_leaving_large_ones_out_has_shown() -> None:
    residual = Residual()
    *fitted, sizes = rows(800, 64, 1024, 1)
    residual.fit(*fitted, sizes=sizes)
    features, base, _, beyond = drawn = rows(800, 1024, 8192, 3)
    assert coverage(residual, drawn, sized=True) > 0.9
    sized, unsized = residual.estimate(features, base, sizes=beyond), residual.estimate(features, base)
    wider = np.log(sized.high_s / sized.low_s) - np.log(unsized.high_s / unsized.low_s)
    assert (np.diff(wider[np.argsort(beyond)]) > 0.0).all()


def test_within_the_fitted_sizes_a_size_changes_nothing() -> None:
    residual = Residual()
    *fitted, sizes = rows(800, 64, 1024, 1)
    residual.fit(*fitted, sizes=sizes)
    features, base, _, inside = rows(50, 64, 1000, 4)
    with_sizes, without = residual.estimate(features, base, sizes=inside), residual.estimate(features, base)
    assert np.array_equal(with_sizes.low_s, without.low_s)
    assert with_sizes.high_s == pytest.approx(without.high_s)
