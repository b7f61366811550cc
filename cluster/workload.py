"""The requests that a command serves or simulates: a source, changed as its options say.

Changes are made in this order: of the source a window is taken, and of that the first requests; they are given tenants,
scaled in length and in rate; a flood is added at its own rate and lengths; requests that are too long are cut.
"""

import argparse
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from cluster.prompts import RequestSpec, with_prompts
from cluster.synthetic import LEAST_RATE, SCHEME, Stream, Synthetic, read_keys
from cluster.workload_changes import (
    at_scaled_rate,
    cut,
    mean_rate,
    with_flood,
    with_scaled_lengths,
    with_tenants,
    within_context,
    within_window,
)
from cost_service.traces import SOURCES, WITHOUT_TENANTS, BadLineError, TraceRequest, read_trace

STOP, DROP = "stop", "drop"
FLOOD = Stream(tenant="flood", cv=1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Requests of a source with changes; every reading gives the same. The fields are the options of the commands."""

    trace: str
    """`SOURCE:PATH` or `synthetic:KEY=VALUE,...`."""

    window: str | None = None
    rate_scale: float | None = None
    rate: float | None = None
    first: int | None = None
    length_scale: float | None = None
    max_tokens: int | None = None
    tenants: int | None = None
    tenant_skew: float | None = None
    flood: str | None = None
    bad_requests: str = STOP
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rate_scale", "rate", "length_scale", "first", "tenants"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} must be above 0 and finite.")
            if value is not None and "rate" in name and value < LEAST_RATE:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {LEAST_RATE:g}.")
        if self.rate_scale is not None and self.rate is not None:
            raise ValueError("--rate-scale and --rate exclude each other: leave one of them out.")
        if self.max_tokens is not None and self.max_tokens < 2:
            raise ValueError("--max-tokens must be at least 2: one for the prompt, one for the output.")
        if self.tenant_skew is not None and not 0 <= self.tenant_skew <= 10:
            raise ValueError("--tenant-skew must be between 0 and 10.")
        if self.tenant_skew is not None and self.tenants is None:
            raise ValueError("--tenant-skew needs --tenants: say how many there are.")
        if self.bad_requests not in (STOP, DROP):
            raise ValueError(f"--bad-requests must be {STOP} or {DROP}.")
        if not self.trace.startswith(SCHEME) and self.trace.partition(":")[0] not in SOURCES:
            names = ", ".join(SOURCES)
            raise ValueError(
                f"--trace {self.trace!r} must be SOURCE:PATH with a source of {names}, or {SCHEME}KEY=VALUE,..."
            )
        self._bounds_s()
        self.weights()

    def requests(
        self, dropped: Counter[str] | None = None, *, context_tokens: int | None = None
    ) -> Iterator[TraceRequest]:
        """Yield the requests in the order of arrival; what `bad_requests` lets leave out is counted by reason in `dropped`.

        Requests must fit into `context_tokens`, where it is given.

        Raises:
            ValueError: An option does not fit the trace, something in the trace is wrong, or no request is left.
        """
        counted = None if self.bad_requests == STOP else Counter() if dropped is None else dropped
        requests = self._scaled_in_length(counted)
        if (factor := self._rate_factor()) != 1:
            requests = at_scaled_rate(requests, factor)
        if flood := self._flood():
            if not any(one.arrival_s / factor > flood.start for one in self._scaled_in_length(self._uncounted())):
                raise ValueError(
                    "--flood begins when the last request has come: lower its start, or give another --trace."
                )
            requests = with_flood(requests, flood, seed=self.seed)
        if self.max_tokens:
            requests = cut(requests, self.max_tokens)
        if context_tokens:
            requests = within_context(requests, context_tokens, counted, name=self.source_name)
        first = next(requests, None)
        if first is None:
            raise ValueError("No request is left of the --trace: widen its --window, or see what is dropped.")
        return chain([first], requests)

    def prompted(
        self, vocab: int, dropped: Counter[str] | None = None, *, context_tokens: int | None = None
    ) -> tuple[RequestSpec, ...]:
        """The requests with prompts of token ids below `vocab`, for real engines.

        Raises:
            ValueError: As `requests`, or the source's own token ids are not below `vocab`.
        """
        if self.source_vocab > vocab:
            needed = f"The model's vocab_size is {vocab} and the workload needs {self.source_vocab}"
            raise ValueError(f"{needed}: lower the workload key vocab.")
        requests = self.requests(dropped, context_tokens=context_tokens)
        return tuple(with_prompts(requests, vocab=vocab, seed=self.seed))

    def weights(self) -> Mapping[str, float]:
        """Weights of tenants that the source itself states; all others have 1.

        Raises:
            ValueError: A tenant has two.
        """
        synthetic, flood = self._synthetic(), self._flood()
        weights = synthetic.weights() if synthetic else {}
        if flood is None:
            return weights
        for tenant in flood.tenant_names():
            if weights.setdefault(tenant, flood.weight) != flood.weight:
                raise ValueError(
                    f"--flood must have the weight of its tenant {tenant}: add weight={weights[tenant]:g}."
                )
        return weights

    @property
    def source_vocab(self) -> int:
        """Token ids that the source itself makes up are below it; 0: it makes none up."""
        synthetic, flood = self._synthetic(), self._flood()
        return max(synthetic.vocab if synthetic else 0, flood.vocab if flood else 0)

    @property
    def source_name(self) -> str:
        """The source; of a trace's path only the last part."""
        source, _, path = self.trace.partition(":")
        return self.trace if self._synthetic() else f"{source}:{Path(path).name}"

    def as_report(self) -> dict[str, Any]:
        """What is given, as it stands in a result file."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        changed = {field.name: given[field.name] for field in fields(self) if given[field.name] != field.default}
        return changed | {"trace": self.source_name}

    def _scaled_in_length(self, dropped: Counter[str] | None) -> Iterator[TraceRequest]:
        """The source with all changes but those of time and number."""
        synthetic = self._synthetic()
        requests = synthetic.requests(self.seed) if synthetic else _with_choice(read_trace(self.trace, dropped))
        if bounds_s := self._bounds_s():
            requests = within_window(requests, *bounds_s)
        requests = islice(requests, self.first)
        skew = 1.0 if self.tenant_skew is None else self.tenant_skew
        if self.tenants or (not synthetic and self.trace.partition(":")[0] in WITHOUT_TENANTS):
            requests = with_tenants(requests, self.tenants or 1, zipf=skew, seed=self.seed)
        if self.length_scale:
            requests = with_scaled_lengths(requests, self.length_scale)
        return requests

    def _rate_factor(self) -> float:
        if self.rate is None:
            return self.rate_scale or 1.0
        return self.rate / mean_rate(self._scaled_in_length(self._uncounted()))

    def _uncounted(self) -> Counter[str] | None:
        """Where a reading ahead counts what it drops: nowhere that anybody looks."""
        return None if self.bad_requests == STOP else Counter()

    def _bounds_s(self) -> tuple[float, float] | None:
        if self.window is None:
            return None
        try:
            start, end = (float(bound) for bound in self.window.split(":"))
        except ValueError:
            start, end = math.nan, math.nan
        if not 0 <= start < end:
            raise ValueError("--window must be FROM:TO in seconds, such as 600:1200.")
        return start, end

    def _flood(self) -> Stream | None:
        if self.flood is None:
            return None
        keys = read_keys(self.flood)
        if "experiment" in keys:
            raise ValueError("--flood is one stream and no experiment: name its rate and lengths.")
        return replace(FLOOD, **keys)

    def _synthetic(self) -> Synthetic | None:
        return Synthetic.parse(self.trace) if self.trace.startswith(SCHEME) else None


def _with_choice(requests: Iterator[TraceRequest]) -> Iterator[TraceRequest]:
    """The requests of a trace; what is wrong with a line says how such lines are left out."""
    try:
        yield from requests
    except BadLineError as error:
        raise ValueError(f"{error} Or leave such lines out: --bad-requests {DROP}.") from None


def add_workload_arguments(parser: argparse.ArgumentParser, default: str) -> None:
    """Add the options of a workload; `default` is the source that the help names."""
    group = parser.add_argument_group(
        "workload", f"SOURCE is {SCHEME}KEY=VALUE,... or one of {', '.join(SOURCES)} with :PATH"
    )
    group.add_argument("--trace", metavar="SOURCE", help=f"requests (default: {default})")
    group.add_argument("--window", metavar="FROM:TO", help="only what arrives in these seconds, such as 600:1200")
    group.add_argument("--first", type=int, metavar="N", help="only the first N of them")
    group.add_argument("--tenants", type=int, metavar="N", help="tenants of a trace that has none (default: 1)")
    group.add_argument("--tenant-skew", type=float, metavar="S", help="their k-th one's share is as k^-S (default: 1)")
    group.add_argument(
        "--length-scale", type=float, metavar="F", help="factor on lengths, such as 0.05 for CPU engines"
    )
    group.add_argument("--rate-scale", type=float, metavar="F", help="so many times as fast")
    group.add_argument("--rate", type=float, metavar="R", help="so many requests per second on average")
    group.add_argument(
        "--flood",
        metavar="KEY=VALUE,...",
        help="add one more stream, with the keys of synthetic:, such as rate=20,start=60",
    )
    group.add_argument(
        "--max-tokens", type=int, metavar="N", help="cut longer requests; prompt and output keep half of it at least"
    )
    group.add_argument(
        "--bad-requests", choices=(STOP, DROP), default=STOP, help="wrong lines and requests beyond the model's context"
    )
    group.add_argument("--seed", type=int, default=0, help="of all that is made up (default: 0)")
    group.add_argument("--describe", action="store_true", help="say what the workload is, and run nothing")


def workload_of(options: argparse.Namespace, default: str) -> Workload:
    """The workload that the options describe.

    Raises:
        ValueError: An option makes no sense, alone or with others.
    """
    given = {field.name: getattr(options, field.name) for field in fields(Workload)}
    return Workload(**given | {"trace": options.trace or default})
