"""Seconds of an engine's whole step in a form that is cheap to evaluate: for simulations and plans.

Method: with everything that a step must do once,
    fixed_s + sequence_s * requests + token_s * tokens
    + matrix products of the layers and of the LM head: p-norm of flops / flops_per_s and bytes / bytes_per_s
    + attention of prefills / attention_flops_per_s + KV read by decodes / kv_bytes_per_s + what ranks send each other,
times a residual that depends on numbers of tokens and requests alone, so that a run of decode steps adds up in closed form.
It is fitted to steps that an engine was seen to take (a calibration), to steps that the operators of a profile add up to
(`cost_service.step_time`), or not at all: with a datasheet's rates (`cost_service.datasheet`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.linear_model import Ridge

from cost_service.hardware import UNCERTAINTY, Hardware
from cost_service.hats import hats
from cost_service.model_shape import ModelShape
from cost_service.operator_time import collective_roofline
from cost_service.operators import (
    COLLECTIVE,
    HALF,
    MATMUL,
    STREAM,
    Batch,
    Operator,
    Precision,
    attention_work,
    dense_operators,
)
from cost_service.rates import fit_rates, p_norm
from cost_service.residual import Estimate, Residual

Array = NDArray[np.float64]

KNOTS = 18
"""Sizes that the residual tells apart: 1, 2, 4, ... 131,072."""

RIDGE = 1.0


class EngineBatch(NamedTuple):
    """What one step computes, in totals."""

    num_decodes: int
    decode_tokens: float
    """KV tokens that all decodes read together, their own included."""

    prefills: tuple[tuple[int, int], ...] = ()
    """Of each prefill the tokens cached before it, and the new ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRates:
    """Rates of one rank in an engine."""

    fixed_s: float
    """Of every step: launches, scheduling, sampling."""

    sequence_s: float
    token_s: float
    flops_per_s: float
    bytes_per_s: float
    attention_flops_per_s: float
    kv_bytes_per_s: float
    norm: float


STARTS = (
    EngineRates(
        fixed_s=1e-3, sequence_s=1e-5, token_s=1e-6, flops_per_s=1e13, bytes_per_s=1e11, attention_flops_per_s=1e13,
        kv_bytes_per_s=1e11, norm=2.0,
    ),
    EngineRates(
        fixed_s=1e-6, sequence_s=1e-9, token_s=1e-10, flops_per_s=1e8, bytes_per_s=1e8, attention_flops_per_s=1e7,
        kv_bytes_per_s=1e7, norm=1.0,
    ),
    EngineRates(
        fixed_s=1.0, sequence_s=1e-1, token_s=1e-1, flops_per_s=1e17, bytes_per_s=1e14, attention_flops_per_s=1e17,
        kv_bytes_per_s=1e14, norm=8.0,
    ),
)  # fmt: skip
"""Where a fit begins, and the least and the most of each rate: from a slow core to the fastest GPU."""


class _Work(NamedTuple):
    """What a step must do, as columns of rows or as numbers."""

    tokens: Array
    sequences: Array
    body_flops: Array
    body_bytes: Array
    head_flops: Array
    head_bytes: Array
    links_s: Array
    prefill_flops: Array
    kv_bytes: Array


class HatsRidge(BaseEstimator, RegressorMixin):
    """Ridge regression on piecewise linear functions of the logarithm of each feature, which are sizes."""

    def fit(self, X: Array, y: Array) -> Self:
        """Learn targets from rows of sizes."""
        self.fitted_ = Ridge(alpha=RIDGE).fit(_hats(X), y)
        return self

    def predict(self, X: Array) -> Array:
        """Return the target of each row."""
        target: Array = self.fitted_.predict(_hats(X))
        return target


class EngineStep:
    """Step times of one model on one kind of replica."""

    def __init__(
        self,
        shape: ModelShape,
        rates: EngineRates,
        *,
        parallelism: int = 1,
        precision: Precision = HALF,
        hardware: Hardware | None = None,
        collectives: bool = True,
    ) -> None:
        """Begin with rates alone; `fit` learns them.

        Args:
            hardware: Whose links ranks send over.
            collectives: Whether what ranks send each other counts; profilers of one rank do not see it.
        """
        self._links = collective_roofline(hardware) if collectives else None
        self.shape, self.rates, self.parallelism, self.precision = shape, rates, parallelism, precision
        self.residual = Residual(HatsRidge)
        self._dense_s = lru_cache(maxsize=1 << 16)(self._dense_seconds)
        self._body_s = lru_cache(maxsize=1 << 16)(self._body_seconds)
        self._head_s = lru_cache(maxsize=1 << 12)(self._head_seconds)

    @classmethod
    def cold(cls, shape: ModelShape, hardware: Hardware, *, parallelism: int = 1, collectives: bool = True) -> Self:
        """Step times of hardware that nothing was measured on, with the uncertainty of that in every interval."""
        operators = dense_operators(shape, parallelism=parallelism)
        launches = sum(one.calls for one in operators) + shape.num_layers
        streamed = sum(one.calls * one.row_bytes for one in operators if one.family == STREAM)
        rates = EngineRates(
            fixed_s=hardware.launch_s * launches, sequence_s=0.0, token_s=streamed / hardware.bytes_per_s,
            flops_per_s=hardware.flops_per_s,
            bytes_per_s=hardware.bytes_per_s, attention_flops_per_s=hardware.attention_flops_per_s,
            kv_bytes_per_s=hardware.kv_bytes_per_s, norm=3.0,
        )  # fmt: skip
        step = cls(shape, rates, parallelism=parallelism, hardware=hardware, collectives=collectives)
        step.residual.log_errors = (-math.log(UNCERTAINTY), math.log(UNCERTAINTY))
        return step

    @classmethod
    def fit(
        cls,
        shape: ModelShape,
        batches: Sequence[EngineBatch],
        measured_s: Array,
        *,
        parallelism: int = 1,
        precision: Precision = HALF,
    ) -> Self:
        """Learn from steps and the seconds that each took.

        Raises:
            ValueError: No steps, or seconds that are not finite and above 0.
        """
        if len(batches) == 0 or not (np.isfinite(measured_s).all() and (measured_s > 0.0).all()):
            raise ValueError(
                "The seconds of steps must be finite and above 0, and there must be some: calibrate again."
            )
        step = cls(shape, STARTS[0], parallelism=parallelism, precision=precision)
        work = step._work_of(batches)
        step.rates = fit_rates(_scaled(STARTS, work, measured_s), lambda rates: _base_s(rates, work), measured_s)
        step.residual.fit(np.column_stack((work.tokens, work.sequences)), _base_s(step.rates, work), measured_s)
        return step

    def estimate(self, batches: Sequence[EngineBatch]) -> Estimate:
        """Seconds of steps, with intervals."""
        work = self._work_of(batches)
        return self.residual.estimate(np.column_stack((work.tokens, work.sequences)), _base_s(self.rates, work))

    def step_s(self, num_decodes: int, decode_tokens: float, prefills: Sequence[tuple[int, int]] = ()) -> float:
        """Seconds of one step; arguments as in `EngineBatch`."""
        tokens = num_decodes + sum(new for _, new in prefills)
        if tokens == 0:
            return 0.0
        dense_s, factor = self._dense_s(tokens, num_decodes + len(prefills))
        attention_s = self._kv_bytes(num_decodes, decode_tokens) / self.rates.kv_bytes_per_s
        for cached, new in prefills:
            attention_s += self._prefill_flops(cached, new) / self.rates.attention_flops_per_s
        return factor * (dense_s + attention_s)

    def decode_run_s(self, num_decodes: int, decode_tokens: float, num_steps: int) -> float:
        """Seconds of steps that only decode: the first reads `decode_tokens`, each next one a token more of each request."""
        if num_decodes == 0 or num_steps == 0:
            return 0.0
        dense_s, factor = self._dense_s(num_decodes, num_decodes)
        context = decode_tokens / num_decodes
        kv_bytes = 0.0
        for window, layers_bytes in self._kv_layers:
            kv_bytes += num_decodes * layers_bytes * _capped_sum(context, num_steps, window)
        return factor * (num_steps * dense_s + kv_bytes / self.rates.kv_bytes_per_s)

    def _dense_seconds(self, tokens: int, sequences: int) -> tuple[float, float]:
        """Seconds of all but attention, and the residual's factor: a step's tokens and its requests are seldom the same."""
        rates, (body_s, links_s) = self.rates, self._body_s(tokens)
        counted_s = rates.fixed_s + rates.sequence_s * sequences + rates.token_s * tokens
        factor = self.residual.factor(np.array([[float(tokens), float(sequences)]]))
        return counted_s + body_s + self._head_s(sequences) + links_s, float(factor[0])

    def _body_seconds(self, tokens: int) -> tuple[float, float]:
        """Seconds of the layers' matrix products, and of what ranks send each other."""
        work = self._dense_work(np.array([float(tokens)]), np.zeros(1))
        return float(_products_s(self.rates, work.body_flops, work.body_bytes)[0]), float(work.links_s[0])

    def _head_seconds(self, sequences: int) -> float:
        """Seconds of the LM head's matrix products."""
        work = self._dense_work(np.zeros(1), np.array([float(sequences)]))
        return float(_products_s(self.rates, work.head_flops, work.head_bytes)[0])

    @cached_property
    def _operators(self) -> tuple[Operator, ...]:
        return dense_operators(self.shape, parallelism=self.parallelism, precision=self.precision)

    @cached_property
    def _kv_layers(self) -> tuple[tuple[int | None, float], ...]:
        """Windows, and the bytes that a decode reads of every token in them, over all layers that have them."""
        return tuple(
            (attention.window, count * self.precision.kv * attention.kv_elements(self.parallelism))
            for (attention, _), count in self.shape.layers.items()
        )

    def _kv_bytes(self, num_decodes: int, decode_tokens: float) -> float:
        if num_decodes == 0:
            return 0.0
        context = decode_tokens / num_decodes
        return num_decodes * sum(
            layers_bytes * (context if window is None else min(context, window))
            for window, layers_bytes in self._kv_layers
        )

    def _prefill_flops(self, cached: int, new: int) -> float:
        batch = Batch(prefills=((new, cached),))
        return sum(
            count * attention_work(attention, batch, parallelism=self.parallelism, precision=self.precision).flops
            for (attention, _), count in self.shape.layers.items()
        )

    def _dense_work(self, tokens: Array, sequences: Array) -> _Work:
        flops = {False: np.zeros(len(tokens)), True: np.zeros(len(tokens))}
        moved = {False: np.zeros(len(tokens)), True: np.zeros(len(tokens))}
        links_s = np.zeros(len(tokens))
        for one in self._operators:
            rows = sequences if one.per_sequence else tokens
            if one.family == MATMUL:
                flops[one.per_sequence] += one.calls * one.flops(rows)
                moved[one.per_sequence] += one.calls * one.bytes_moved(rows)
            elif one.family == COLLECTIVE and self._links is not None:
                links_s += one.calls * self._links.seconds(np.zeros(len(rows)), one.bytes_moved(rows))
        nothing = np.zeros(len(tokens))
        return _Work(
            tokens, sequences, flops[False], moved[False], flops[True], moved[True], links_s, nothing, nothing
        )  # fmt: skip

    def _work_of(self, batches: Sequence[EngineBatch]) -> _Work:
        news = [sum(new for _, new in batch.prefills) for batch in batches]
        tokens = np.array([batch.num_decodes + new for batch, new in zip(batches, news, strict=True)], dtype=np.float64)
        sequences = np.array([batch.num_decodes + len(batch.prefills) for batch in batches], dtype=np.float64)
        return self._dense_work(tokens, sequences)._replace(
            prefill_flops=np.array([sum(self._prefill_flops(*one) for one in batch.prefills) for batch in batches]),
            kv_bytes=np.array([self._kv_bytes(batch.num_decodes, batch.decode_tokens) for batch in batches]),
        )


def _base_s(rates: EngineRates, work: _Work) -> Array:
    body_s = _products_s(rates, work.body_flops, work.body_bytes)
    head_s = _products_s(rates, work.head_flops, work.head_bytes)
    attention_s = work.prefill_flops / rates.attention_flops_per_s + work.kv_bytes / rates.kv_bytes_per_s
    counted_s = rates.fixed_s + rates.sequence_s * work.sequences + rates.token_s * work.tokens
    total: Array = counted_s + body_s + head_s + attention_s + work.links_s
    return total


def _products_s(rates: EngineRates, flops: Array, moved: Array) -> Array:
    """Seconds of matrix products."""
    return p_norm(rates.norm, flops / rates.flops_per_s, moved / rates.bytes_per_s)


def _scaled(
    starts: tuple[EngineRates, EngineRates, EngineRates], work: _Work, measured_s: Array
) -> tuple[EngineRates, EngineRates, EngineRates]:
    """Begin where matrix products alone explain the measured times."""
    start, least, most = starts
    seconds = float(np.median(measured_s))
    rate = float(np.median(work.body_flops / measured_s))
    begun = replace(
        start,
        fixed_s=0.1 * seconds, sequence_s=1e-3 * seconds, token_s=1e-4 * seconds, flops_per_s=3 * rate,
        bytes_per_s=3 * float(np.median(work.body_bytes / measured_s)), attention_flops_per_s=rate,
        kv_bytes_per_s=3 * float(np.median(work.body_bytes / measured_s)),
    )  # fmt: skip
    within = {
        name: min(max(getattr(begun, name), getattr(least, name)), getattr(most, name))
        for name in EngineRates.__dataclass_fields__
    }
    return EngineRates(**within), least, most


def _capped_sum(first: float, num: int, cap: int | None) -> float:
    """Sum of min(first + i, cap) for i from 0 to num - 1."""
    below = num if cap is None else min(num, max(0, int(np.ceil(cap - first))))
    rising = below * first + below * (below - 1) / 2
    return rising if cap is None else rising + (num - below) * cap


def _hats(sizes: Array) -> Array:
    return np.hstack([hats(column, KNOTS) for column in sizes.T])
