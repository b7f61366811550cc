"""How many tokens a request will generate: quantiles from what its tenant, and all tenants, have generated before.

Method: several simple predictors are mixed, per quantile, with weights that fall exponentially with the pinball loss that
each of them has had with this tenant and with all (Vovk, "Aggregating strategies", 1990), and that never vanish, so that
the mixture follows changes (fixed share: Herbster and Warmuth, "Tracking the best expert", 1998). The predictors:
    own       quantiles of the tenant's requests; the largest weight at first, for where nothing else helps it must win
    shrunk    the same, pulled to everybody's while they are few
    near      of its requests with the nearest prompt lengths
    newest    of its newest requests
    alike     of everybody's requests with the nearest prompt lengths, few and many of them

Rules:
- Online: `observe` a request when it has finished; `predict` changes nothing.
- Of prompt lengths only the order counts: any measure that grows with them will do, the same one in both calls.
- A request that was cut at its limit would have been longer: it is remembered as long as one of the tenant's longer ones
  (else of everybody's, else as it is), each of them in its turn. That is Efron's redistribution to the right ("The two
  sample problem with censored data", 1967); predictions are judged on it only up to the limit.
- Bounded: the newest `HISTORY` requests of at most `MAX_TENANTS` tenants, `MAX_REQUESTS` of all; who was not observed for
  longest goes.
- No clock, no chance: the same requests in the same order give the same predictions.
"""

import math
from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple, Self

QUANTILES = (0.1, 0.5, 0.9)
FIRST_GUESS = (10.0, 150.0, 600.0)
"""Tokens that are expected of the very first request: a chat's."""

HISTORY, EVERYBODY = 1024, 2048
"""Requests that are remembered of a tenant, and of all together."""

MAX_TENANTS, MAX_REQUESTS = 4096, 1 << 18
MAX_TOKENS = 10**9
NEAR, NEWEST = 32, 32
"""Requests of the tenant that `near` and `newest` ask."""

ALIKE = (32, 128)
"""Requests of everybody that `alike` asks."""

SHRINKAGE = 8.0
"""Requests that weigh as much as the quantiles to which theirs are pulled."""

PREDICTORS = ("own", "shrunk", "near", "newest", *(f"alike {num}" for num in ALIKE))
PRIOR = tuple((5.0 if name in ("own", "shrunk") else 1.0) / (10.0 + len(PREDICTORS) - 2) for name in PREDICTORS)
RATE, COMMON_RATE, SHARE = 1.0, 0.1, 0.002
"""How fast a tenant's weights and those of all follow the losses, and what every predictor gets back of its prior."""

LEAST_COMMON = -6.0
GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0
"""Its multiples, without their whole parts, fill the unit interval evenly from the first on."""

SCHEMA = 2

Quantiles = tuple[float, ...]


class Newest(NamedTuple):
    """Output lengths of a tenant's newest requests."""

    num: int
    mean: float
    quantiles: Quantiles


class History:
    """The newest requests, also in order of length and of prompt length, so that quantiles need no sorting.

    Rule: what is asked again before the next request is remembered is not computed again.
    """

    __slots__ = ("_newest", "_num_added", "_outputs", "_prompts", "_quantiles", "_size", "order", "rising")

    def __init__(self, size: int) -> None:
        self._size, self._num_added = size, 0
        self.order: deque[tuple[int, int]] = deque()
        """Prompt and output tokens, oldest first."""

        self.rising: list[int] = []
        self._prompts: list[int] = []
        """Prompt tokens, rising; of equal ones the oldest first."""

        self._outputs: list[int] = []
        """Output tokens of the same requests."""

        self._quantiles: Quantiles | None = None
        self._newest: Newest | None = None

    def __len__(self) -> int:
        return len(self.order)

    def add(self, prompt_tokens: int, output_tokens: int) -> None:
        """Remember a request; the oldest goes where there are too many."""
        if len(self.order) == self._size:
            prompt, output = self.order.popleft()
            place = bisect_left(self._prompts, prompt)
            del self._prompts[place], self._outputs[place]
            del self.rising[bisect_left(self.rising, output)]
        self._num_added += 1
        self.order.append((prompt_tokens, output_tokens))
        place = bisect_right(self._prompts, prompt_tokens)
        self._prompts.insert(place, prompt_tokens)
        self._outputs.insert(place, output_tokens)
        insort(self.rising, output_tokens)
        self._quantiles = self._newest = None

    def quantiles(self) -> Quantiles:
        """Quantiles of all; there must be some."""
        if self._quantiles is None:
            self._quantiles = quantiles_of(self.rising)
        return self._quantiles

    def near(self, prompt_tokens: int, num: int) -> Quantiles:
        """Quantiles of those with the nearest prompt lengths, half of them shorter and half longer."""
        first = bisect_left(self._prompts, prompt_tokens)
        past = bisect_right(self._prompts, prompt_tokens, first)
        start = max(0, min((first + past - num) // 2, len(self.order) - num))
        return quantiles_of(sorted(self._outputs[start : start + num]))

    def newest(self) -> Newest:
        """The newest ones, `NEWEST` of them or all; there must be some."""
        if self._newest is None:
            lengths = [output for _, output in islice(reversed(self.order), NEWEST)]
            self._newest = Newest(len(lengths), sum(lengths) / len(lengths), quantiles_of(sorted(lengths)))
        return self._newest

    def longer(self, output_tokens: int) -> int | None:
        """One of the lengths above, each of them in its turn; None where there is none."""
        first = bisect_right(self.rising, output_tokens)
        num = len(self.rising) - first
        return self.rising[first + int(self._num_added * GOLDEN % 1.0 * num)] if num else None

    def to_pairs(self) -> list[tuple[int, int]]:
        """Prompt and output tokens, oldest first."""
        return list(self.order)

    def extend(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Remember what `to_pairs` returned.

        Raises:
            ValueError: A number of tokens is none.
        """
        for prompt, output in pairs:
            _check_tokens("prompt_tokens", prompt, least=0)
            _check_tokens("output_tokens", output, least=0)
            self.add(prompt, output)

    def check(self) -> None:
        """Assert that the three orders hold the same requests, and that what is kept of them is true."""
        assert len(self.order) <= self._size, f"{len(self.order)} requests where {self._size} may be"
        by_prompt = list(zip(self._prompts, self._outputs, strict=True))
        assert by_prompt == sorted(self.order, key=lambda request: request[0]), "requests by prompt length"
        assert self.rising == sorted(output for _, output in self.order), "requests by length"
        assert self._quantiles in (None, quantiles_of(self.rising) if self.rising else None), "quantiles of others"


def _prior_weights() -> list[list[float]]:
    return [list(PRIOR) for _ in QUANTILES]


@dataclass(slots=True)
class _Tenant:
    history: History = field(default_factory=lambda: History(HISTORY))
    weights: list[list[float]] = field(default_factory=_prior_weights)
    """By quantile and predictor; a quantile's add up to 1."""


class OutputLength:
    """Predicts output lengths and learns them."""

    def __init__(self) -> None:
        self._tenants: OrderedDict[str, _Tenant] = OrderedDict()
        self._everybody = History(EVERYBODY)
        self._num_requests = 0
        """Requests that are remembered of tenants."""

        self._common = [[0.0] * len(PREDICTORS) for _ in QUANTILES]
        """Logarithms of what all tenants' weights are multiplied with, by quantile and predictor."""

    def predict(self, tenant: str, prompt_tokens: int, max_tokens: int | None = None, *, kind: str = "") -> Quantiles:
        """Return the quantiles of the output length, rising, at least 1 and none above `max_tokens`.

        Args:
            kind: Kinds of requests (chat, completion) of a tenant have histories of their own.

        Raises:
            ValueError: A number of tokens is none.
        """
        _check_tokens("prompt_tokens", prompt_tokens, least=0)
        if max_tokens is not None:
            _check_tokens("max_tokens", max_tokens, least=1)
        known = self._tenants.get(_key(tenant, kind)) or _Tenant()
        by_quantile = zip(*self._predictions(known.history, prompt_tokens), strict=True)
        mixed = []
        for predictions, own_weights, common in zip(by_quantile, known.weights, self._common, strict=True):
            weights = [weight * math.exp(log) for weight, log in zip(own_weights, common, strict=True)]
            mixed.append(sum(w * length for w, length in zip(weights, predictions, strict=True)) / sum(weights))
        return _allowed(sorted(mixed), max_tokens)

    def own_quantiles(self, tenant: str, max_tokens: int | None = None, *, kind: str = "") -> Quantiles:
        """Quantiles of the tenant's requests alone (of everybody's while it has none): what `predict` is to beat."""
        known = self._tenants.get(_key(tenant, kind))
        return _allowed(known.history.quantiles() if known and len(known.history) else self._of_everybody(), max_tokens)

    def observe(
        self, tenant: str, prompt_tokens: int, output_tokens: int, *, kind: str = "", cut: bool = False
    ) -> None:
        """Learn from a request that has finished.

        Args:
            cut: At its limit, and not by itself.

        Raises:
            ValueError: A number of tokens is none.
        """
        _check_tokens("prompt_tokens", prompt_tokens, least=0)
        _check_tokens("output_tokens", output_tokens, least=0)
        known = self._tenant(_key(tenant, kind))
        scale = 1.0 + (known.history.newest().mean if len(known.history) else output_tokens)
        by_quantile = zip(*self._predictions(known.history, prompt_tokens), strict=True)
        for index, (quantile, predictions) in enumerate(zip(QUANTILES, by_quantile, strict=True)):
            if cut:
                predictions = tuple(min(length, output_tokens) for length in predictions)
            losses = _losses(quantile, predictions, output_tokens, scale)
            known.weights[index] = _reweighted(known.weights[index], losses)
            common = [log - COMMON_RATE * loss for log, loss in zip(self._common[index], losses, strict=True)]
            largest = max(common)
            self._common[index] = [max(log - largest, LEAST_COMMON) for log in common]
        length = output_tokens
        if cut:
            length = known.history.longer(length) or self._everybody.longer(length) or length
        self._num_requests -= len(known.history)
        known.history.add(prompt_tokens, length)
        self._num_requests += len(known.history)
        self._everybody.add(prompt_tokens, length)
        while self._num_requests > MAX_REQUESTS:
            self._forget_one()

    def to_document(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "schema": SCHEMA,
            # A list, for their order says who goes first.
            "tenants": [
                {
                    "name": name,
                    "requests": list(map(list, one.history.to_pairs())),
                    "weights": list(map(list, one.weights)),
                }
                for name, one in self._tenants.items()
            ],
            "everybody": list(map(list, self._everybody.to_pairs())),
            "common": list(map(list, self._common)),
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
            for one in document["tenants"]:
                tenant = model._tenant(one["name"])
                tenant.history.extend(one["requests"])
                model._num_requests += len(tenant.history)
                tenant.weights = [list(map(float, weights)) for weights in one["weights"]]
            model._everybody.extend(document["everybody"])
            model._common = [list(map(float, logs)) for logs in document["common"]]
            model.check()
        except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"A document of output lengths is damaged ({error}): begin anew.") from None
        return model

    def check(self) -> None:
        """Assert that histories are bounded and in order, and weights are some."""
        assert len(self._tenants) <= MAX_TENANTS, f"{len(self._tenants)} tenants"
        assert self._num_requests <= MAX_REQUESTS, f"{self._num_requests} requests"
        assert self._num_requests == sum(len(one.history) for one in self._tenants.values()), "number of requests"
        shape = [len(PREDICTORS)] * len(QUANTILES)
        assert list(map(len, self._common)) == shape, "common weights"
        assert all(LEAST_COMMON <= log <= 0.0 for logs in self._common for log in logs), "common weights"
        self._everybody.check()
        for name, one in self._tenants.items():
            one.history.check()
            assert list(map(len, one.weights)) == shape, f"weights of tenant {name!r}"
            for weights in one.weights:
                assert min(weights) > 0.0, f"weights of tenant {name!r}"
                assert math.isclose(sum(weights), 1.0), f"weights of tenant {name!r}"

    def _tenant(self, key: str) -> _Tenant:
        one = self._tenants.get(key)
        if one is None:
            if len(self._tenants) >= MAX_TENANTS:
                self._forget_one()
            one = self._tenants[key] = _Tenant()
        self._tenants.move_to_end(key)
        return one

    def _forget_one(self) -> None:
        _key, gone = self._tenants.popitem(last=False)
        self._num_requests -= len(gone.history)

    def _of_everybody(self) -> Quantiles:
        return self._everybody.quantiles() if len(self._everybody) else FIRST_GUESS

    def _predictions(self, history: History, prompt_tokens: int) -> list[Quantiles]:
        """What each of `PREDICTORS` says."""
        everybody = self._of_everybody()
        alike = [
            self._everybody.near(prompt_tokens, num) if len(self._everybody) >= num else everybody for num in ALIKE
        ]
        if not len(history):
            return [everybody, everybody, alike[-1], alike[-1], *alike]
        own, newest, num = history.quantiles(), history.newest(), len(history)
        num_near = min(NEAR, max(1, num // 2))  # half of them at most: the nearest of a few are all of them
        near = history.near(prompt_tokens, num_near)
        return [
            own, _pulled(own, everybody, num), _pulled(near, own, num_near), _pulled(newest.quantiles, own, newest.num),
            *alike,
        ]  # fmt: skip


def pinball(quantile: float, predicted: float, length: float) -> float:
    """Pinball loss of one predicted quantile."""
    missing = length - predicted
    return quantile * missing if missing >= 0.0 else (quantile - 1.0) * missing


def _losses(quantile: float, predictions: Sequence[float], length: float, scale: float) -> list[float]:
    """Pinball losses of one quantile's predictions, in units of `scale`: `pinball` without the calls."""
    over = quantile - 1.0
    return [
        (quantile * missing if missing >= 0.0 else over * missing) / scale
        for missing in [length - predicted for predicted in predictions]
    ]


def quantiles_of(rising: Sequence[float]) -> Quantiles:
    """Quantiles of lengths that rise and all count alike, linear between two of them."""
    return tuple(
        [rising[below] + part * (rising[above] - rising[below]) for below, above, part in _places(len(rising))]
    )


@lru_cache(maxsize=2 * EVERYBODY)
def _places(num: int) -> tuple[tuple[int, int, float], ...]:
    """Of each quantile of so many lengths: the places that it lies between, and how far from the first."""
    places = []
    for quantile in QUANTILES:
        below, part = divmod(quantile * (num - 1), 1.0)
        places.append((int(below), min(int(below) + 1, num - 1), part))
    return tuple(places)


def _allowed(rising: Sequence[float], max_tokens: int | None) -> Quantiles:
    most = math.inf if max_tokens is None else float(max_tokens)
    return tuple([min(max(length, 1.0), most) for length in rising])


def _pulled(quantiles: Quantiles, towards: Quantiles, num: int) -> Quantiles:
    share = num / (num + SHRINKAGE)
    rest = 1.0 - share
    return tuple([share * one + rest * other for one, other in zip(quantiles, towards, strict=True)])


def _reweighted(weights: list[float], losses: list[float]) -> list[float]:
    least = min(losses)
    scaled = [weight * math.exp(-RATE * (loss - least)) for weight, loss in zip(weights, losses, strict=True)]
    total = sum(scaled)
    return [(1.0 - SHARE) * one / total + SHARE * prior for one, prior in zip(scaled, PRIOR, strict=True)]


def _key(tenant: str, kind: str) -> str:
    return f"{tenant}\0{kind}" if kind else tenant


def _check_tokens(name: str, value: object, *, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MAX_TOKENS:
        raise ValueError(f"{name} must be a whole number of {least} to {MAX_TOKENS}: it is {value!r}.")
