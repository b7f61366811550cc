"""Goal: an engine expects of a request what is left of its prediction, whatever it has done and whatever the stamp says.

Method: lengths drawn evenly from the distribution that the rule assumes; hypothesis for anything else.
"""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicas.request_stamp import (
    AGE_S,
    MAX_AGE_S,
    OUTPUT_TOKENS,
    WEIGHT,
    age_s_in,
    make_stamp,
    remaining_tokens,
    tenant_in,
    user_in,
    weight_in,
)

UNLIMITED = 1 << 30


def remaining(num_output_tokens: int, *, median: int = 100, upper: int = 300, max_tokens: int = UNLIMITED) -> int:
    stamp = make_stamp(tenant="a", median_tokens=median, upper_tokens=upper)
    return remaining_tokens(stamp, num_output_tokens, max_tokens)


def test_a_new_request_is_expected_to_reach_its_upper_quantile() -> None:
    assert remaining(0) == 300


def test_nine_of_ten_requests_that_have_lasted_so_long_end_within_what_remains() -> None:
    median, upper = 1000, 3000
    tail = (upper - median) / math.log(5)
    shares = [(index + 0.5) / 20_000 for index in range(20_000)]  # of requests that live longer
    lengths = [-median * math.log2(s) if s > 0.5 else median - tail * math.log(2 * s) for s in shares]
    for lasted in (0, 300, 999, 1000, 1500, 2900):
        left = [length - lasted for length in lengths if length > lasted]
        most = remaining(lasted, median=median, upper=upper)
        assert sum(one <= most for one in left) / len(left) == pytest.approx(0.9, abs=0.01), lasted


def test_a_request_that_outlives_its_prediction_is_taken_to_last_as_long_again() -> None:
    assert remaining(1300) == 1300 - 300
    assert remaining(310, median=300) == 10
    assert remaining(300, median=300) == 1


def test_no_more_remains_than_the_limit_leaves() -> None:
    assert remaining(0, max_tokens=120) == 120
    assert remaining(1300, max_tokens=1400) == 100
    assert remaining(64, max_tokens=64) == 1


def test_without_a_stamp_all_that_the_limit_leaves_remains() -> None:
    assert remaining_tokens({}, 3, 10) == 7
    assert remaining_tokens({}, 10, 10) == 1
    assert tenant_in({}) == ""
    assert tenant_in(make_stamp(tenant="a", median_tokens=1, upper_tokens=1)) == "a"


def test_who_sent_a_request_and_when_is_read_as_it_was_written() -> None:
    stamp = make_stamp(tenant="a", user="u", weight=2.5, age_s=0.125, median_tokens=1, upper_tokens=1)
    assert (tenant_in(stamp), user_in(stamp), weight_in(stamp), age_s_in(stamp)) == ("a", "u", 2.5, 0.125)
    assert age_s_in(make_stamp(tenant="a", age_s=1e9, median_tokens=1, upper_tokens=1)) == MAX_AGE_S
    assert (user_in({}), weight_in({}), age_s_in({})) == ("", 1.0, 0.0)


@pytest.mark.parametrize("value", [None, "1", [], True, -1, -0.5, float("nan"), float("inf"), 10**400, {}])
def test_a_weight_or_an_age_that_is_none_counts_as_none(value: Any) -> None:
    assert (weight_in({WEIGHT: value}), age_s_in({AGE_S: value})) == (1.0, 0.0)


@pytest.mark.parametrize(
    "value",
    [None, 3, "12", [], [5], [1, 2, 3], [0, 5], [7, 5], [-1, 5], [1.5, 2.5], ["1", "2"], [float("nan")] * 2,
     [1, 10**400], {1: 2}],
)  # fmt: skip
def test_a_stamp_that_is_none_counts_as_none(value: Any) -> None:
    assert remaining_tokens({OUTPUT_TOKENS: value}, 3, 10) == 7


@given(st.integers(1, 10**6), st.integers(0, 10**6), st.integers(0, 10**7), st.integers(1, 10**7))
def test_something_remains_and_the_expected_end_never_comes_nearer(
    median: int, beyond: int, num_output_tokens: int, max_tokens: int
) -> None:
    upper = median + beyond
    left = remaining(num_output_tokens, median=median, upper=upper, max_tokens=max_tokens)
    assert 1 <= left <= max(1, max_tokens - num_output_tokens)
    later = remaining(num_output_tokens + 1, median=median, upper=upper, max_tokens=max_tokens)
    assert later >= min(left - 1, max(1, max_tokens - num_output_tokens - 1))
