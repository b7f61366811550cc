"""Requests that are made up: `synthetic:KEY=VALUE,...`, one or several streams of them, from a seed.

Streams are parted by `/`; what a later one leaves out is as in the one before it, except that its tenants are others:
`synthetic:tenants=1,rate=1.5,duration=360/rate=3`. Streams that name the same tenant one after another are its phases:
`synthetic:tenant=a,rate=1,duration=60/tenant=a,rate=9,start=60`. `synthetic:experiment=NAME` stands for several streams
(`cluster.experiments`), and further keys hold for each of them.

Rules:
- Pure: no clock, no file. All chance of a stream comes from one `random.Random`: a source gives the same requests anywhere.
- Requests come sorted by arrival, lazily, so that a source may be of any length.
"""

import heapq
import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from hashlib import blake2b
from itertools import accumulate, islice
from operator import attrgetter
from typing import Any, Self

from cluster.arrivals import Arrivals
from cluster.prompts import check_vocab, draw_token_ids
from cost_service.traces import MAX_TOKENS, TraceRequest

SCHEME = "synthetic:"
DEFAULT_REQUESTS, DEFAULT_TENANTS = 60, 4
SHAPES = ("lognormal", "uniform")
PREFIX_BLOCK_TOKENS = 64
LEAST_RATE = 1e-9
"""Requests per second: one in thirty years. Times of arrival stay finite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """Requests that share a rate and a distribution of lengths; the fields are the keys of a source's text."""

    requests: int | None = None
    """At most so many."""

    duration: float | None = None
    """Seconds from the start on; without it and `requests` a stream has no end."""

    start: float = 0.0
    rate: float = 8.0
    """Arrivals per second of all its tenants together while it is on; 0 or inf: all at once."""

    rate_end: float | None = None
    cv: float = 1.0
    on: float | None = None
    off: float | None = None
    """See `cluster.arrivals`; for as long as it is on where only `on` is given."""

    tenant: str = ""
    """Name; followed by a number where there are several. Without it they are numbered over all streams."""

    tenants: int | None = None
    """How many there are: without it one under a name, four under none."""

    zipf: float = 0.0
    """Exponent of the tenants' shares of the requests; 0: equal ones."""

    weight: float = 1.0
    """Of each of the tenants, where admission is fair."""

    lengths: str = "lognormal"
    """`lognormal`, cut to minimum and maximum, or `uniform` between them."""

    prompt_mean: float = 60.0
    """Tokens, before the cut; the same holds for `output_mean`."""

    prompt_min: int = 1
    prompt_max: int = 120
    output_mean: float = 80.0
    output_min: int = 1
    output_max: int = 140
    spread: float = 0.5
    """Standard deviation of the logarithm of a length; 0: every length is its mean."""

    prefixes: int = 0
    """Beginnings that each tenant's prompts have, each prompt one of them before its own tokens; 0: none share anything."""

    prefix_tokens: int = 1024
    """Tokens of such a beginning."""

    vocab: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("requests", "tenants"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise ValueError(f"Workload key {name} must be at least 1.")
        for name in ("rate", "rate_end", "start", "zipf", "spread", "cv"):
            if (value := getattr(self, name)) is not None and not value >= 0:  # NaN too
                raise ValueError(f"Workload key {name} must not be negative.")
        for name in ("start", "zipf", "spread", "cv", "rate_end", "weight", "duration", "on", "off"):
            if (value := getattr(self, name)) is not None and math.isinf(value):
                raise ValueError(f"Workload key {name} must be finite.")
        for name in ("weight", "duration", "on", "off"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"Workload key {name} must be above 0.")
        self._check_together()
        self._check_lengths()
        check_vocab(self.vocab)

    def _check_together(self) -> None:
        for name in ("rate", "rate_end"):
            if 0 < (getattr(self, name) or 0.0) < LEAST_RATE:
                raise ValueError(f"Workload key {name} must be 0, or at least {LEAST_RATE:g}.")
        if self.cv and not 0.01 <= self.cv <= 100:
            raise ValueError("Workload key cv must be 0, or between 0.01 and 100.")
        if self.off is not None and self.on is None:
            raise ValueError("Workload key off needs the key on.")
        if self.rate_end is not None and (self.duration is None or not 0 < max(self.rate, self.rate_end) < math.inf):
            raise ValueError("Workload key rate_end needs a duration and finite rates, one of them above 0.")
        if self.arrivals.at_once and self.requests is None:
            raise ValueError("Workload key rate must be above 0 and finite, or requests says how many come at once.")

    def _check_lengths(self) -> None:
        if self.lengths not in SHAPES:
            raise ValueError(f"Workload key lengths must be one of {', '.join(SHAPES)}.")
        if self.spread > 10:
            raise ValueError("Workload key spread must be at most 10.")
        for name in ("prompt", "output"):
            least, mean, longest = (getattr(self, f"{name}_{what}") for what in ("min", "mean", "max"))
            if longest > MAX_TOKENS:
                raise ValueError(f"Workload key {name}_max must be at most {MAX_TOKENS}.")
            if not 1 <= least <= longest:
                raise ValueError(f"Workload key {name}_min must be between 1 and {name}_max ({longest}).")
            if self.lengths == "lognormal" and not least <= mean <= longest:
                mend = f"raise {name}_max as well" if mean > longest else f"raise it, or lower {name}_min"
                raise ValueError(
                    f"Workload key {name}_mean must be between {least} and {name}_max ({longest}): {mend}."
                )
        if not 0 <= self.prefixes <= 1_000_000:
            raise ValueError("Workload key prefixes must be from 0 up to 1000000.")
        if self.prefixes and not 1 <= self.prefix_tokens <= MAX_TOKENS - self.prompt_max:
            raise ValueError(f"Workload key prefix_tokens must be from 1 up to {MAX_TOKENS} less prompt_max.")

    @property
    def arrivals(self) -> Arrivals:
        """Its times of arrival."""
        return Arrivals(
            rate=self.rate, rate_end=self.rate_end, cv=self.cv, start_s=self.start, duration_s=self.duration,
            on_s=self.on, off_s=(self.on or 0.0) if self.off is None else self.off,
        )  # fmt: skip

    @property
    def num_tenants(self) -> int:
        """How many tenants it has."""
        return self.tenants or (1 if self.tenant else DEFAULT_TENANTS)

    def tenant_names(self, first: int = 0) -> list[str]:
        """Their names; where there is none, `tenant-N` with numbers from `first` on."""
        if self.tenant and self.num_tenants == 1:
            return [self.tenant]
        base, first = (self.tenant, 0) if self.tenant else ("tenant", first)
        return [f"{base}-{number}" for number in range(first, first + self.num_tenants)]

    def generate(self, names: Sequence[str], rng: random.Random) -> Iterator[TraceRequest]:
        """Yield its requests, sorted by arrival, with prompts of made-up tokens."""
        shares = zipf_shares(len(names), self.zipf)
        for arrival_s in islice(self.arrivals.times_s(rng), self.requests):
            number = rng.choices(range(len(names)), cum_weights=shares)[0] if self.zipf else rng.randrange(len(names))
            prompt_tokens = self._length(rng, self.prompt_mean, self.prompt_min, self.prompt_max)
            output_tokens = self._length(rng, self.output_mean, self.output_min, self.output_max)
            request = TraceRequest(
                arrival_s=arrival_s,
                tenant=names[number],
                prompt_tokens=prompt_tokens,
                output_tokens=output_tokens,
                prompt_token_ids=tuple(draw_token_ids(rng, prompt_tokens, self.vocab)),
            )
            yield self._begun(request, rng.randrange(self.prefixes)) if self.prefixes else request

    def _begun(self, request: TraceRequest, number: int) -> TraceRequest:
        """The request with a beginning of its tenant's before its prompt."""
        name = f"{self.seed}/{request.tenant}/{number}"
        blocks = range(-(-self.prefix_tokens // PREFIX_BLOCK_TOKENS))
        hashes = (blake2b(f"{name}/{block}".encode(), digest_size=6).digest() for block in blocks)
        own = draw_token_ids(random.Random(name), self.prefix_tokens, self.vocab)
        return replace(
            request,
            prompt_tokens=self.prefix_tokens + request.prompt_tokens,
            prefix_hashes=tuple(int.from_bytes(each) for each in hashes),
            hash_tokens=PREFIX_BLOCK_TOKENS,
            prompt_token_ids=(*own, *request.prompt_token_ids),
        )

    def _length(self, rng: random.Random, mean: float, least: int, longest: int) -> int:
        if self.lengths == "uniform":
            return rng.randint(least, longest)
        length = rng.lognormvariate(math.log(mean) - self.spread**2 / 2, self.spread)
        return min(max(round(length), least), longest)


def zipf_shares(num: int, exponent: float) -> list[float]:
    """Cumulative shares of `num` tenants, the k-th one's proportional to k ** -exponent; their sum is not 1."""
    return list(accumulate((place + 1) ** -exponent for place in range(num)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Synthetic:
    """A source of made-up requests."""

    streams: tuple[Stream, ...]

    def __post_init__(self) -> None:
        for stream in self.streams:
            if stream.requests is None and stream.duration is None:
                raise ValueError("Every stream needs the workload key requests or duration.")
        self.weights()

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `synthetic:...`; keys left out have their defaults.

        Raises:
            ValueError: An unknown or repeated key, or a value that does not fit.
        """
        parts = [read_keys(part) for part in text.removeprefix(SCHEME).split("/")]
        if "experiment" in parts[0]:
            from cluster.experiments import experiment

            if len(parts) > 1:
                raise ValueError("Workload key experiment stands for all streams: write none after it.")
            name = parts[0].pop("experiment")
            return cls(streams=tuple(replace(stream, **parts[0]) for stream in experiment(name)))
        streams: list[Stream] = []
        for number, part in enumerate(parts):
            if "experiment" in part:
                raise ValueError("Workload key experiment stands for all streams: write none before it.")
            if number == 0 and not {"requests", "duration"} & part.keys():
                part["requests"] = DEFAULT_REQUESTS
            streams.append(replace(streams[-1], **{"tenant": ""} | part) if streams else Stream(**part))
        return cls(streams=tuple(streams))

    def requests(self, seed: int = 0) -> Iterator[TraceRequest]:
        """Yield the requests of all streams, sorted by arrival; `seed` is added to theirs."""
        made = [
            # The first stream's seed alone: a source of one stream has been that since before there were several.
            stream.generate(
                names, random.Random(stream.seed + seed if number == 0 else f"{stream.seed + seed}/{number}")
            )
            for number, (stream, names) in enumerate(self._named())
        ]
        return heapq.merge(*made, key=attrgetter("arrival_s"))

    def weights(self) -> dict[str, float]:
        """Weights of all tenants.

        Raises:
            ValueError: A tenant has two.
        """
        weights: dict[str, float] = {}
        for stream, names in self._named():
            for name in names:
                if weights.setdefault(name, stream.weight) != stream.weight:
                    raise ValueError(f"Workload key weight differs between streams of the tenant {name}.")
        return weights

    @property
    def vocab(self) -> int:
        """Token ids are below it."""
        return max(stream.vocab for stream in self.streams)

    def _named(self) -> Iterator[tuple[Stream, list[str]]]:
        first = 0
        for stream in self.streams:
            yield stream, stream.tenant_names(first)
            first += 0 if stream.tenant else stream.num_tenants


def read_keys(text: str) -> dict[str, Any]:
    """Read `KEY=VALUE,...` with the keys of a `Stream`, and `experiment`.

    Raises:
        ValueError: An unknown or repeated key, or no number where one must be.
    """
    kinds: dict[str, Any] = {"experiment": str} | {field.name: field.type for field in fields(Stream)}
    values: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        key, _, value = part.partition("=")
        if key not in kinds:
            raise ValueError(f"Unknown workload key {key!r}: use one of {', '.join(kinds)}.")
        if key in values:
            raise ValueError(f"Workload key {key} appears twice: remove one.")
        values[key] = _value(key, value, kinds[key])
    return values


def _value(key: str, value: str, kind: Any) -> Any:
    if kind is str:
        if not value:
            raise ValueError(f"Workload key {key} must not be empty.")
        return value
    if kind in (int, int | None):
        if not re.fullmatch(r"[+-]?[0-9]{1,18}", value):
            raise ValueError(f"Workload key {key} must be a whole number, such as {key}=4.")
        return int(value)
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"Workload key {key} must be a number, such as {key}=4.") from None
