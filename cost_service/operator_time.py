"""Seconds of the operators besides attention: a roofline per kind of operator, times a learned residual.

Method: an operator takes launch_s plus the p-norm of flops / flops_per_s and bytes / bytes_per_s (Williams et al.,
"Roofline", CACM 2009; the norm rounds its corner). All matrix products of a GPU share one roofline, so that a model that
was never measured has one too; other kinds have each their own, and fall back to the one of all that only move bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.neighbors import KNeighborsRegressor

from cost_service.hardware import HARDWARE, Hardware
from cost_service.operators import COLLECTIVE, MATMUL, Operator
from cost_service.rates import fit_rates, p_norm
from cost_service.residual import Estimate, Regressor, Residual

Array = NDArray[np.float64]

FEWEST_ROWS = 8
"""An operator that is measured at fewer points shares its family's roofline."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """Rates of one kind of operator."""

    launch_s: float
    flops_per_s: float
    bytes_per_s: float
    norm: float

    def seconds(self, flops: Array, bytes_moved: Array) -> Array:
        """Return seconds for rows of FLOPs and bytes."""
        return self.launch_s + p_norm(self.norm, flops / self.flops_per_s, bytes_moved / self.bytes_per_s)


STARTS = (
    Roofline(launch_s=3e-6, flops_per_s=3e14, bytes_per_s=1.5e12, norm=3.0),
    Roofline(launch_s=1e-8, flops_per_s=1e8, bytes_per_s=1e8, norm=1.0),
    Roofline(launch_s=2e-2, flops_per_s=1e17, bytes_per_s=1e14, norm=8.0),
)
"""Where a fit begins, and the least and the most of each rate: from a slow core to the fastest GPU."""


def collective_roofline(hardware: Hardware | None) -> Roofline:
    """What links between ranks are expected to do, which no profile of one rank holds; an H100's where nothing is known."""
    known = hardware or HARDWARE["H100"]
    return Roofline(
        launch_s=known.rank_latency_s, flops_per_s=1e17, bytes_per_s=known.rank_bytes_per_s, norm=3.0
    )  # fmt: skip


SHAPE_WEIGHT = 4.0
"""How much farther apart another operator or shape is than as many doublings of the batch."""


def neighbours() -> Regressor:
    """Return a regressor that interpolates between the two nearest batch sizes of the same operator and shape.

    Times climb in steps, a tile of rows at a time: interpolation follows them, trees and polynomials smear them out. An
    operator that was never measured takes the factors of the nearest one.
    """
    nearest: Regressor = KNeighborsRegressor(2, weights="distance")
    return nearest


def fit_roofline(flops: Array, bytes_moved: Array, measured_s: Array) -> Roofline:
    """Find the rates of a kind of operator from measured calls."""
    return fit_rates(STARTS, lambda roofline: roofline.seconds(flops, bytes_moved), measured_s)


class OperatorTime:
    """Time of the operators besides attention on one kind of GPU, for any model."""

    def __init__(self, hardware: Hardware | None = None) -> None:
        """Begin with what the hardware's links between ranks are expected to do."""
        self._unmeasured = {COLLECTIVE: collective_roofline(hardware)}
        self.rooflines: dict[str, Roofline] = {}
        """By operator, and by family for all the others."""

        self.residual = Residual(neighbours)
        self._known: list[str] = []

    def fit(self, samples: Sequence[tuple[Operator, Array, Array]]) -> None:
        """Learn from measured operators (rows and seconds of a call), of one or several models.

        Raises:
            ValueError: No samples, or seconds that are not finite and above 0.
        """
        self._known = sorted({operator.name for operator, _, _ in samples})
        groups: dict[str, list[tuple[Operator, Array, Array]]] = {}
        for sample in samples:
            operator = sample[0]
            groups.setdefault(operator.family, []).append(sample)
            if operator.family != MATMUL:  # matrix products share theirs: their kernels are the same
                groups.setdefault(operator.name, []).append(sample)
        for name, group in groups.items():
            work = [
                np.concatenate(parts)
                for parts in zip(*(_work(operator, rows) for operator, rows, _ in group), strict=True)
            ]
            measured_s = np.concatenate([seconds for _, _, seconds in group])
            if len(measured_s) >= FEWEST_ROWS:
                self.rooflines[name] = fit_roofline(work[0], work[1], measured_s)
        features = np.concatenate(
            [self._features(operator, rows) for operator, rows, _ in samples] or [np.zeros((0, 1))]
        )
        bases = np.concatenate([self.base_s(operator, rows) for operator, rows, _ in samples] or [np.zeros(0)])
        measured = np.concatenate([seconds for _, _, seconds in samples] or [np.zeros(0)])
        self.residual.fit(features, bases, measured)

    def base_s(self, operator: Operator, rows: Array) -> Array:
        """Seconds of a call by the roofline alone."""
        fitted = self.rooflines.get(operator.name) or self.rooflines.get(operator.family)
        roofline = fitted or self._unmeasured.get(operator.family, STARTS[0])
        return roofline.seconds(*_work(operator, rows))

    def predict(self, operator: Operator, rows: Array) -> Estimate:
        """Seconds of a call, for numbers of rows."""
        return self.residual.estimate(self._features(operator, rows), self.base_s(operator, rows))

    def _features(self, operator: Operator, rows: Array) -> Array:
        kind = self._known.index(operator.name) if operator.name in self._known else -1
        family = 2 * len(self._known) * (operator.family == MATMUL)
        size = operator.row_flops if operator.family == MATMUL else operator.row_bytes
        return np.column_stack(
            (
                np.full(len(rows), SHAPE_WEIGHT * (kind + family)),
                np.full(len(rows), SHAPE_WEIGHT * np.log2(size)),
                np.log2(rows),
            )
        )


def _work(operator: Operator, rows: Array) -> tuple[Array, Array]:
    """FLOPs and bytes of a call; what only moves bytes has no FLOPs that count."""
    flops = operator.flops(rows) if operator.family == MATMUL else np.zeros(len(rows))
    return flops, operator.bytes_moved(rows)
