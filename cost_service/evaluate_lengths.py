"""How well output lengths are predicted on a trace, against the tenant's own running quantiles and against hindsight.

Definitions:
- Every request is predicted in the order of arrival, and learned right after.
- Baseline: quantiles of all requests that the tenant has made so far; of everybody's while it has made none.
- Oracle, on the second half of the trace: quantiles of each tenant's requests in up to `BINS` bins of prompt length (equal
  counts, at least `FEWEST_PER_BIN` requests each). In hindsight, quantiles fit their own sample better than any prediction
  can: `oracle_gain` leaves each request's fifth of its bin out, `oracle_gain_in_hindsight` does not.
- Share: what the model gains on the baseline, of what the oracle gains; none where the oracle gains less than
  `LEAST_GAIN` of the loss, for then there is nothing to be had from tenant and prompt length.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cost_service.output_length import FIRST_GUESS, QUANTILES, OutputLength, pinball, quantiles_of
from cost_service.traces import TraceRequest

Array = NDArray[np.float64]

BINS, FEWEST_PER_BIN, FOLDS = 4, 20, 5
LEAST_GAIN = 0.005


def evaluate_lengths(requests: Sequence[TraceRequest]) -> dict[str, Any]:
    """Predict and learn a whole trace; return losses, ratios and coverage."""
    model = OutputLength()
    own: dict[str, list[int]] = defaultdict(list)
    everybody: list[int] = []
    predicted, baseline = [], []
    for request in requests:
        known = own[request.tenant] or everybody[-2000:]
        baseline.append(quantiles_of(np.array(known, dtype=np.float64)) if known else np.array(FIRST_GUESS))
        predicted.append(np.array(model.predict(request.tenant, request.prompt_tokens)))
        model.observe(request.tenant, request.prompt_tokens, request.output_tokens)
        own[request.tenant].append(request.output_tokens)
        everybody.append(request.output_tokens)
    lengths = np.array(everybody, dtype=np.float64)
    of_model, of_baseline = (pinball(np.stack(rows), lengths[:, None]).mean(axis=1) for rows in (predicted, baseline))
    half = len(requests) // 2
    held, base = of_model[half:].mean(), of_baseline[half:].mean()
    gains = {
        name: base - oracle_loss(requests[half:], folds=folds) for name, folds in (("honest", FOLDS), ("hindsight", 1))
    }
    report = {
        "requests": len(requests),
        "tenants": len(own),
        "loss": float(of_model.mean()),
        "baseline_loss": float(of_baseline.mean()),
        "loss_ratio": float(of_model.mean() / of_baseline.mean()),
        "held_out_loss": float(held),
        "held_out_baseline_loss": float(base),
        "held_out_loss_ratio": float(held / base),
        "oracle_gain": float(gains["honest"] / base),
        "oracle_gain_in_hindsight": float(gains["hindsight"] / base),
        "coverage": dict(
            zip(map(str, QUANTILES), (np.stack(predicted) >= lengths[:, None]).mean(axis=0).tolist(), strict=True)
        ),
    }
    for name, gain in gains.items():
        report[f"share_of_{name}_gain"] = float((base - held) / gain) if gain > LEAST_GAIN * base else None
    return report


def oracle_loss(requests: Sequence[TraceRequest], *, folds: int) -> float:
    """Mean pinball loss of quantiles by tenant and prompt length, of these requests themselves.

    Args:
        folds: Parts of a bin of which one is left out where it is judged; 1: none is.
    """
    by_tenant: dict[str, list[TraceRequest]] = defaultdict(list)
    for request in requests:
        by_tenant[request.tenant].append(request)
    rng, total = np.random.default_rng(0), 0.0
    for own in by_tenant.values():
        order = np.argsort([request.prompt_tokens for request in own], kind="stable")
        lengths = np.array([request.output_tokens for request in own], dtype=np.float64)[order]
        for part in np.array_split(lengths, max(1, min(BINS, len(own) // FEWEST_PER_BIN))):
            total += _bin_loss(part, rng.permutation(len(part)) % folds, folds)
    return total / len(requests)


def _bin_loss(lengths: Array, fold: NDArray[np.int64], folds: int) -> float:
    if folds == 1 or len(lengths) < folds:
        return _loss(lengths, lengths)
    return sum(_loss(lengths[fold != one], lengths[fold == one]) for one in range(folds))


def _loss(learned: Array, judged: Array) -> float:
    return float(pinball(quantiles_of(learned), judged[:, None]).mean(axis=1).sum())
