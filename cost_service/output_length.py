"""How many tokens a request will generate: quantiles from what its tenant, and all tenants, have generated before.

Method: several simple predictors (the tenant's own quantiles, those of its requests with prompts of about that length, its
newest ones, everybody's of that prompt length) are mixed with weights that fall exponentially with the pinball loss each of
them has had, per tenant and over all tenants, per quantile (Vovk, "Aggregating strategies", 1990; fixed share: Herbster and
Warmuth, 1998). The tenant's own quantiles are one of them and begin with the largest weight: where nothing else helps, the
mixture costs next to nothing.

Rules:
- Online: `observe` a request when it has finished; every one is predicted before it is learned.
- Bounded: the newest `HISTORY` requests of at most `MAX_TENANTS` tenants; who was not seen for longest goes.
- No clock, no chance: the same requests give the same predictions.
"""

import math
from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

QUANTILES = (0.1, 0.5, 0.9)
FIRST_GUESS = (10.0, 150.0, 600.0)
"""Tokens that are expected of the very first request: a chat's."""

HISTORY, NEWEST = 512, 100
MAX_TENANTS = 4096
EVERYBODY = 2048
"""Requests of all tenants that are remembered for those who are new."""

FEWEST = 20
"""Requests of all tenants with a prompt of about that length before they are asked."""

KERNELS = ((0.2, math.inf), (0.5, math.inf), (0.3, 150.0))
"""Widths in the logarithm of the prompt's length, and in requests since."""

SHRINKAGE = 8.0
"""Own requests that weigh as much as everybody's quantiles."""

PRIOR = np.array((5.0, 5.0) + (1.0,) * (len(KERNELS) + 2))
RATE, COMMON_RATE, SHARE = 1.0, 0.1, 0.002
"""How fast a tenant's weights and those of all follow the losses, and what every predictor gets back."""

LEAST_COMMON = -6.0
SCHEMA = 1


@dataclass(slots=True)
class _Tenant:
    prompts: deque[float] = field(default_factory=lambda: deque(maxlen=HISTORY))
    """Logarithms."""

    lengths: deque[float] = field(default_factory=lambda: deque(maxlen=HISTORY))
    weights: Array = field(default_factory=lambda: np.tile(np.log(PRIOR / PRIOR.sum())[:, None], (1, len(QUANTILES))))
    """Logarithms, of shape (predictors, quantiles)."""


class OutputLength:
    """Predicts output lengths and learns them."""

    def __init__(self) -> None:
        self._tenants: OrderedDict[str, _Tenant] = OrderedDict()
        self._everybody: deque[float] = deque(maxlen=EVERYBODY)
        self._alike: dict[int, deque[float]] = {}
        """Lengths by half octaves of the prompt."""

        self._common: Array = np.zeros((len(PRIOR), len(QUANTILES)))

    def predict(
        self, tenant: str, prompt_tokens: int, max_tokens: int | None = None, *, kind: str = ""
    ) -> tuple[float, ...]:
        """Return the quantiles of the output length, rising, none above `max_tokens`.

        Args:
            kind: Kinds of requests (chat, completion) of a tenant have histories of their own.

        Raises:
            ValueError: A number of tokens is none.
        """
        _check_tokens("prompt_tokens", prompt_tokens, least=0)
        if max_tokens is not None:
            _check_tokens("max_tokens", max_tokens, least=1)
        known = self._tenants.get(_key(tenant, kind))
        mixed = self._mix(known or _Tenant(), self._predictions(known or _Tenant(), math.log1p(prompt_tokens)))
        return tuple(float(value) for value in np.clip(mixed, 1.0, max_tokens or math.inf))

    def observe(self, tenant: str, prompt_tokens: int, output_tokens: int, *, kind: str = "") -> None:
        """Learn from a request that has finished by itself.

        Raises:
            ValueError: A number of tokens is none.
        """
        _check_tokens("prompt_tokens", prompt_tokens, least=0)
        _check_tokens("output_tokens", output_tokens, least=0)
        known, prompt = self._tenant(_key(tenant, kind)), math.log1p(prompt_tokens)
        losses = pinball(self._predictions(known, prompt), output_tokens)
        newest = list(known.lengths)[-NEWEST:]
        relative = losses / (1.0 + (sum(newest) / len(newest) if newest else output_tokens))
        self._common = self._common - COMMON_RATE * relative
        self._common = np.maximum(self._common - self._common.max(axis=0), LEAST_COMMON)
        weights = _normalised(known.weights - RATE * relative)
        known.weights = np.log((1.0 - SHARE) * weights + SHARE * (PRIOR / PRIOR.sum())[:, None])
        known.prompts.append(prompt)
        known.lengths.append(float(output_tokens))
        self._everybody.append(float(output_tokens))
        self._alike.setdefault(int(2 * prompt), deque(maxlen=HISTORY)).append(float(output_tokens))

    def to_document(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "schema": SCHEMA,
            "tenants": {
                name: {"prompts": list(one.prompts), "lengths": list(one.lengths), "weights": one.weights.tolist()}
                for name, one in self._tenants.items()
            },
            "everybody": list(self._everybody),
            "alike": {str(octave): list(lengths) for octave, lengths in self._alike.items()},
            "common": self._common.tolist(),
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Self:
        """Read what `to_document` returned.

        Raises:
            ValueError: Another schema, or not such a document.
        """
        if document.get("schema") != SCHEMA:
            raise ValueError(f"A document of output lengths must have schema {SCHEMA}: begin anew.")
        model = cls()
        try:
            for name, one in document["tenants"].items():
                tenant = model._tenant(name)
                tenant.prompts.extend(map(float, one["prompts"]))
                tenant.lengths.extend(map(float, one["lengths"]))
                tenant.weights = np.array(one["weights"], dtype=np.float64)
            model._everybody.extend(map(float, document["everybody"]))
            model._alike = {
                int(name): deque(map(float, many), maxlen=HISTORY) for name, many in document["alike"].items()
            }
            model._common = np.array(document["common"], dtype=np.float64)
            model.check()
        except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"A document of output lengths is damaged ({error}): begin anew.") from None
        return model

    def check(self) -> None:
        """Assert that histories are bounded and weights are some."""
        assert len(self._tenants) <= MAX_TENANTS, f"{len(self._tenants)} tenants"
        for name, one in self._tenants.items():
            assert len(one.prompts) == len(one.lengths), f"tenant {name!r} has prompts without lengths"
            assert one.weights.shape == self._common.shape == (len(PRIOR), len(QUANTILES)), f"weights of {name!r}"
            assert np.isfinite(one.weights).all(), f"weights of tenant {name!r}"

    def _tenant(self, key: str) -> _Tenant:
        if key not in self._tenants and len(self._tenants) >= MAX_TENANTS:
            self._tenants.popitem(last=False)
        one = self._tenants.setdefault(key, _Tenant())
        self._tenants.move_to_end(key)
        return one

    def _mix(self, tenant: _Tenant, predictions: Array) -> Array:
        mixed: Array = np.sort((_normalised(tenant.weights + self._common) * predictions).sum(axis=0))
        return mixed

    def _predictions(self, tenant: _Tenant, prompt: float) -> Array:
        """What each predictor says, of shape (predictors, quantiles)."""
        everybody = quantiles_of(np.array(self._everybody)) if self._everybody else np.array(FIRST_GUESS)
        lengths = np.array(tenant.lengths)
        own = quantiles_of(lengths) if len(lengths) else everybody
        share = len(lengths) / (len(lengths) + SHRINKAGE)
        shrunk = np.expm1(share * np.log1p(own) + (1.0 - share) * np.log1p(everybody))
        if len(lengths):
            near, age = np.abs(np.array(tenant.prompts) - prompt), np.arange(len(lengths))[::-1]
            order = np.argsort(lengths)
            kernels = [np.exp(-near / width - age / requests) + 0.01 for width, requests in KERNELS]
            by_prompt = [_weighted_quantiles(lengths[order], kernel[order]) for kernel in kernels]
            newest = quantiles_of(lengths[-NEWEST:])
        else:
            by_prompt, newest = [shrunk] * len(KERNELS), shrunk
        alike = self._alike.get(int(2 * prompt), ())
        of_all = quantiles_of(np.array(alike)) if len(alike) >= FEWEST else shrunk
        return np.stack((own, shrunk, *by_prompt, newest, of_all))


def pinball(predictions: Array, length: float | Array) -> Array:
    """Pinball loss of predicted quantiles, elementwise over the last axis of `QUANTILES`."""
    missing = length - predictions
    loss: Array = np.maximum(np.array(QUANTILES) * missing, (np.array(QUANTILES) - 1.0) * missing)
    return loss


def quantiles_of(lengths: Array) -> Array:
    """Quantiles of lengths that all count alike."""
    return np.asarray(np.quantile(lengths, QUANTILES), dtype=np.float64)


def _weighted_quantiles(rising: Array, weights: Array) -> Array:
    total = np.cumsum(weights)
    found = np.searchsorted(total, np.array(QUANTILES) * total[-1] - 1e-9)
    result: Array = rising[np.minimum(found, len(rising) - 1)]
    return result


def _normalised(logs: Array) -> Array:
    weights: Array = np.exp(logs - logs.max(axis=0))
    return weights / weights.sum(axis=0)


def _key(tenant: str, kind: str) -> str:
    return f"{tenant}\0{kind}" if kind else tenant


def _check_tokens(name: str, value: object, *, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}: it is {value!r}.")
