"""What a workload is, for a terminal and as figures: rates, lengths, tenants' skew, prefixes, the rate over time."""

from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from cost_service.traces import TraceRequest

Array = npt.NDArray[np.float64]
BINS, PLOT_ROWS = 60, 6
BARS = " ▁▂▃▄▅▆▇█"
TOP_TENANTS = 5
PROMPT = "prompt tokens"


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What a workload is."""

    times_s: Array
    lengths: Mapping[str, npt.NDArray[np.int64]]
    num_requests: Counter[str]
    num_tokens: Counter[str]
    shared_tokens: int | None
    """Of prompts, that were in an earlier one; None where no prefix is known."""

    dropped: Mapping[str, int]

    @classmethod
    def of(cls, requests: Iterable[TraceRequest], dropped: Mapping[str, int] | None = None) -> Self:
        """Sum up requests, which are read once, and what was dropped of them by reason.

        Raises:
            ValueError: There is none.
        """
        arrivals, prompts, outputs, shared = array("d"), array("q"), array("q"), 0
        num_requests, num_tokens = Counter[str](), Counter[str]()
        seen: set[int] = set()
        hashed = False
        for request in requests:
            arrivals.append(request.arrival_s)
            prompts.append(request.prompt_tokens)
            outputs.append(request.output_tokens)
            num_requests[request.tenant] += 1
            num_tokens[request.tenant] += request.prompt_tokens + request.output_tokens
            if request.prefix_hashes:
                hashed = True
                known = next(
                    (n for n, one in enumerate(request.prefix_hashes) if one not in seen), len(request.prefix_hashes)
                )
                shared += min(known * request.hash_tokens, request.prompt_tokens)
                seen.update(request.prefix_hashes[known:])
        if not arrivals:
            raise ValueError("The workload has no request.")
        lengths = {PROMPT: np.frombuffer(prompts, np.int64), "output tokens": np.frombuffer(outputs, np.int64)}
        return cls(
            times_s=np.frombuffer(arrivals), lengths=lengths, num_requests=num_requests, num_tokens=num_tokens,
            shared_tokens=shared if hashed else None, dropped=dropped or {},
        )  # fmt: skip

    @property
    def rates(self) -> dict[str, float] | None:
        """Requests and tokens a second, each of the requests with the gap before the next one; None: all come at once."""
        span_s = float(self.times_s[-1] - self.times_s[0])
        if span_s == 0:
            return None
        rate = (len(self.times_s) - 1) / span_s
        return {"requests": rate} | {name: float(values.mean()) * rate for name, values in self.lengths.items()}

    def text(self) -> str:
        """For a terminal."""
        lines = [
            *_rates(self.times_s, self.rates),
            "",
            f"{'':<16}{'mean':>10}{'50 %':>9}{'90 %':>9}{'99 %':>9}{'max':>9}",
            *(_quantiles(name, values) for name, values in self.lengths.items()),
            "",
            *_tenants(self.num_requests, self.num_tokens),
        ]
        if self.shared_tokens is not None:
            share = self.shared_tokens / self.lengths[PROMPT].sum()
            lines.append(f"Shared prefixes: {share:.1%} of prompt tokens were in an earlier prompt")
        if self.dropped:
            told = (f"{number} ({reason})" for reason, number in sorted(self.dropped.items()))
            lines.append("Dropped: " + ", ".join(told))
        return "\n".join([*lines, "", *_plot(self.times_s)])

    def figures(self) -> dict[str, Any]:
        """For a result file."""
        rates = self.rates or {}
        return {
            "requests": len(self.times_s), "span_s": float(self.times_s[-1] - self.times_s[0]),
            **{f"{name.replace(' ', '_')}_per_s": rates.get(name) for name in ("requests", *self.lengths)},
            **{
                name.replace(" ", "_"): {"mean": float(values.mean()), "max": int(values.max())}
                | {f"p{percent}": float(np.percentile(values, percent)) for percent in (50, 90, 99)}
                for name, values in self.lengths.items()
            },
            "tenants": {
                name: {"requests": self.num_requests[name], "tokens": tokens}
                for name, tokens in sorted(self.num_tokens.items())
            },
            "shared_prompt_tokens": self.shared_tokens, "dropped_requests": dict(sorted(self.dropped.items())),
        }  # fmt: skip


def _rates(times_s: Array, rates: Mapping[str, float] | None) -> list[str]:
    if rates is None:
        return [f"{len(times_s)} requests, all at once"]
    told = ", ".join(f"{rate:.4g} {name}/s" for name, rate in rates.items())
    gaps_s = np.diff(times_s)
    return [
        f"{len(times_s)} requests in {times_s[-1] - times_s[0]:.1f} s: {told}",
        f"Gaps between arrivals: standard deviation / mean {gaps_s.std() / gaps_s.mean():.2f} (a steady beat 0, Poisson 1)",
    ]


def _quantiles(name: str, values: npt.NDArray[np.int64]) -> str:
    shown = (f"{value:>9.0f}" for value in (*np.quantile(values, (0.5, 0.9, 0.99)), values.max()))
    return f"{name:<16}{values.mean():>10.1f}{''.join(shown)}"


def _tenants(num_requests: Counter[str], num_tokens: Counter[str]) -> list[str]:
    amounts = np.sort(np.array(list(num_tokens.values()), dtype=np.float64))[::-1]
    num = len(amounts)
    if num == 1:
        return [f"One tenant, {next(iter(num_tokens))}"]
    top = -(-num // 10)
    lines = [
        f"{num} tenants; of all tokens the top 10 % ({top}) have {amounts[:top].sum() / amounts.sum():.1%}; "
        f"Gini {gini(amounts):.2f}",
        f"{'tenant':<16}{'requests':>10}{'tokens':>12}{'share':>9}",
    ]
    for tenant, tokens in sorted(num_tokens.items(), key=lambda item: (-item[1], item[0]))[:TOP_TENANTS]:
        lines.append(f"{tenant:<16}{num_requests[tenant]:>10}{tokens:>12}{tokens / amounts.sum():>9.1%}")
    return lines


def gini(amounts: Sequence[float] | Array) -> float:
    """Gini coefficient: 0 when all have the same, near 1 when one has all."""
    ranked = np.sort(np.asarray(amounts, dtype=np.float64))
    places = np.arange(1, len(ranked) + 1)
    return float(((2 * places - len(ranked) - 1) * ranked).sum() / (len(ranked) * ranked.sum()))


def _plot(times_s: Array) -> list[str]:
    """Rate over time, `BINS` columns wide, in eighths of a row."""
    span_s = float(times_s[-1] - times_s[0])
    if span_s == 0:
        return []
    counts, edges = np.histogram(times_s, bins=BINS)
    rates = counts / (edges[1] - edges[0])
    eighths = np.rint(rates / rates.max() * PLOT_ROWS * 8).astype(int)
    rows = ["".join(BARS[min(max(height - 8 * row, 0), 8)] for height in eighths) for row in reversed(range(PLOT_ROWS))]
    labels = [f"{rates.max():>9.3g} ", *[" " * 10] * (PLOT_ROWS - 2), f"{0:>9} "]
    start, end = f"{times_s[0]:.0f} s", f"{times_s[-1]:.0f} s"
    return [
        "Requests/s over time",
        *(label + row for label, row in zip(labels, rows, strict=True)),
        " " * 10 + start + f"{end:>{BINS - len(start)}}",
    ]
