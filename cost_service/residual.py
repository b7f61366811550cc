"""What a physical base does not say about measured times: a factor learned with scikit-learn, and how sure it is.

Rules:
- Learned is the logarithm of measured / base, on features that keep their meaning beyond the fitted range (ratios, counts
  of waves) rather than on sizes: trees do not extrapolate, a base does.
- The interval is that of errors on rows that were left out of the fit, so it holds for rows like those. It widens with
  every unit by which a feature lies beyond the fitted range (features are logarithms to base 2: a doubling), and with
  every doubling of a size that is named beyond the largest one: by what leaving the largest ones out has shown.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import ExtraTreesRegressor
from sklearn.model_selection import KFold, cross_val_predict

Array = NDArray[np.float64]

NUM_FOLDS = 3
FEWEST_ROWS = 12
"""With fewer rows nothing is learned: the factor is their median."""

QUANTILES = (0.05, 0.95)

WIDENING = 0.1
"""What a doubling beyond the fitted range adds to the logarithm of both ends of an interval; an assumption."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Seconds with the interval that nine of ten measured times fall into; arrays of one shape."""

    seconds: Array
    low_s: Array
    high_s: Array

    def map(self, change: Callable[[Array], Array]) -> "Estimate":
        """Change the seconds and both ends alike."""
        return Estimate(seconds=change(self.seconds), low_s=change(self.low_s), high_s=change(self.high_s))

    @staticmethod
    def total(parts: "Sequence[Estimate]") -> "Estimate":
        """Add estimates; their errors may all point the same way, so do the ends of the interval."""
        seconds, low_s, high_s = np.sum([(one.seconds, one.low_s, one.high_s) for one in parts], axis=0)
        return Estimate(seconds=seconds, low_s=low_s, high_s=high_s)


class Regressor(Protocol):
    """What scikit-learn's regressors have in common."""

    def fit(self, X: Array, y: Array) -> Self:
        """Learn targets from rows of features."""
        ...

    def predict(self, X: Array) -> Array:
        """Return the target of each row."""
        ...


def trees() -> Regressor:
    """Return a regressor for features of several dimensions: averages of trees with cuts by chance."""
    forest: Regressor = ExtraTreesRegressor(50, random_state=0)
    return forest


class Residual:
    """The learned factor between a physical base and what was measured."""

    def __init__(self, regressor: Callable[[], Regressor] = trees) -> None:
        """Begin with a factor of 1.

        Args:
            regressor: Makes what learns the logarithm of the factor.
        """
        self._new = regressor
        self._fitted: Regressor | None = None
        self._median = 0.0
        self._range: tuple[Array, Array] | None = None
        self.log_errors = (0.0, 0.0)
        """Quantiles of log(measured / predicted) on rows left out."""

        self._largest = np.inf
        self._log_errors_beyond = (0.0, 0.0)
        """The same on rows twice as large as any that was fitted."""

    def fit(self, features: Array, base_s: Array, measured_s: Array, *, sizes: Array | None = None) -> None:
        """Learn from rows of shape (rows, features) with the base's and the measured seconds of each.

        Args:
            sizes: Of each row, what later rows may have more of than any that is fitted.

        Raises:
            ValueError: No rows, or seconds that are not finite and above 0.
        """
        if len(measured_s) == 0:
            raise ValueError("There are no measured times to fit: calibrate first.")
        for name, seconds in (("base", base_s), ("measured", measured_s)):
            if not (np.isfinite(seconds).all() and (seconds > 0.0).all()):
                raise ValueError(f"The {name} seconds to fit must be finite and above 0: leave such rows out.")
        target = np.log(measured_s / base_s)
        self._median = float(np.median(target))
        self._range = (features.min(axis=0), features.max(axis=0))
        if len(target) < FEWEST_ROWS:
            errors = target - self._median
        else:
            folds = KFold(NUM_FOLDS, shuffle=True, random_state=0)
            errors = target - cross_val_predict(self._new(), features, target, cv=folds)
            self._fitted = self._new().fit(features, target)
        self.log_errors = self._log_errors_beyond = _quantiles(errors)
        if sizes is not None:
            self._largest = float(sizes.max())
            large = sizes > self._largest / 2
            if min(large.sum(), (~large).sum()) >= FEWEST_ROWS:
                smaller = self._new().fit(features[~large], target[~large])
                self._log_errors_beyond = _quantiles(target[large] - smaller.predict(features[large]))

    def factor(self, features: Array) -> Array:
        """Factors for rows of features."""
        if self._fitted is None:
            return np.full(len(features), np.exp(self._median))
        factors: Array = np.exp(self._fitted.predict(features))
        return factors

    def estimate(self, features: Array, base_s: Array, *, sizes: Array | None = None) -> Estimate:
        """Seconds for rows of features, with their interval; `sizes` as in `fit`."""
        seconds = base_s * self.factor(features)
        doublings = np.zeros(len(features)) if sizes is None else np.log2(np.maximum(sizes / self._largest, 1.0))
        low, high = (
            within + doublings * (beyond - within)
            for within, beyond in (
                (min(self.log_errors[0], 0.0), min(*self.log_errors, *self._log_errors_beyond, 0.0)),
                (max(self.log_errors[1], 0.0), max(*self.log_errors, *self._log_errors_beyond, 0.0)),
            )
        )
        wider = WIDENING * self._beyond(features)
        return Estimate(seconds=seconds, low_s=seconds * np.exp(low - wider), high_s=seconds * np.exp(high + wider))

    def _beyond(self, features: Array) -> Array:
        """How far the features of each row lie beyond those of the fit, the farthest one."""
        if self._range is None:
            return np.zeros(len(features))
        least, most = self._range
        beyond: Array = np.maximum(np.maximum(least - features, features - most).max(axis=1), 0.0)
        return beyond


def _quantiles(errors: Array) -> tuple[float, float]:
    return float(np.quantile(errors, QUANTILES[0])), float(np.quantile(errors, QUANTILES[1]))
