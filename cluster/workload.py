"""Requests of a benchmark: who sends what when, from a source such as `synthetic:requests=60,rate=8`, and how it went.

Rules:
- Pure: no clock, no file. All chance comes from one `random.Random(seed)`, so a source gives the same requests anywhere.
- Times are seconds after the start of a run; requests come sorted by arrival.
"""

import math
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Self

SCHEME = "synthetic:"
FIRST_TOKEN_ID = 3
"""Token ids below it are special (padding, start, end) in most vocabularies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestSpec:
    """One request, before any engine has seen it."""

    request_id: str
    tenant: str
    arrival_s: float
    prompt_token_ids: tuple[int, ...]
    output_tokens: int
    """Tokens to generate, neither more nor fewer."""

    @property
    def num_tokens(self) -> int:
        """Prompt and output."""
        return len(self.prompt_token_ids) + self.output_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """What happened to one request."""

    request_id: str
    tenant: str
    arrival_s: float
    first_token_s: float | None
    finish_s: float | None
    prompt_tokens: int
    output_tokens: int
    """Asked for."""

    delivered_tokens: int
    """Delivered; fewer than asked for only when the run ended first."""

    swaps: int = 0
    recomputes: int = 0

    def __post_init__(self) -> None:
        assert (self.first_token_s is None) == (self.delivered_tokens == 0), f"{self} has tokens without a time"
        assert self.finish_s is None or self.delivered_tokens == self.output_tokens, f"{self} finished with tokens left"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """What one run of one engine gave."""

    records: list[RequestRecord]
    run_end_s: float
    peak_kv_blocks: int
    computed_tokens: int
    """Tokens that went through the model, recomputed ones included."""

    scheduler: dict[str, float]
    """Steps, those of them under the guard, and microseconds per step in the scheduler: over all, and over the steps with
    the most requests running."""

    preemption_costs: dict[str, dict[str, float]]
    """By action how many were measured, and the seconds of engine time that they were predicted to cost and did."""

    tokens: dict[str, list[int]]
    """Output token ids by request."""

    @classmethod
    def of(cls, mapping: Mapping[str, Any]) -> Self:
        """Read what `asdict` has written."""
        return cls(**{**mapping, "records": [RequestRecord(**record) for record in mapping["records"]]})


@dataclass(frozen=True, slots=True, kw_only=True)
class SyntheticSource:
    """Poisson arrivals of random prompts; lengths are log-normal, cut to their maximum."""

    requests: int = 60
    rate: float = 8.0
    """Arrivals per second of all tenants together; 0 or inf: all at once."""

    tenants: int = 4
    """Each request belongs to one of them with equal chance."""

    prompt_mean: float = 60.0
    """Tokens, before the cut; the same holds for `output_mean`."""

    prompt_max: int = 120
    output_mean: float = 80.0
    output_max: int = 140
    spread: float = 0.5
    """Standard deviation of the logarithm of a length; 0: every length is its mean."""

    vocab: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("requests", "tenants"):
            if getattr(self, name) < 1:
                raise ValueError(f"Workload key {name} must be at least 1.")
        for name in ("rate", "spread"):
            if not getattr(self, name) >= 0:  # NaN too
                raise ValueError(f"Workload key {name} must not be negative.")
        if math.isinf(self.spread):
            raise ValueError("Workload key spread must be finite.")
        for name in ("prompt", "output"):
            mean, longest = getattr(self, f"{name}_mean"), getattr(self, f"{name}_max")
            if not 1 <= mean <= longest:
                raise ValueError(f"Workload key {name}_mean must be between 1 and {name}_max ({longest}).")
        if self.vocab <= FIRST_TOKEN_ID:
            raise ValueError(f"Workload key vocab must be above {FIRST_TOKEN_ID}.")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `synthetic:KEY=VALUE,...`; keys left out have their defaults.

        Raises:
            ValueError: Another source, an unknown or repeated key, or a value that does not fit.
        """
        if not text.startswith(SCHEME):
            raise ValueError(f"Workload {text!r} is not known: write {SCHEME}KEY=VALUE,... .")
        kinds = {field.name: field.type for field in fields(cls)}
        values: dict[str, int | float] = {}
        for part in filter(None, text.removeprefix(SCHEME).split(",")):
            key, _, value = part.partition("=")
            if key not in kinds:
                raise ValueError(f"Unknown workload key {key!r}: use one of {', '.join(kinds)}.")
            if key in values:
                raise ValueError(f"Workload key {key} appears twice: remove one.")
            values[key] = _number(key, value, whole=kinds[key] is int)
        return cls(**values)  # type: ignore[arg-type]

    def generate(self) -> tuple[RequestSpec, ...]:
        """Return the requests, sorted by arrival; the first arrives at 0."""
        rng = random.Random(self.seed)
        at_once = self.rate == 0 or math.isinf(self.rate)
        arrival_s = 0.0
        requests = []
        for number in range(self.requests):
            if number and not at_once:
                arrival_s += rng.expovariate(self.rate)
            tenant = f"tenant-{rng.randrange(self.tenants)}"
            num_prompt = _length(rng, self.prompt_mean, self.prompt_max, self.spread)
            num_output = _length(rng, self.output_mean, self.output_max, self.spread)
            prompt = tuple(rng.randrange(FIRST_TOKEN_ID, self.vocab) for _ in range(num_prompt))
            requests.append(
                RequestSpec(
                    request_id=f"request-{number}",
                    tenant=tenant,
                    arrival_s=arrival_s,
                    prompt_token_ids=prompt,
                    output_tokens=num_output,
                )
            )
        return tuple(requests)


def synthetic(text: str = SCHEME, **settings: int | float) -> tuple[RequestSpec, ...]:
    """Return the requests of a source, with single settings given by keyword instead.

    Raises:
        ValueError: The text or a setting is wrong.
    """
    source = SyntheticSource.parse(text)
    known = [field.name for field in fields(SyntheticSource)]
    if unknown := sorted(set(settings) - set(known)):
        raise ValueError(f"Unknown workload key {unknown[0]!r}: use one of {', '.join(known)}.")
    return replace(source, **settings).generate()  # type: ignore[arg-type]


def _number(key: str, value: str, *, whole: bool) -> int | float:
    if whole:
        if not re.fullmatch(r"[+-]?[0-9]{1,18}", value):
            raise ValueError(f"Workload key {key} must be a whole number, such as {key}=4.")
        return int(value)
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"Workload key {key} must be a number, such as {key}=4.") from None


def _length(rng: random.Random, mean: float, longest: int, spread: float) -> int:
    length = rng.lognormvariate(math.log(mean) - spread**2 / 2, spread)
    return min(max(round(length), 1), longest)
