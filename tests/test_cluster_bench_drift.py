"""Goal: the command tells from every transfer when the costs are right again after the link has changed.

Method: figures of made-up transfers; one run of the command with a tiny model.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.bench_drift import NEWEST, Judged, figures, judge
from cost_service.samples import LinkSample
from tests.test_cost_service_learner import START


def transfers(num: int, error: float, *, changed: bool) -> list[Judged]:
    return [Judged(1.0 + error, 1.0, changed)] * num


def test_copies_are_counted_until_the_error_stays_small() -> None:
    before = transfers(40, 0.05, changed=False)
    late = figures([*before, *transfers(30, 3.0, changed=True), *transfers(60, 0.1, changed=True)])
    assert late["median_error_before"] == pytest.approx(0.05)
    assert late["median_error_right_after"] == pytest.approx(3.0)
    assert late["copies_until_right"] == pytest.approx(30 + NEWEST / 2, abs=1)
    assert late["reached"] is True


def test_costs_that_never_become_right_are_said_to() -> None:
    never = figures([*transfers(40, 0.0, changed=False), *transfers(90, 3.0, changed=True)])
    assert never["copies_until_right"] is None
    assert never["median_error_at_the_end"] == pytest.approx(3.0)


def test_costs_that_stay_right_need_no_copies() -> None:
    assert figures([*transfers(40, 0.0, changed=False), *transfers(90, 0.1, changed=True)])["copies_until_right"] == 0


def test_too_few_transfers_are_refused() -> None:
    with pytest.raises(ValueError, match="too few transfers"):
        figures([*transfers(40, 0.0, changed=False), *transfers(3, 0.1, changed=True)])


def test_a_transfer_is_predicted_in_its_direction_and_beside_the_other() -> None:
    costs = replace(START, link_latency_s=1.0, link_out_block_s=2.0, link_in_block_s=3.0, link_shared_ratio=0.5)
    out = judge(LinkSample(direction="out", num_blocks=4, seconds=9.0), costs, changed=False)
    back = judge(LinkSample(direction="in", num_blocks=4, shared=1.0, seconds=9.0), costs, changed=True)
    assert (out.predicted_s, back.predicted_s) == (9.0, 19.0)
    assert out.error == 0.0


@pytest.mark.engine
def test_a_link_that_changes_under_a_real_engine_is_learned(tmp_path: Path) -> None:
    result = tmp_path / "drift.json"
    answer = subprocess.run(
        [sys.executable, "-m", "cluster", "bench-drift", "--json", str(result)], capture_output=True, text=True,
        timeout=300, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr[-2000:]
    report = json.loads(result.read_text())
    assert report["median_error_right_after"] > 0.5
    assert report["median_error_at_the_end"] < 0.2
    refused = subprocess.run(
        [sys.executable, "-m", "cluster", "bench-drift", "--change-by", "0"], capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert refused.returncode == 2
    assert "--change-by" in refused.stderr
