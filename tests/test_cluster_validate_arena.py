"""Goal: runs of the VTC artifact are read, calibrated on and judged as recorded, and policies differ as they should.

Method: a record that the simulator itself has made is found again; the public record where it is at hand.
"""

import csv
import json
from pathlib import Path

import pytest

from cluster.__main__ import main
from cluster.records import RequestRecord
from cluster.simulated_time import LinearTimes
from cluster.validate_arena import (
    FAIR,
    FILE,
    FIRST_COME,
    LEAST_SERVED,
    POLICIES,
    STEP_TERMS,
    calibrated,
    latencies,
    order,
    read_arena,
    simulated,
)
from tests.shared_data import FOLDER, needs_data

TIMES = LinearTimes(fixed_s=0.03, decode_s=9e-5, context_s=1.1e-6, prefill_fixed_s=0.03, token_s=2.3e-4)
ASKED = [
    RequestRecord(
        request_id=str(number), tenant=str(number % 3 and 1), arrival_s=0.15 * number, first_token_s=None, finish_s=None,
        prompt_tokens=20 + 97 * number % 700, output_tokens=20 + 53 * number % 400, delivered_tokens=0,
    )
    for number in range(240)
]  # fmt: skip


def recorded(folder: Path) -> Path:
    """What the simulator makes of those requests, as the artifact would have recorded it."""
    with (folder / FILE).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["policy", "client", "prompt_len", "output_len", "req_time_s", "request_latency_s", "first_token_latency_s"]
        )
        for policy in POLICIES:
            for one in simulated(policy, ASKED, TIMES):
                first_s, finish_s = (one.first_token_s or 0.0), (one.finish_s or 0.0)
                writer.writerow(
                    [policy, one.tenant, one.prompt_tokens, one.output_tokens, one.arrival_s, finish_s - one.arrival_s,
                     first_s - one.arrival_s]
                )  # fmt: skip
    return folder


def test_a_record_of_the_simulator_is_found_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = tmp_path / "result.json"
    assert main(["validate", "--arena", str(recorded(tmp_path)), "--json", str(result)]) == 0
    report = json.loads(result.read_text())
    for figures in report["runs"].values():
        for one in figures.values():
            assert one["error"] == pytest.approx(0.0, abs=0.05)
    assert report["order"]["same"] is True
    assert "FCFS / VTC" in capsys.readouterr().out


def test_steps_are_found_from_the_first_come_run_alone(tmp_path: Path) -> None:
    found = calibrated(read_arena(recorded(tmp_path))[FIRST_COME])
    run_s = [TIMES.step_s(20, 8000), TIMES.step_s(20, 8000, [(0, 600)])]
    assert [found.step_s(20, 8000), found.step_s(20, 8000, [(0, 600)])] == pytest.approx(run_s, rel=0.05)
    assert all(getattr(found, name) >= 0 for name in STEP_TERMS)


def test_a_tenant_that_asks_for_less_waits_less_in_a_fair_order() -> None:
    def light(policy: str) -> float:
        return latencies([one for one in simulated(policy, ASKED, TIMES) if one.tenant == "0"])["first_token_s_mean"]

    assert light(FAIR) < light(FIRST_COME)


def test_only_without_lifts_a_tenant_that_comes_late_has_all_to_itself_first() -> None:
    late = [
        RequestRecord(
            request_id=str(number), tenant="early", arrival_s=0.05 * number,
            first_token_s=None, finish_s=None, prompt_tokens=100, output_tokens=200, delivered_tokens=0,
        )
        for number in range(400)
    ] + [
        RequestRecord(
            request_id=f"late-{number}", tenant="late", arrival_s=40.0, first_token_s=None, finish_s=None,
            prompt_tokens=100, output_tokens=200, delivered_tokens=0,
        )
        for number in range(80)
    ]  # fmt: skip

    def end_s(policy: str) -> float:
        return max(one.first_token_s or 0.0 for one in simulated(policy, late, TIMES) if one.tenant == "late")

    assert end_s(LEAST_SERVED) < end_s(FAIR)


def test_an_order_is_the_same_only_if_every_pair_is() -> None:
    def run(simulated_s: float, measured_s: float) -> dict[str, dict[str, float]]:
        return {"s": {"simulated": simulated_s, "measured": measured_s}}

    assert order({"a": run(1.0, 2.0), "b": run(1.1, 9.0)}, "s")["same"] is True
    assert order({"a": run(1.0, 2.0), "b": run(1.1, 9.0), "c": run(1.2, 3.0)}, "s")["same"] is False


@pytest.mark.parametrize("text", ["policy,client\nFCFS,1\n", "policy\n", "policy,client\nother,1\n"])
def test_what_is_no_record_is_refused(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / FILE).write_text(text)
    assert main(["validate", "--arena", str(tmp_path)]) == 2
    assert str(tmp_path / FILE) in capsys.readouterr().err


@needs_data
@pytest.mark.slow
def test_the_public_record_is_simulated_as_asked(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    assert main(["validate", "--arena", str(FOLDER / "vtc_arena"), "--json", str(result)]) == 0
    report = json.loads(result.read_text())
    assert report["order"]["same"] is True
    assert all(one["reached"] for figures in report["runs"].values() for one in figures.values())
