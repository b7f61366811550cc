"""A cost learned from a stream of measurements: linear in what is done, plus what sizes show beside.

Method: seconds = features @ coefficients (none negative, least squares of relative errors over a window of the newest
samples, outliers left out) + a function of one size (`cost_service.hats`, ridge regression on what is left over).

Rules:
- A measurement that is not finite, negative, or of the wrong shape is rejected and counted; one that is far off is an
  outlier, unless most of the newest say the same: then the world has changed, and what was measured before is forgotten.
- After a change the error is back to what the noise allows once `NEWEST` samples have told of it, `SUDDEN` of a great one.
- With fewer than `FEWEST` samples only the prior's scale is learned.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LinearRegression, Ridge

from cost_service.hats import hats

Array = NDArray[np.float64]

WINDOW = 512
"""Samples that a fit looks at."""

NEWEST = 24
"""Samples whose median error tells a change."""

SUDDEN, AGREEING = 12, 11
"""So few tell it where all of them but one are off by as much to the same side."""

FEWEST = 12
DRIFT = math.log(1.3)
"""Median error of the newest samples, as a logarithm, beyond which the world has changed."""

OUTLIER_MADS = 5.0
OUTLIER_LEAST = math.log(1.5)
"""How far off a sample must be to be left out: so many median absolute deviations, and never less than that factor."""

RIDGE = 2.0
"""Samples that a knot's weight of 0 counts for: what nothing was measured of stays linear."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnedCost:
    """Seconds = features @ coefficients + the function of size."""

    coefficients: tuple[float, ...]
    knots: tuple[float, ...]
    """Seconds at sizes 1, 2, 4, ...; empty where nothing was learned."""

    num_samples: int
    error_ratio: float
    """Median of |predicted - measured| over the median of what was measured, in the window; each sample predicted before it
    was learned."""

    def seconds(self, features: Array, sizes: Array, *, with_knots: bool = True) -> Array:
        """Seconds of rows of features; never negative."""
        linear: Array = features @ np.asarray(self.coefficients)
        if with_knots and self.knots:
            linear = linear + hats(sizes, len(self.knots)) @ np.asarray(self.knots)
        return np.maximum(linear, 0.0)


class OnlineCost:
    """Learns one cost; `refit` is not for a hot path."""

    def __init__(self, prior: Sequence[float], *, num_knots: int) -> None:
        """Begin with prior coefficients; without any sample they are what is believed."""
        self._prior = np.asarray(prior, dtype=np.float64)
        self._num_knots = num_knots
        self._samples: deque[tuple[Array, float, float, float]] = deque(maxlen=WINDOW)
        self.learned = LearnedCost(coefficients=tuple(map(float, prior)), knots=(), num_samples=0, error_ratio=math.nan)
        self.num_rejected = 0
        self.num_changes = 0
        """How often the world has changed."""

    def observe(self, features: Sequence[float], size: float, seconds: float) -> bool:
        """Take note of one measurement; whether it was any."""
        row = np.asarray(features, dtype=np.float64)
        if row.shape != self._prior.shape or not np.isfinite(row).all() or (row < 0.0).any():
            self.num_rejected += 1
            return False
        if not (math.isfinite(size) and size >= 0.0 and math.isfinite(seconds) and seconds > 0.0):
            self.num_rejected += 1
            return False
        predicted = float(self.learned.seconds(row[None], np.array([size]))[0])
        error = math.log(max(predicted, 1e-12) / seconds)
        self._samples.append((row, size, seconds, error))
        self._notice_change()
        return True

    def refit(self) -> LearnedCost:
        """Learn from the window; with too few samples scale the prior."""
        if self._samples:
            features, sizes, seconds, errors = self._columns()
            coefficients = self._prior * self._scale(features, seconds)
            knots: tuple[float, ...] = ()
            if len(seconds) >= FEWEST:
                kept = _inliers(features @ coefficients, sizes, seconds)
                coefficients = self._linear(features[kept], seconds[kept], coefficients)
                kept = _inliers(features @ coefficients, sizes, seconds)
                knots = self._left_over(features[kept] @ coefficients, sizes[kept], seconds[kept])
            self.learned = LearnedCost(
                coefficients=tuple(map(float, coefficients)), knots=knots, num_samples=len(seconds),
                error_ratio=float(np.median(np.abs(np.expm1(errors)) * seconds) / np.median(seconds)),
            )  # fmt: skip
        return self.learned

    def check(self) -> None:
        """Assert that what is believed is a cost."""
        values = (*self.learned.coefficients, *self.learned.knots)
        assert all(map(math.isfinite, values)), f"costs of {values}"
        assert min(self.learned.coefficients, default=0.0) >= 0.0, f"a negative cost: {self.learned.coefficients}"
        assert len(self.learned.knots) in (0, self._num_knots), f"{len(self.learned.knots)} knots"

    def _notice_change(self) -> None:
        if len(self._samples) <= NEWEST or not self.learned.num_samples:
            return
        newest = list(self._samples)[-NEWEST:]
        errors = np.array([error for *_, error in newest])
        sudden = max((errors[-SUDDEN:] > DRIFT).sum(), (errors[-SUDDEN:] < -DRIFT).sum()) >= AGREEING
        if sudden or abs(float(np.median(errors))) > DRIFT:
            self._samples = deque(newest[-SUDDEN:] if sudden else newest, maxlen=WINDOW)
            self.num_changes += 1
            self.refit()
            # Judged from now on by what is believed now.
            self._samples = deque(((row, size, s, 0.0) for row, size, s, _ in self._samples), maxlen=WINDOW)

    def _columns(self) -> tuple[Array, Array, Array, Array]:
        rows, sizes, seconds, errors = zip(*self._samples, strict=True)
        return np.stack(rows), np.array(sizes), np.array(seconds), np.array(errors)

    def _scale(self, features: Array, seconds: Array) -> float:
        believed = features @ self._prior
        return float(np.median(seconds[believed > 0] / believed[believed > 0])) if (believed > 0).any() else 1.0

    def _linear(self, features: Array, seconds: Array, scaled: Array) -> Array:
        """Least squares of relative errors; a term that was never seen keeps the scaled prior."""
        seen = features.max(axis=0) > 0.0
        relative = features[:, seen] / seconds[:, None]
        known = 1.0 - (features[:, ~seen] @ scaled[~seen]) / seconds
        fit = LinearRegression(positive=True, fit_intercept=False).fit(relative, known)
        coefficients = scaled.copy()
        coefficients[seen] = fit.coef_
        return coefficients

    def _left_over(self, linear: Array, sizes: Array, seconds: Array) -> tuple[float, ...]:
        """Ridge regression of what the linear part leaves over, relative to what was measured."""
        scale = float(np.median(seconds))
        shares = hats(sizes, self._num_knots) * (scale / seconds)[:, None]
        fit = Ridge(alpha=RIDGE, fit_intercept=False).fit(shares, (seconds - linear) / seconds)
        return tuple(float(weight) * scale for weight in fit.coef_)


def _inliers(predicted: Array, sizes: Array, seconds: Array) -> NDArray[np.bool_]:
    """Say which samples are like others of about their size: a size that always costs more is no outlier."""
    errors = np.log(np.maximum(predicted, 1e-12) / seconds)
    octaves = np.round(np.log2(np.maximum(sizes, 1.0)))
    for octave in np.unique(octaves):
        errors[octaves == octave] -= np.median(errors[octaves == octave])
    far = max(OUTLIER_LEAST, OUTLIER_MADS * float(np.median(np.abs(errors))))
    kept: NDArray[np.bool_] = np.abs(errors) <= far
    return kept
