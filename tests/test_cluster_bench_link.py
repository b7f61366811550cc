"""Goal: the sweep over link speeds asks for what it says and draws the right conclusions from its runs.

Method: hand-made runs with known figures; the command itself runs in `tests/test_cluster_bench.py`.
"""

from typing import Any

import pytest

from cluster.bench_figures import Calibration
from cluster.bench_link import crossover, link_bytes_per_s, parse_speeds, snapshot
from cluster.bench_model import SMALL
from cluster.records import RequestRecord, RunResult

CALIBRATION = Calibration(ttft_s=0.005, ttft_s_per_prompt_token=1e-4, s_per_output_token=0.003)


def ratios(**by_speed: float) -> dict[str, Any]:
    return {
        speed.removeprefix("x").replace("_", "."): {
            "ratios": {"throughput_tokens_per_s": {"swap/recompute": {"median": median}}}
        }
        for speed, median in by_speed.items()
    }


@pytest.mark.parametrize("text", ["", "0", "-1", "fast", "1,,2", "inf", "nan"])
def test_speeds_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--speeds must be numbers above 0"):
        parse_speeds(text)


def test_speeds_are_multiples_of_the_break_even() -> None:
    assert parse_speeds("0.1,1,10") == [0.1, 1.0, 10.0]


def test_swapping_begins_to_win_between_the_speeds_where_its_ratio_passes_one() -> None:
    assert crossover(ratios(x0_1=0.8, x1=1.2, x10=1.3)) == pytest.approx(0.1**0.5)
    assert crossover(ratios(x10=1.3, x0_1=0.9, x1=1.3)) == pytest.approx(0.1 * 10**0.25)
    assert crossover(ratios(x0_1=1.1, x1=1.2)) is None
    assert crossover(ratios(x0_1=0.5, x1=0.9)) is None
    assert crossover({"1": {"ratios": {"throughput_tokens_per_s": {}}}}) is None


def test_a_link_would_have_to_carry_all_that_was_recomputed() -> None:
    record = RequestRecord(
        request_id="a", tenant="t", arrival_s=0.0, first_token_s=1.0, finish_s=4.0, prompt_tokens=100, output_tokens=51,
        delivered_tokens=51,
    )  # fmt: skip
    run = RunResult(
        records=[record, record],
        run_end_s=4.0,
        peak_kv_blocks=9,
        computed_tokens=300 + 80,
        scheduler={},
        preemption_costs={},
        tokens={},
    )
    assert link_bytes_per_s(run, kv_bytes=1000) == pytest.approx(80 * 1000 / 4.0)


def test_the_costs_that_arms_are_told_are_the_measured_ones_and_copies_are_left_to_the_engine() -> None:
    costs = snapshot(SMALL, CALIBRATION, 32 * 2 * 4 * 256 * 4, 32)
    assert (costs.token_s, costs.recompute_fixed_s) == (1e-4, pytest.approx(0.002))
    assert costs.version == 0  # analytic: copies measured at start take the place of its own
