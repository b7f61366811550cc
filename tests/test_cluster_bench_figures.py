"""Goal: every figure is what its definition says, to the last digit.

Method: runs small enough to compute by hand, and properties that hold for any run.
"""

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.bench_figures import (
    Calibration,
    Figures,
    difference_to_stock,
    figures,
    interval,
    jain_index,
    quantile,
    ratio_to_stock,
    ratios_to_stock,
    table,
)
from cluster.records import RequestRecord

ALONE = Calibration(ttft_s=0.1, ttft_s_per_prompt_token=0.01, s_per_output_token=0.05)


def record(name: str, **changes: Any) -> RequestRecord:
    """A finished request; its tenant is the first letter of its name."""
    values: dict[str, Any] = {
        "request_id": name, "tenant": name[0], "arrival_s": 0.0, "first_token_s": 1.0, "finish_s": 3.0,
        "prompt_tokens": 10, "output_tokens": 20,
    }  # fmt: skip
    values |= changes
    return RequestRecord(**{"delivered_tokens": values["output_tokens"]} | values)


RUN = [
    record("a1", swaps=2),
    record("a2", first_token_s=4.0, finish_s=5.0, output_tokens=5, recomputes=1),
    record("b1", arrival_s=0.5, first_token_s=2.0, finish_s=4.0, prompt_tokens=6, output_tokens=10),
]
"""Served to `a`: 10 at 1 s, 20 per second until 3 s, 10 at 4 s, 10 per second until 5 s. To `b`: 6 at 2 s, then 10 per
second until 4 s. Both wait from 0.5 to 2 s."""


def test_a_run_by_hand() -> None:
    result = figures(RUN, ALONE, run_end_s=5.5)
    assert result.throughput_tokens_per_s == pytest.approx(35 / 5)
    turnarounds = [3.5 / (0.1 + 0.06 + 0.5), 3 / (0.1 + 0.1 + 1.0), 5 / (0.1 + 0.1 + 0.25)]
    assert result.weighted_turnaround_mean == pytest.approx(sum(turnarounds) / 3)
    assert result.weighted_turnaround_p99 == pytest.approx(turnarounds[0] + 0.98 * (turnarounds[2] - turnarounds[0]))
    assert result.ttft_s_p50 == pytest.approx(1.5)
    assert result.ttft_s_p99 == pytest.approx(1.5 + 0.98 * 2.5)
    assert result.tpot_s_p50 == pytest.approx(2 / 9)  # of 2/19, 1/4, 2/9
    assert result.tpot_s_p99 == pytest.approx(2 / 9 + 0.98 * (1 / 4 - 2 / 9))
    assert (result.preemptions, result.swaps, result.recomputes) == (3, 2, 1)
    assert (result.requests, result.unfinished) == (3, 0)


def test_figures_of_a_tenant_are_those_of_its_requests_alone() -> None:
    result = figures(RUN, ALONE, run_end_s=5.5)
    assert list(result.tenants) == ["a", "b"]
    only_b = figures(RUN[2:], ALONE, run_end_s=5.5)
    assert dataclasses.replace(result.tenants["b"], max_service_gap=0.0) == dataclasses.replace(only_b, tenants={})
    assert result.tenants["a"].throughput_tokens_per_s == pytest.approx(25 / 5)
    assert result.tenants["b"].throughput_tokens_per_s == pytest.approx(10 / 3.5)
    assert (result.tenants["a"].preemptions, result.tenants["b"].preemptions) == (3, 0)


def test_the_service_gap_is_the_widest_swing_while_both_tenants_wait() -> None:
    result = figures(RUN, ALONE, run_end_s=5.5)
    assert result.max_service_gap == pytest.approx(30)  # a is 10 + 20 ahead just before b is served; later only a waits
    assert result.tenants["a"].max_service_gap == result.tenants["b"].max_service_gap == result.max_service_gap


def test_who_has_twice_the_weight_may_be_served_twice_as_much() -> None:
    result = figures(RUN, ALONE, run_end_s=5.5, weights={"a": 2.0})
    assert result.max_service_gap == pytest.approx(15)


def test_what_was_served_while_one_tenant_did_not_wait_is_no_gap() -> None:
    later = [record("a1"), record("b1", arrival_s=3.0, first_token_s=3.5, finish_s=4.0), record("a2", arrival_s=3.0)]
    later[2] = dataclasses.replace(later[2], first_token_s=4.5, finish_s=5.0)
    # At 3 s a is 50 ahead, which is nobody's loss; from there b gets 10 before it waits no more.
    assert figures(later, ALONE, run_end_s=5.0).max_service_gap == pytest.approx(10)


def test_tokens_of_one_step_are_given_at_once() -> None:
    both = [record("a1"), record("b1"), record("a2", first_token_s=2.0), record("b2", first_token_s=2.0)]
    assert figures(both, ALONE, run_end_s=3.0).max_service_gap == pytest.approx(0)


def test_jain_looks_at_the_moment_when_the_first_tenant_has_nothing_left() -> None:
    result = figures(RUN, ALONE, run_end_s=5.5)
    served = (10 + 40 + 10, 6 + 20)  # at 4 s
    assert result.jain_index == pytest.approx(sum(served) ** 2 / (2 * (served[0] ** 2 + served[1] ** 2)))
    assert result.tenants["a"].jain_index == 1


def test_what_is_unfinished_counts_up_to_the_end_of_the_run() -> None:
    cut = record("a1", finish_s=None, delivered_tokens=6)
    silent = record("b1", arrival_s=2.0, first_token_s=None, finish_s=None, delivered_tokens=0)
    result = figures([cut, silent], ALONE, run_end_s=6.0)
    assert result.unfinished == 2
    assert result.throughput_tokens_per_s == pytest.approx(6 / 6)
    assert result.weighted_turnaround_mean == pytest.approx((6 / 1.2 + 4 / 1.2) / 2)  # of all 20 tokens each
    assert result.ttft_s_p50 == pytest.approx((1 + 4) / 2)
    assert result.tpot_s_p50 == pytest.approx(5 / 5)
    assert result.tenants["b"].tpot_s_p50 is None


def test_a_request_of_one_token_has_no_time_per_token() -> None:
    one = record("a1", finish_s=1.0, output_tokens=1)
    result = figures([one], ALONE, run_end_s=1.0)
    assert result.tpot_s_p50 is None
    assert result.tpot_s_p99 is None
    assert (result.jain_index, result.max_service_gap) == (1, 0)


def test_a_run_without_requests_or_with_a_weight_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="run at least one"):
        figures([], ALONE, run_end_s=1.0)
    with pytest.raises(ValueError, match="weight of tenant b must be positive"):
        figures(RUN, ALONE, run_end_s=5.5, weights={"b": 0.0})


def test_result_fields_are_those_that_scripts_read() -> None:
    names = {
        "throughput_tokens_per_s", "weighted_turnaround_mean", "weighted_turnaround_p99", "ttft_s_p50", "ttft_s_p99",
        "tpot_s_p50", "tpot_s_p99", "preemptions", "swaps", "recomputes", "jain_index", "max_service_gap", "tenants",
    }  # fmt: skip
    result = dataclasses.asdict(figures(RUN, ALONE, run_end_s=5.5))
    assert names <= set(result)
    assert names <= set(result["tenants"]["a"])
    assert json.loads(json.dumps(result)) == result


times = st.integers(0, 20).map(lambda quarter: quarter / 4)


@st.composite
def runs(draw: st.DrawFn) -> list[RequestRecord]:
    made = []
    for number in range(draw(st.integers(1, 8))):
        arrival_s = draw(times)
        first_s = arrival_s + draw(times) + 0.25
        tokens = draw(st.integers(1, 9))
        made.append(
            record(
                f"{draw(st.sampled_from('abc'))}{number}",
                arrival_s=arrival_s,
                first_token_s=first_s,
                finish_s=first_s + (draw(times) + 0.25 if tokens > 1 else 0),
                prompt_tokens=draw(st.integers(1, 30)),
                output_tokens=tokens,
            )
        )
    return made


@given(runs(), st.randoms(use_true_random=False), st.sampled_from([0.5, 2.0, 4.0]))
def test_figures_do_not_hang_on_the_order_of_records_and_gaps_scale_with_weights(
    made: list[RequestRecord], rng: Any, factor: float
) -> None:
    result = figures(made, ALONE, run_end_s=30.0)
    shuffled = sorted(made, key=lambda _: rng.random())
    again = figures(shuffled, ALONE, run_end_s=30.0, weights=dict.fromkeys("abc", factor))
    assert again.max_service_gap == pytest.approx(result.max_service_gap / factor)
    assert again.jain_index == pytest.approx(result.jain_index)
    assert again.weighted_turnaround_mean == pytest.approx(result.weighted_turnaround_mean)
    assert again.throughput_tokens_per_s == pytest.approx(result.throughput_tokens_per_s)
    total = sum(each.prompt_tokens + 2 * each.output_tokens for each in made)
    assert -1e-9 <= result.max_service_gap <= total + 1e-9
    assert 1 / len(result.tenants) - 1e-9 <= result.jain_index <= 1 + 1e-9


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), st.floats(0, 1))
def test_quantiles_are_numpys(values: list[float], fraction: float) -> None:
    assert quantile(values, fraction) == pytest.approx(float(np.quantile(values, fraction)), abs=1e-6)


@pytest.mark.parametrize(("values", "index"), [([5, 5, 5], 1), ([1, 0, 0, 0], 0.25), ([0, 0], 1), ([1, 2], 0.9)])
def test_jains_index_by_hand(values: list[float], index: float) -> None:
    assert jain_index(values) == pytest.approx(index)


def test_a_calibration_is_the_line_through_the_medians() -> None:
    def alone(prompt_tokens: int, ttft_s: float, tpot_s: float) -> RequestRecord:
        return record(
            "a", first_token_s=ttft_s, finish_s=ttft_s + 10 * tpot_s, output_tokens=11, prompt_tokens=prompt_tokens
        )

    measured = [alone(10, 0.20, 0.05), alone(10, 0.20, 0.04), alone(10, 9.0, 0.05), alone(110, 1.20, 0.06)]
    calibration = Calibration.fit(measured)
    assert calibration.ttft_s == pytest.approx(0.1)
    assert calibration.ttft_s_per_prompt_token == pytest.approx(0.01)
    assert calibration.s_per_output_token == pytest.approx(0.05)
    assert calibration.alone_s(measured[0]) == pytest.approx(0.1 + 10 * 0.01 + 11 * 0.05)


def test_noise_around_a_flat_line_never_gives_a_negative_time() -> None:
    falling = [record("a", prompt_tokens=10, first_token_s=0.3), record("a", prompt_tokens=20, first_token_s=0.2)]
    calibration = Calibration.fit(falling)
    assert (calibration.ttft_s, calibration.ttft_s_per_prompt_token) == (pytest.approx(0.25), 0.0)
    assert Calibration.fit(falling[:1]).ttft_s == pytest.approx(0.3)


def test_a_line_that_attention_bends_upwards_goes_through_the_origin_and_not_below_it() -> None:
    rising = [record("a", prompt_tokens=100, first_token_s=0.01), record("a", prompt_tokens=200, first_token_s=0.06)]
    calibration = Calibration.fit(rising)
    assert calibration.ttft_s == 0.0
    assert calibration.ttft_s_per_prompt_token == pytest.approx((100 * 0.01 + 200 * 0.06) / (100**2 + 200**2))


def test_a_calibration_without_a_second_token_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two output tokens"):
        Calibration.fit([record("a", finish_s=1.0, output_tokens=1)])


def test_the_check_gives_the_size_of_errors_and_their_direction() -> None:
    alone_s = 0.1 + 0.1 + 1.0
    measured = [record("a", finish_s=factor * alone_s) for factor in (1 / 1.2, 1 / 1.1, 1 / 0.7)]
    check = ALONE.check([dataclasses.replace(each, first_token_s=0.5) for each in measured])
    assert check["requests"] == 3
    assert check["median_error"] == pytest.approx(0.2)
    assert check["median_signed_error"] == pytest.approx(0.1)


def changed(**changes: Any) -> Figures:
    return dataclasses.replace(figures(RUN, ALONE, run_end_s=5.5), **changes)


def test_ratios_are_per_repeat_with_a_t_interval_on_their_logarithms() -> None:
    stock = [changed(throughput_tokens_per_s=value) for value in (10.0, 20.0, 40.0)]
    ours = [changed(throughput_tokens_per_s=value) for value in (20.0, 20.0, 20.0)]
    ratio = ratio_to_stock(ours, stock)["throughput_tokens_per_s"]
    assert ratio["repeats"] == [2.0, 1.0, 0.5]
    assert ratio["median"] == 1.0
    half = 4.303 * math.log(2) / math.sqrt(3)  # the logarithms' standard deviation is log 2
    assert (ratio["low"], ratio["high"]) == (pytest.approx(math.exp(-half)), pytest.approx(math.exp(half)))


def test_one_repeat_has_no_interval_and_a_missing_figure_no_ratio() -> None:
    ratios = ratio_to_stock([changed(tpot_s_p50=None)], [changed()])
    assert "tpot_s_p50" not in ratios
    assert (ratios["ttft_s_p50"]["median"], ratios["ttft_s_p50"]["low"]) == (1.0, None)
    assert interval([3.0]) is None


def test_differences_are_per_repeat_with_a_t_interval() -> None:
    difference = difference_to_stock([11.0, 12.0, 13.0], [10.0, 10.0, 10.0])
    assert (difference["median"], difference["repeats"]) == (2.0, [1.0, 2.0, 3.0])
    assert difference["low"] == pytest.approx(2 - 4.303 / math.sqrt(3))
    assert difference["high"] == pytest.approx(2 + 4.303 / math.sqrt(3))


def test_beyond_the_t_table_the_interval_is_not_too_narrow() -> None:
    low, high = interval([0.0, 1.0] * 50) or (0, 0)
    assert high - low > 2 * 1.984 * 0.5025 / 10  # t for 99 degrees of freedom


def test_the_table_shows_medians_ratios_and_what_is_missing() -> None:
    def arm(**changes: Any) -> dict[str, Any]:
        return dataclasses.asdict(changed(**changes)) | {"scheduler": {"most_running": 7}}

    stock, swap = changed(tpot_s_p99=None), changed(throughput_tokens_per_s=14.0, tpot_s_p99=None)
    text = table(
        {
            "arms": {"stock": {"repeats": [arm(tpot_s_p99=None)]}, "swap": {"repeats": [arm(), arm(swaps=4)]}},
            "ratio_to_stock": {"swap": ratio_to_stock([swap], [stock])},
            "added_scheduler_us_per_step": {"swap": difference_to_stock([30.5], [20.0])},
        }
    )
    rows = [line.split() for line in text.splitlines()]
    assert rows[0] == ["median", "of", "repeats", "stock", "swap"]
    assert ["swaps", "2", "3"] in rows
    assert next(row for row in rows if row[:1] == ["tpot_s_p99"])[1] == "-"
    assert ["throughput_tokens_per_s", "2", "-", "-"] in rows
    assert ["added", "us/step,", "7", "running", "10.5", "-", "-"] in rows


def test_arms_with_long_names_have_columns_of_their_own_and_need_no_scheduler() -> None:
    name = "first-come/a-cluster-far-away"
    runs = {"first-come/stock": [changed()], name: [changed(throughput_tokens_per_s=14.0)]}
    arms = {arm: {"repeats": [dataclasses.asdict(one) for one in of]} for arm, of in runs.items()}
    ratios = ratios_to_stock(runs, "first-come/stock")
    assert list(ratios) == [name]
    assert ratios_to_stock(runs, None) == {}
    lines = table({"arms": arms, "ratio_to_stock": ratios}).splitlines()
    assert lines[0].split()[-2:] == ["first-come/stock", name]
    assert len({len(line) for line in lines[: lines.index("")]}) == 1
    assert [line.split()[:3] for line in lines if line.startswith(name)] == [[name, "/", "stock"]]
