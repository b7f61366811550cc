"""Seconds of whole steps from a profile of operators, in tables that are cheap to read: for simulations and plans.

Method: a step takes what its host needs, its dense operators (a table over tokens, one over requests) and attention. Of
attention, decodes have a table over their number and mean context, prefills one over new and cached tokens; they are asked
of `cost_service.step_time` once. What decodes add beside prefills is another table, for they run in another kernel there:
that of decodes beside one prefill of typical size.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from cost_service.attention_time import AttentionWork
from cost_service.model_shape import ModelShape
from cost_service.step_time import StepTime, attention_shape

Array = NDArray[np.float64]

MOST_TOKENS, MOST_SEQUENCES = 16384, 2048
"""Of one step; beyond them tables go on as straight lines."""

PREFILL_BESIDE = 128.0
"""Tokens of the prefill that decodes are seen beside."""

HOST_SEQUENCE_S = 1e-5
"""What the host adds for each request of a step, as a recorded run of vLLM 0.19 shows (`python -m cluster validate`)."""

PER_OCTAVE = 2
CONTEXTS = np.unique(np.round(2.0 ** np.arange(0, 18, 1 / PER_OCTAVE)))
COUNTS = np.unique(np.round(2.0 ** np.arange(0, 11.5, 1 / PER_OCTAVE)))
NEW_TOKENS = np.unique(np.round(2.0 ** np.arange(0, 15, 1 / PER_OCTAVE)))


class ProfiledStep:
    """Step times of one model on one GPU type."""

    def __init__(
        self,
        shape: ModelShape,
        times: StepTime,
        *,
        parallelism: int = 1,
        fixed_s: float = 0.0,
        sequence_s: float = HOST_SEQUENCE_S,
    ) -> None:
        """Read the tables out of learned operator times.

        Args:
            fixed_s: What the host adds to a step; operators do not show it.
            sequence_s: The same for each request in it.
        """
        self.fixed_s, self.sequence_s = fixed_s, sequence_s
        self._shape, self._times, self._parallelism = shape, times, parallelism

    def step_s(self, num_decodes: int, decode_tokens: float, prefills: Sequence[tuple[int, int]] = ()) -> float:
        """Seconds of one step.

        Args:
            decode_tokens: KV tokens that all decodes read together, their own included.
            prefills: Of each the tokens cached before it, and the new ones.
        """
        tokens = num_decodes + sum(new for _, new in prefills)
        if tokens == 0:
            return 0.0
        seconds = self._dense_s(tokens, num_decodes + len(prefills))
        if num_decodes:
            table = self._beside if prefills else self._decodes
            seconds += table.at(num_decodes, decode_tokens / num_decodes)
        for cached, new in prefills:
            seconds += self._prefills.at(new, cached + 1)
        return seconds

    def decode_run_s(self, num_decodes: int, decode_tokens: float, num_steps: int) -> float:
        """Seconds of steps that only decode: the first reads `decode_tokens`, each next one a token more of each request."""
        if num_decodes == 0 or num_steps == 0:
            return 0.0
        dense_s = num_steps * self._dense_s(num_decodes, num_decodes)
        return dense_s + self._decodes.sum_along(num_decodes, decode_tokens / num_decodes, num_steps)

    def _dense_s(self, tokens: int, sequences: int) -> float:
        of_tokens, of_sequences = self._dense
        seconds = self.fixed_s + self.sequence_s * sequences
        return seconds + _read(of_tokens, tokens) + _read(of_sequences, sequences)

    @cached_property
    def _dense(self) -> tuple[list[float], list[float]]:
        """Seconds of the operators over tokens, and of those over requests, for every number from 0 on."""
        counts = np.arange(1, MOST_TOKENS + 1, dtype=np.float64)
        of_tokens, of_sequences = (
            self._times.dense_of(self._shape, counts, parallelism=self._parallelism, per_sequence=kind).seconds
            for kind in (False, True)
        )
        return [0.0, *of_tokens.tolist()], [0.0, *of_sequences[:MOST_SEQUENCES].tolist()]

    @cached_property
    def _decodes(self) -> "Grid":
        return Grid(COUNTS, CONTEXTS, lambda counts, contexts: self._decode_s(counts, contexts, beside=0.0))

    @cached_property
    def _beside(self) -> "Grid":
        alone_s = self._prefills.at(PREFILL_BESIDE, 1)
        return Grid(
            COUNTS, CONTEXTS,
            lambda counts, contexts: np.maximum(
                0.0, self._decode_s(counts, contexts, beside=PREFILL_BESIDE) - alone_s
            ),
        )  # fmt: skip

    def _decode_s(self, counts: Array, contexts: Array, *, beside: float) -> Array:
        zero = np.zeros(len(counts))
        return self._attention_s(
            lambda window: AttentionWork.of_grid(
                prefill_tokens=zero + beside, cached_tokens=zero, num_decodes=counts,
                decode_tokens=contexts if window is None else np.minimum(contexts, window),
            )
        )  # fmt: skip

    @cached_property
    def _prefills(self) -> "Grid":
        def seconds(new: Array, cached: Array) -> Array:
            zero = np.zeros(len(new))
            return self._attention_s(
                lambda window: AttentionWork.of_grid(
                    prefill_tokens=new, cached_tokens=cached - 1 if window is None else np.minimum(cached - 1, window - 1),
                    num_decodes=zero, decode_tokens=zero,
                )
            )  # fmt: skip

        return Grid(NEW_TOKENS, CONTEXTS, seconds)

    def _attention_s(self, work: Callable[[int | None], AttentionWork]) -> Array:
        return np.asarray(
            sum(
                count
                * self._times.attention.predict(
                    attention_shape(attention, self._parallelism), work(attention.window)
                ).seconds
                for (attention, _), count in self._shape.layers.items()
            )
        )


class Grid:
    """A function of two sizes, read between its knots: linear in both; beyond them it goes on as at the end."""

    def __init__(self, rows: Array, columns: Array, function: Callable[[Array, Array], Array]) -> None:
        """Evaluate the function at all knots at once."""
        grid = np.stack(np.meshgrid(rows, columns, indexing="ij")).reshape(2, -1)
        self._rows, self._columns = rows.tolist(), columns.tolist()
        self._values = function(grid[0], grid[1]).reshape(len(rows), len(columns)).tolist()

    def at(self, row: float, column: float) -> float:
        """The function's value."""
        below, share = _place(self._rows, row)
        left, part = _place(self._columns, column)
        low, high = self._values[below], self._values[below + 1]
        value: float = (1.0 - share) * (low[left] + part * (low[left + 1] - low[left]))
        return value + share * (high[left] + part * (high[left + 1] - high[left]))

    def sum_along(self, row: float, first: float, num: int) -> float:
        """Sum of the values at columns first, first + 1, ..., so many: between knots they lie on a line."""
        last = first + num - 1
        ends = [math.floor(knot - first) + 1 for knot in self._columns[1:-1] if first < knot < last]
        total, done = 0.0, 0
        for end in (*ends, num):  # as many lie before the next knot
            if end > done:
                total += (end - done) * (self.at(row, first + done) + self.at(row, first + end - 1)) / 2
                done = end
        assert done == num, f"{done} of {num} steps were added up"
        return total


def _place(knots: Sequence[float], value: float) -> tuple[int, float]:
    """The knot below, and how far the value is on the way to the next one."""
    below = min(max(bisect_right(knots, value) - 1, 0), len(knots) - 2)
    return below, (value - knots[below]) / (knots[below + 1] - knots[below])


def _read(table: Sequence[float], index: int) -> float:
    if index < len(table):
        return table[index]
    return table[-1] + (index - len(table) + 1) * (table[-1] - table[-2])
