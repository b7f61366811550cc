"""Rates of a physical model, found from measured times: what `attention_time` and `operator_time` share."""

from collections.abc import Callable
from dataclasses import fields
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

Array = NDArray[np.float64]
Rates = TypeVar("Rates")


def p_norm(norm: float, *parts: Array) -> Array:
    """Nearly the longest of several times, row by row: what is almost as long counts too."""
    stacked = np.stack(parts)
    largest = np.maximum(stacked.max(axis=0), 1e-12)
    total: Array = largest * ((stacked / largest) ** norm).sum(axis=0) ** (1.0 / norm)
    return total


def fit_rates(starts: tuple[Rates, Rates, Rates], seconds: Callable[[Rates], Array], measured_s: Array) -> Rates:
    """Least squares of the logarithms of times, outliers damped.

    Args:
        starts: Where to begin, and the least and the most of each rate: dataclasses of numbers above 0.
        seconds: What the model says with these rates.
    """
    kind = type(starts[0])
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]

    def rates(logs: Array) -> Rates:
        return kind(**dict(zip(names, map(float, np.exp(logs)), strict=True)))

    start, least, most = (np.log([getattr(one, name) for name in names]) for one in starts)
    fit = least_squares(
        lambda logs: np.log(seconds(rates(logs)) / measured_s), start, bounds=(least, most), loss="soft_l1", f_scale=0.1
    )
    return rates(fit.x)
