"""How well the step-time model predicts what it was not fitted on.

Two questions:
- Of profiles alone: fitted on a part of their rows, judged on the rest (`split`). By default attention with every fifth
  row by chance held out, then with all contexts beyond 4,096, and dense operators with every third batch size held out;
  where decodes of different contexts were measured, they are judged by what those of one context taught.
- Of other profiles of the same GPU (`transfer`): fitted on those, judged on models that were never seen, operator by
  operator and as whole steps. A measured step is the sum of its measured operators over all layers; between measured
  batch sizes they are interpolated.
"""

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cost_service.attention_time import AttentionTime
from cost_service.engine_step import EngineBatch, EngineStep
from cost_service.hardware import HARDWARE, known_hardware
from cost_service.holdout import ATTENTION_LONG, ATTENTION_RANDOM, DENSE_EVERY_THIRD, held_out
from cost_service.operator_time import OperatorTime
from cost_service.operators import Operator, dense_operators
from cost_service.profiles import AttentionRows
from cost_service.residual import Estimate
from cost_service.step_time import MeasuredModel, StepTime, attention_grid

Array = NDArray[np.float64]

logger = logging.getLogger(__name__)

ASKED = {
    "attention_random": 0.03,
    "attention_long_context": 0.08,
    "dense_every_third": 0.03,
    "step_time": 0.15,
}
"""Mean absolute errors that are asked for at most."""


@dataclass(frozen=True, slots=True)
class Judged:
    """Predicted and measured seconds of rows that were not fitted."""

    estimate: Estimate
    measured_s: Array

    def figures(self) -> dict[str, float]:
        """Errors relative to what was measured, and how much of it the intervals hold."""
        errors = np.abs(self.estimate.seconds / self.measured_s - 1.0)
        inside = (self.estimate.low_s <= self.measured_s) & (self.measured_s <= self.estimate.high_s)
        return {
            "rows": len(errors),
            "mean_error": float(errors.mean()),
            "median_error": float(np.median(errors)),
            "p90_error": float(np.quantile(errors, 0.9)),
            "bias": float(np.mean(self.estimate.seconds / self.measured_s) - 1.0),
            "interval_coverage": float(inside.mean()),
        }


def split_by_gpu(models: Sequence[MeasuredModel], holdout: str | None) -> dict[str, Judged]:
    """`split` the profiles of each GPU by themselves; each figure is of the rows of all.

    Raises:
        ValueError: The expression holds out no row of any table, or leaves none to fit.
    """
    parts: dict[str, list[tuple[Estimate, Array]]] = defaultdict(list)
    for gpu in sorted({model.profile.hardware for model in models}):
        of_gpu = split([model for model in models if model.profile.hardware == gpu], holdout)
        for name, judged in of_gpu.items():
            parts[name].append((judged.estimate, judged.measured_s))
    if not parts:
        raise ValueError(
            f"--holdout {holdout!r} holds out no row, or all: name columns of attention or of dense operators."
            if holdout
            else "These profiles have too few rows to hold any out: profile more."
        )
    return {name: _joined(rows) for name, rows in parts.items()}


def split(models: Sequence[MeasuredModel], holdout: str | None) -> dict[str, Judged]:
    """Judge held-out rows of the profiles that are fitted, all of one GPU; nothing where none is held out, or all."""
    asked = (
        [("attention_random", ATTENTION_RANDOM, ""), ("attention_long_context", ATTENTION_LONG, ""),
         ("dense_every_third", "", DENSE_EVERY_THIRD)]
        if holdout is None
        else [("holdout", holdout, holdout)]
    )  # fmt: skip
    judged: dict[str, Judged] = {}
    if holdout is None and (uneven := _uneven(models)) is not None:
        judged["attention_uneven"] = uneven
    for name, of_attention, of_dense in asked:
        if of_attention and (found := _attention_split(models, of_attention)) is not None:
            judged["attention_holdout" if holdout else name] = found
        if of_dense and (found := _dense_split(models, of_dense)) is not None:
            judged["dense_holdout" if holdout else name] = found
    return judged


def transfer(fitted: Sequence[MeasuredModel], judged: Sequence[MeasuredModel]) -> dict[str, Judged]:
    """Judge whole profiles by what was learned from others.

    Raises:
        ValueError: Nothing to learn from.
    """
    model = StepTime()
    model.fit(fitted)
    dense = [(model.operators.predict(one, rows), seconds) for each in judged for one, rows, seconds in each.operators]
    attention = [
        (model.attention.predict(shape, work), seconds)
        for each in judged
        if (sample := each.attention) is not None
        for shape, work, seconds in [sample]
    ]
    steps = [found for each in judged if (found := _steps(model, each)) is not None]
    parts = {"dense_transfer": dense, "attention_transfer": attention, "step_time": steps}
    return {name: _joined(rows) for name, rows in parts.items() if rows}


def cold(judged: Sequence[MeasuredModel]) -> dict[str, Judged]:
    """Judge whole steps by what the datasheet of their GPU says.

    Raises:
        ValueError: The datasheet of a GPU is not known, or no profile has whole steps.
    """
    parts = []
    for each in judged:
        hardware = known_hardware(each.profile.hardware)
        if hardware is None:
            raise ValueError(f"{each.profile.hardware} has no datasheet here: known are {', '.join(HARDWARE)}.")
        rows, measured_s = each.profile.attention, _measured_steps(each)
        if rows is None or measured_s is None:
            continue
        step = EngineStep.cold(each.shape, hardware, parallelism=each.profile.parallelism, collectives=False)
        columns = (rows.prefill_tokens, rows.cached_tokens, rows.num_decodes, rows.decode_tokens)
        batches = [
            EngineBatch(int(decodes), decodes * context, ((int(cached), int(new)),) if new else ())
            for new, cached, decodes, context in zip(*columns, strict=True)
        ]
        parts.append((step.estimate(batches), measured_s))
    if not parts:
        raise ValueError("No profile has attention and all operators of its model: profile them to judge whole steps.")
    return {"step_time_cold": _joined(parts)}


def attention_columns(rows: AttentionRows) -> dict[str, Array]:
    """What an expression may name of attention rows."""
    return {
        "prefill_tokens": rows.prefill_tokens, "cached_tokens": rows.cached_tokens, "num_decodes": rows.num_decodes,
        "decode_tokens": rows.decode_tokens, "context": rows.context,
    }  # fmt: skip


def _uneven(models: Sequence[MeasuredModel]) -> Judged | None:
    """Judge decodes of different contexts by what was learned from those of one context."""
    fit = [sample for model in models if (sample := model.attention) is not None]
    if not fit or not any(model.profile.uneven for model in models):
        return None
    learned = AttentionTime()
    learned.fit(fit)
    parts = []
    for model in models:
        if (rows := model.profile.uneven) is not None:
            parts.append((learned.predict(model.attention_shape, attention_grid(rows)), rows.seconds))
    return _joined(parts)


def _attention_split(models: Sequence[MeasuredModel], expression: str) -> Judged | None:
    fit, rest = [], []
    for model in models:
        rows, sample = model.profile.attention, model.attention
        chosen = held_out(expression, attention_columns(rows)) if rows is not None else None
        if sample is None or chosen is None:
            continue
        shape, work, seconds = sample
        fit.append((shape, work.rows(~chosen), seconds[~chosen]))
        rest.append((shape, work.rows(chosen), seconds[chosen]))
    if not sum(len(seconds) for *_, seconds in fit) or not sum(len(seconds) for *_, seconds in rest):
        return None
    model_of_time = AttentionTime()
    model_of_time.fit(fit)
    return _joined([(model_of_time.predict(shape, work), seconds) for shape, work, seconds in rest])


def _dense_split(models: Sequence[MeasuredModel], expression: str) -> Judged | None:
    fit, rest = [], []
    for model in models:
        for operator, rows, seconds in model.operators:
            if (chosen := held_out(expression, {"tokens": rows})) is not None:
                fit.append((operator, rows[~chosen], seconds[~chosen]))
                rest.append((operator, rows[chosen], seconds[chosen]))
    fit, rest = ([sample for sample in part if len(sample[1])] for part in (fit, rest))
    if not fit or not rest:
        return None
    model_of_time = OperatorTime()
    model_of_time.fit(fit)
    return _joined([(model_of_time.predict(operator, rows), seconds) for operator, rows, seconds in rest])


def _steps(model: StepTime, judged: MeasuredModel) -> tuple[Estimate, Array] | None:
    """Predicted and measured steps, one for each measured row of attention; None where operators were not measured."""
    rows, measured_s = judged.profile.attention, _measured_steps(judged)
    if rows is None or measured_s is None:
        return None
    of_layer = model.attention.predict(judged.attention_shape, attention_grid(rows))
    of_layers = of_layer.map(partial(np.multiply, judged.shape.num_layers))
    return Estimate.total([_dense_at(model, judged, *_rows(rows)), of_layers]), measured_s


def _rows(rows: AttentionRows) -> tuple[Array, Array]:
    """Tokens and requests of the measured steps."""
    return rows.prefill_tokens + rows.num_decodes, (rows.prefill_tokens > 0) + rows.num_decodes


def _measured_steps(judged: MeasuredModel) -> Array | None:
    """Sums of measured operators, one for each measured row of attention; None where operators were not measured."""
    profile, shape = judged.profile, judged.shape
    rows = profile.attention
    if rows is None:
        return None
    tokens, sequences = _rows(rows)
    own = dense_operators(shape, parallelism=profile.parallelism)
    missing = sorted({one.name for one in own} - set(profile.operators) - {"all_reduce"})
    if missing:
        logger.warning("Steps of %s are not judged: %s was not measured.", profile.folder, ", ".join(missing))
        return None
    measured_s = sum(
        one.calls * _interpolated(one, profile.operators, tokens, sequences)
        for one in own
        if one.name in profile.operators
    )
    total: Array = measured_s + shape.num_layers * rows.seconds
    return total


def _dense_at(model: StepTime, judged: MeasuredModel, tokens: Array, sequences: Array) -> Estimate:
    """Everything but attention and collectives, predicted once for every pair that occurs."""
    pairs, inverse = np.unique(np.column_stack((tokens, sequences)), axis=0, return_inverse=True)
    one = model.dense(judged.shape, pairs[:, 0], pairs[:, 1], parallelism=judged.profile.parallelism, collectives=False)
    return one.map(lambda seconds: seconds[inverse])


def _interpolated(
    operator: Operator, measured: Mapping[str, tuple[Array, Array]], tokens: Array, sequences: Array
) -> Array:
    rows, seconds = measured[operator.name]
    result: Array = np.interp(sequences if operator.per_sequence else tokens, rows, seconds)
    return result


def _joined(parts: Sequence[tuple[Estimate, Array]]) -> Judged:
    seconds, low_s, high_s = (
        np.concatenate([getattr(estimate, name) for estimate, _ in parts]) for name in ("seconds", "low_s", "high_s")
    )
    measured_s = np.concatenate([measured for _, measured in parts])
    return Judged(Estimate(seconds=seconds, low_s=low_s, high_s=high_s), measured_s)


def report(judged: Mapping[str, Judged]) -> dict[str, Any]:
    """Figures by name, with what is asked where something is."""
    return {
        name: one.figures()
        | ({"asked": ASKED[name], "reached": one.figures()["mean_error"] <= ASKED[name]} if name in ASKED else {})
        for name, one in judged.items()
    }
