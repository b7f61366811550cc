"""Goal: every change does what its option says to the requests, keeps their order, and leaves the rest of them alone.

Method: small lists of requests; hypothesis for what must hold of all of them.
"""

from collections import Counter
from collections.abc import Iterable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.synthetic import Stream
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
from cost_service.traces import TraceRequest

LENGTHS = st.integers(1, 5000)


def at(*arrivals_s: float, tenant: str = "a") -> list[TraceRequest]:
    return [TraceRequest(arrival_s=one, tenant=tenant, prompt_tokens=10, output_tokens=20) for one in arrivals_s]


def sized(prompt: int, output: int, *hashes: int, tenant: str = "", line: int = 0) -> TraceRequest:
    return TraceRequest(
        arrival_s=0.0, tenant=tenant, prompt_tokens=prompt, output_tokens=output, prefix_hashes=hashes, line=line
    )


def arrivals_s(requests: Iterable[TraceRequest]) -> list[float]:
    return [request.arrival_s for request in requests]


def endless() -> Iterator[TraceRequest]:
    second = 0
    while True:
        yield from at(second)
        second += 1


def test_a_window_begins_with_its_start_ends_before_its_end_and_counts_from_its_start() -> None:
    assert arrivals_s(within_window(at(0, 2, 3, 4.5, 5, 9), 2, 5)) == [0, 1, 2.5]


def test_nothing_is_read_beyond_a_window() -> None:
    assert arrivals_s(within_window(endless(), 3, 5)) == [0, 1]


def test_twice_the_rate_is_half_the_time() -> None:
    assert arrivals_s(at_scaled_rate(at(0, 2, 5), 2)) == [0, 1, 2.5]


def test_the_mean_rate_is_counted_from_the_first_request_to_the_last() -> None:
    assert mean_rate(at(4, 5, 6)) == 1.0


@pytest.mark.parametrize("requests", [[], at(3), at(3, 3)])
def test_requests_that_come_at_once_have_no_rate(requests: list[TraceRequest]) -> None:
    with pytest.raises(ValueError, match="--rate cannot be met"):
        mean_rate(requests)


def test_lengths_and_blocks_are_scaled_alike_and_never_to_nothing() -> None:
    (request,) = with_scaled_lengths([sized(1024, 3, 7, 8)], 0.1)
    assert (request.prompt_tokens, request.output_tokens, request.hash_tokens) == (102, 1, 51)
    assert request.prefix_hashes == (7, 8)


def test_of_a_request_that_is_too_long_each_part_keeps_what_the_other_leaves() -> None:
    made = [(one.prompt_tokens, one.output_tokens) for one in cut(
        [sized(6, 4), sized(20, 3), sized(3, 20), sized(20, 20), sized(20, 5)], 10
    )]  # fmt: skip
    assert made == [(6, 4), (7, 3), (3, 7), (5, 5), (5, 5)]


@given(LENGTHS, LENGTHS, st.integers(2, 6000))
def test_a_cut_request_fits_and_no_part_of_it_is_lost_without_need(prompt: int, output: int, limit: int) -> None:
    (made,) = cut([sized(prompt, output)], limit)
    assert made.prompt_tokens + made.output_tokens == min(prompt + output, limit)
    assert 1 <= made.prompt_tokens <= prompt
    assert 1 <= made.output_tokens <= output
    for part, before in ((made.prompt_tokens, prompt), (made.output_tokens, output)):
        assert part >= min(before, limit // 2)


def test_a_cut_prompt_has_the_hashes_of_what_is_left_of_it() -> None:
    (made,) = cut([sized(1500, 100, 1, 2, 3)], 700)
    assert (made.prompt_tokens, made.prefix_hashes) == (600, (1, 2))


def test_a_request_beyond_the_context_is_named_with_its_line() -> None:
    with pytest.raises(ValueError, match=r"in line 7 of t\.csv has 11 tokens and the model's context 10: shorten"):
        list(within_context([sized(5, 5), sized(5, 6, line=7)], 10, None, name="t.csv"))


def test_requests_beyond_the_context_can_be_left_out_and_counted() -> None:
    dropped = Counter[str]()
    left = list(within_context([sized(5, 5), sized(5, 6), sized(9, 9), sized(1, 1)], 10, dropped, name="t.csv"))
    assert [one.prompt_tokens for one in left] == [5, 1]
    assert dropped == {"context": 2}


def test_tenants_get_shares_as_their_skew_says() -> None:
    made = Counter(one.tenant for one in with_tenants([sized(1, 1)] * 6000, 3, zipf=1, seed=0))
    assert [made[f"tenant-{number}"] / 6000 for number in range(3)] == pytest.approx([6 / 11, 3 / 11, 2 / 11], abs=0.02)
    even = Counter(one.tenant for one in with_tenants([sized(1, 1)] * 6000, 3, zipf=0, seed=0))
    assert [even[f"tenant-{number}"] / 6000 for number in range(3)] == pytest.approx([1 / 3] * 3, abs=0.02)


def test_tenants_hang_on_the_seed_alone() -> None:
    requests = [sized(1, 1)] * 50
    first, same, other = (list(with_tenants(requests, 9, zipf=0, seed=seed)) for seed in (1, 1, 2))
    assert first == same != other


def test_requests_that_share_more_than_their_first_block_have_one_tenant() -> None:
    requests = []
    for session in range(40):
        blocks = [0, *(100 * session + turn for turn in range(1, 6))]
        requests += [sized(1, 1, *blocks[:length]) for length in range(2, 6)]
    tenants = [one.tenant for one in with_tenants(requests, 5, zipf=0, seed=0)]
    by_session = [set(tenants[start : start + 4]) for start in range(0, len(tenants), 4)]
    assert all(len(of) == 1 for of in by_session)
    assert len(set().union(*by_session)) == 5  # the first block, which all have, does not hold them together


def test_a_trace_with_tenants_keeps_them() -> None:
    with pytest.raises(ValueError, match="--tenants is for traces without tenants"):
        list(with_tenants(at(0), 3, zipf=1, seed=0))


def test_a_flood_comes_between_the_others_and_ends_with_them() -> None:
    flood = Stream(tenant="flood", rate=2, cv=0, start=1.25)
    made = list(with_flood(at(0, 1, 2, 3), flood, seed=0))
    assert [(one.arrival_s, one.tenant) for one in made] == [
        (0, "a"), (1, "a"), (1.25, "flood"), (1.75, "flood"), (2, "a"), (2.25, "flood"), (2.75, "flood"), (3, "a"),
    ]  # fmt: skip


def test_a_flood_may_end_before_the_others() -> None:
    flood = Stream(tenant="flood", rate=9, cv=0, start=1, duration=1)
    made = list(with_flood(at(0, 5), flood, seed=0))
    assert [one.tenant for one in made] == ["a", *["flood"] * 9, "a"]


@given(st.lists(st.floats(0, 100), max_size=30), st.integers(0, 9))
def test_a_flood_changes_nobody_and_keeps_the_order(times_s: list[float], seed: int) -> None:
    requests = at(*sorted(times_s))
    made = list(with_flood(requests, Stream(tenant="flood", rate=1), seed=seed))
    assert arrivals_s(made) == sorted(arrivals_s(made))
    assert [one for one in made if one.tenant == "a"] == requests
