"""Piecewise linear functions of a size's logarithm, as weights at sizes 1, 2, 4, ...: what linear costs leave over.

A size s between 2^k and 2^(k+1) has the value of both knots, mixed by log2(s) - k; beyond the last knot the function stays
as it is, so that nothing grows where nothing was measured. Of size 0, where nothing is done, it is 0.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def hats(sizes: Array | Sequence[float], num_knots: int) -> Array:
    """Shares of the knots, of shape (sizes, knots); each row adds up to 1, that of size 0 to 0."""
    sizes = np.asarray(sizes, dtype=np.float64)
    if num_knots == 0:
        return np.zeros((len(sizes), 0))
    place = np.log2(np.minimum(np.maximum(sizes, 1.0), 2.0 ** (num_knots - 1)))
    shares: Array = np.maximum(0.0, 1.0 - np.abs(place[:, None] - np.arange(num_knots))) * (sizes > 0.0)[:, None]
    return shares


def value_at(size: float, weights: Sequence[float]) -> float:
    """Return the function's value at one size, 0 without weights: as `hats`, in a tenth of the time."""
    if not weights or size <= 0.0:
        return 0.0
    place = min(math.log2(max(1.0, size)), len(weights) - 1.0)
    knot = int(place)
    part = place - knot
    return weights[knot] * (1.0 - part) + (weights[knot + 1] * part if part else 0.0)
