"""How well output lengths are predicted on a trace, against the tenant's own running quantiles and against hindsight.

Definitions:
- Every request is predicted in the order of arrival, and learned right after.
- Loss: mean pinball loss over requests and quantiles. The held-out part is the second half of the trace.
- Baseline: quantiles of all requests that the tenant has made so far; of everybody's while it has made none.
- Oracle: on the held-out part, quantiles of each tenant's requests in up to `BINS` bins of prompt length (equal counts, at
  least `FEWEST_PER_BIN` requests each). Its gain is the baseline's loss less its own, over the baseline's, three ways:
      honest        each request is judged without its own fifth of the bin (a tenant's only one by everybody's)
      in hindsight  the bin's quantiles fit the very requests that they are judged on, which always gains something
      by chance     in hindsight, after lengths were shuffled within each tenant: what prompt lengths tell is destroyed
  What chance decides is the mean of `REPEATS` draws (on a few hundred requests, single ones differ by percents).
  Where the gain in hindsight is no more than that by chance, prompt lengths tell nothing, and nobody can reach it.
  `oracle_gains_by_bins` has the three for other numbers of bins (1: the tenant alone).
- Share: what the model gains on the baseline there, of what the oracle gains; none where the oracle gains less than
  `LEAST_GAIN` of the loss, for noise over nearly nothing says nothing.
"""

from bisect import insort
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cost_service.output_length import FIRST_GUESS, QUANTILES, OutputLength, Quantiles, quantiles_of
from cost_service.traces import TraceRequest

Array = NDArray[np.float64]

BINS, FEWEST_PER_BIN, FOLDS = 4, 20, 5
OTHER_BINS = (1, 2, 8)
REPEATS = 10
LEAST_GAIN = 0.005
TINY = 1e-9
"""Tokens added to both sides of a ratio: two that are never wrong are alike."""


def evaluate_lengths(requests: Sequence[TraceRequest]) -> dict[str, Any]:
    """Predict and learn a whole trace; return losses, ratios and coverage.

    Raises:
        ValueError: There are too few requests to hold some out.
    """
    if len(requests) < 2:
        raise ValueError(f"A trace must have at least 2 requests to be judged: it has {len(requests)}.")
    lengths = np.array([request.output_tokens for request in requests], dtype=np.float64)
    predicted = np.array(_predicted(requests))
    of_model, of_baseline = (_losses(rows, lengths) for rows in (predicted, np.array(_baseline(requests))))
    half = len(requests) // 2
    held, base = float(of_model[half:].mean()), float(of_baseline[half:].mean())
    oracles = {num: oracle_losses(requests[half:], num_bins=num) for num in (BINS, *OTHER_BINS)}
    gains = {
        num: {way: 1.0 - (float(loss.mean()) + TINY) / (base + TINY) for way, loss in losses.items()}
        for num, losses in oracles.items()
    }
    report: dict[str, Any] = {
        "requests": len(requests),
        "tenants": len({request.tenant for request in requests}),
        "loss": float(of_model.mean()),
        "baseline_loss": float(of_baseline.mean()),
        "loss_ratio": float((of_model.mean() + TINY) / (of_baseline.mean() + TINY)),
        "held_out_loss": held,
        "held_out_baseline_loss": base,
        "held_out_loss_ratio": (held + TINY) / (base + TINY),
        "held_out_losses_by_quantile": {
            "model": _by_quantile(of_model[half:].mean(axis=0)),
            "baseline": _by_quantile(of_baseline[half:].mean(axis=0)),
            **{f"oracle_{way}": _by_quantile(loss) for way, loss in oracles[BINS].items()},
        },
        "oracle_gain": gains[BINS]["honest"],
        "oracle_gain_in_hindsight": gains[BINS]["hindsight"],
        "oracle_gain_by_chance": gains[BINS]["chance"],
        "oracle_gains_by_bins": {str(num): gains[num] for num in sorted(gains)},
        "coverage": _by_quantile((predicted >= lengths[:, None]).mean(axis=0)),
    }
    for way in ("honest", "hindsight"):
        gain = gains[BINS][way]
        report[f"share_of_{way}_gain"] = (1.0 - report["held_out_loss_ratio"]) / gain if gain > LEAST_GAIN else None
    return report


def oracle_losses(requests: Sequence[TraceRequest], *, num_bins: int) -> dict[str, Array]:
    """Mean pinball loss per quantile of quantiles by tenant and prompt length, of these requests themselves."""
    by_tenant: dict[str, list[TraceRequest]] = defaultdict(list)
    for request in requests:
        by_tenant[request.tenant].append(request)
    everybody = np.array([request.output_tokens for request in requests], dtype=np.float64)
    rng = np.random.default_rng(0)
    totals = {way: np.zeros(len(QUANTILES)) for way in ("honest", "hindsight", "chance")}
    for own in by_tenant.values():
        order = np.argsort([request.prompt_tokens for request in own], kind="stable")
        lengths = np.array([request.output_tokens for request in own], dtype=np.float64)[order]
        num = max(1, min(num_bins, len(own) // FEWEST_PER_BIN))
        for part in np.array_split(lengths, num):
            totals["honest"] += sum(_left_out(part, everybody, rng) for _ in range(REPEATS)) / REPEATS
            totals["hindsight"] += _fitted(part, part)
        for _ in range(REPEATS):
            shuffled = np.array_split(rng.permutation(lengths), num)
            totals["chance"] += sum(_fitted(part, part) for part in shuffled) / REPEATS
    return {way: total / len(requests) for way, total in totals.items()}


def _predicted(requests: Sequence[TraceRequest]) -> list[Quantiles]:
    model, predicted = OutputLength(), []
    for request in requests:
        predicted.append(model.predict(request.tenant, request.prompt_tokens))
        model.observe(request.tenant, request.prompt_tokens, request.output_tokens)
    return predicted


def _baseline(requests: Sequence[TraceRequest]) -> list[Quantiles]:
    own: dict[str, list[int]] = defaultdict(list)
    everybody: list[int] = []
    predicted = []
    for request in requests:
        known = own[request.tenant] or everybody
        predicted.append(quantiles_of(known) if known else FIRST_GUESS)
        for rising in (own[request.tenant], everybody):
            insort(rising, request.output_tokens)
    return predicted


def _left_out(lengths: Array, everybody: Array, rng: np.random.Generator) -> Array:
    """Sum of losses of a bin's requests, each judged by the other folds."""
    if len(lengths) == 1:
        return _fitted(everybody, lengths)
    folds = min(FOLDS, len(lengths))
    fold = rng.permutation(len(lengths)) % folds
    total: Array = np.sum([_fitted(lengths[fold != one], lengths[fold == one]) for one in range(folds)], axis=0)
    return total


def _fitted(learned: Array, judged: Array) -> Array:
    """Sum of losses per quantile of one set's quantiles on another."""
    quantiles = np.asarray(np.quantile(learned, QUANTILES), dtype=np.float64)
    total: Array = _losses(quantiles, judged).sum(axis=0)
    return total


def _losses(predicted: Array, lengths: Array) -> Array:
    """Pinball losses of shape (requests, quantiles)."""
    missing, quantiles = lengths[:, None] - predicted, np.array(QUANTILES)
    losses: Array = np.maximum(quantiles * missing, (quantiles - 1.0) * missing)
    return losses


def _by_quantile(values: Array) -> dict[str, float]:
    return dict(zip(map(str, QUANTILES), map(float, values), strict=True))
