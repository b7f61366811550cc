"""Goal: a description says of a workload what can be counted in it by hand."""

from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.workload_summary import BINS, Summary, gini
from cost_service.traces import TraceRequest


def describe(requests: Sequence[TraceRequest], dropped: Mapping[str, int] | None = None) -> str:
    return Summary.of(requests, dropped).text()


def request(
    arrival_s: float, tenant: str = "a", prompt: int = 10, output: int = 30, hashes: tuple[int, ...] = ()
) -> TraceRequest:
    return TraceRequest(
        arrival_s=arrival_s, tenant=tenant, prompt_tokens=prompt, output_tokens=output, prefix_hashes=hashes
    )


def test_rates_and_lengths_are_those_of_the_requests() -> None:
    text = describe([request(at_s, prompt=length, output=1) for at_s, length in enumerate(range(10, 31))])
    assert "21 requests in 20.0 s: 1 requests/s, 20 prompt tokens/s, 1 output tokens/s" in text
    assert "standard deviation / mean 0.00" in text
    assert "prompt tokens         20.0       20       28       30       30" in text


def test_figures_are_those_of_the_text() -> None:
    """20 gaps of a second: rates are those of 20 requests, and lengths those of all 21."""
    figures = Summary.of(
        [request(n, prompt=length, output=1) for n, length in enumerate(range(10, 31))], {"order": 2}
    ).figures()
    assert (figures["requests"], figures["span_s"]) == (21, 20.0)
    rates = [figures[f"{name}_per_s"] for name in ("requests", "prompt_tokens", "output_tokens")]
    assert rates == pytest.approx([1, 20, 1])
    assert figures["prompt_tokens"] == pytest.approx({"mean": 20, "max": 30, "p50": 20, "p90": 28, "p99": 29.8})
    assert figures["tenants"] == {"a": {"requests": 21, "tokens": 441}}
    assert figures["dropped_requests"] == {"order": 2}
    at_once = Summary.of([request(5.0), request(5.0)]).figures()
    assert (at_once["span_s"], at_once["requests_per_s"], at_once["shared_prompt_tokens"]) == (0.0, None, None)


def test_tenants_are_ranked_by_their_tokens() -> None:
    requests = [request(n, f"t{n % 10}", prompt=1000 if n % 10 == 3 else 10, output=10) for n in range(100)]
    lines = describe(requests).splitlines()
    (place,) = [n for n, line in enumerate(lines) if line.startswith("tenant ")]
    assert lines[place - 1].startswith("10 tenants; of all tokens the top 10 % (1) have 84.9%")
    assert lines[place + 1].split() == ["t3", "10", "10100", "84.9%"]
    assert len([line for line in lines if line.startswith("t") and line[1].isdigit()]) == 5


def test_shared_prefixes_count_the_tokens_that_an_earlier_prompt_had() -> None:
    requests = [
        request(0, prompt=1000, hashes=(1, 2)), request(1, prompt=1100, hashes=(1, 2, 3)), request(2, prompt=900),
    ]  # fmt: skip
    assert f"Shared prefixes: {1024 / 3000:.1%} of prompt tokens" in describe(requests)
    assert "Shared prefixes" not in describe(requests[2:])


def test_the_plot_is_highest_where_the_rate_is() -> None:
    requests = [request(n / 10) for n in range(600)] + [request(60 + n / 100) for n in range(6000)]
    lines = describe(requests).splitlines()
    plot = lines[lines.index("Requests/s over time") + 1 :]
    top, bottom = plot[0][10:], plot[-2][10:]
    assert set(top[: BINS // 2 - 1]) == {" "}
    assert set(top[BINS // 2 + 1 :]) <= {"█", "▇"}
    assert " " not in bottom
    assert plot[-1].split() == ["0", "s", "120", "s"]


def test_requests_at_once_have_no_rate() -> None:
    text = describe([request(5.0), request(5.0)])
    assert text.startswith("2 requests, all at once")
    assert "over time" not in text


def test_what_was_dropped_is_told() -> None:
    assert "Dropped: 2 (context), 1 (order)" in describe([request(0)], {"order": 1, "context": 2})
    assert "Dropped" not in describe([request(0)], {})


def test_no_request_is_refused() -> None:
    with pytest.raises(ValueError, match="no request"):
        describe([])


def test_gini_is_0_for_equal_shares_and_near_1_where_one_has_all() -> None:
    assert gini([5, 5, 5, 5]) == pytest.approx(0)
    assert gini([0] * 99 + [7]) == pytest.approx(0.99)
    assert gini([1, 3]) == pytest.approx(0.25)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=30))
def test_gini_is_half_the_mean_difference_over_the_mean(amounts: list[int]) -> None:
    differences = sum(abs(a - b) for a in amounts for b in amounts) / len(amounts) ** 2
    assert gini(amounts) == pytest.approx(differences / 2 / (sum(amounts) / len(amounts)))
