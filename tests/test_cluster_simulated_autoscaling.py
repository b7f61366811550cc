"""Goal: a simulated cluster has as many replicas as its load asks for, by the product's policy, and says what that costs.

Method: small engines with the product's queues under a load that rises and falls; the same load on fixed replicas beside it.
"""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest

from cluster.__main__ import main
from cluster.disturbances import Disturbances
from cluster.record_table import RecordTable
from cluster.routing import LeastLoaded
from cluster.simulated_autoscaling import Autoscaling, SimulatedAutoscaler, parse_autoscaling, stats_of
from cluster.simulated_cluster import SimulatedCluster
from cluster.simulation import Simulation
from cost_service.traces import TraceRequest
from global_scheduler.autoscaling import AutoscalerSettings
from tests.test_cluster_simulated_share import KIND

MOST = 6
SETTINGS = AutoscalerSettings(
    min_replicas=1, max_replicas=MOST, target_queued_s=0.5, target_kv_use=0.7, max_step_up=2, up_delay_s=2.0,
    down_delay_s=10.0, up_cooldown_s=8.0, down_cooldown_s=15.0,
)  # fmt: skip
STARTUP_S = 5.0
UP_S, FLAT_S, DOWN_S, END_S = 40.0, 20.0, 40.0, 80.0
MOST_RATE = 60.0
"""Requests a second: about three times what one replica serves."""


def ramp() -> list[TraceRequest]:
    """Requests of 20 + 20 tokens, more and more often, then less and less, then seldom."""
    requests, at_s = [], 0.0
    while at_s < UP_S + FLAT_S + DOWN_S + END_S:
        share = min(1.0, at_s / UP_S, max(0.0, (UP_S + FLAT_S + DOWN_S - at_s) / DOWN_S))
        requests.append(TraceRequest(arrival_s=at_s, tenant="f", prompt_tokens=20, output_tokens=20))
        at_s += 1.0 / max(1.0, MOST_RATE * share)
    return requests


def run(
    settings: AutoscalerSettings | None, *, num_replicas: int = 1, disturbances: Disturbances | None = None
) -> tuple[RecordTable, SimulatedAutoscaler | None, Simulation, float]:
    """The ramp on replicas that are scaled, or on so many."""
    autoscaling = None if settings is None else Autoscaling(settings=settings, startup_s=STARTUP_S)
    cluster = SimulatedCluster(
        num_replicas=num_replicas, router=LeastLoaded, autoscaling=autoscaling,
        disturbances=disturbances or Disturbances(),
    )  # fmt: skip
    records, requests = RecordTable(), ramp()
    scaler = None if autoscaling is None else SimulatedAutoscaler(autoscaling)
    simulation = cluster.simulation(
        KIND,
        done=records.add,
        credit=cluster.bound(KIND, requests).credit,
        scaler=scaler,
        check=disturbances is not None,
    )
    end_s = simulation.run(requests)
    return records, scaler, simulation, end_s


def turnaround_s(records: RecordTable) -> float:
    """Mean."""
    times = [record.finish_s - record.arrival_s for record in records if record.finish_s is not None]
    assert len(times) == len(records), "a request is not over"
    return sum(times) / len(times)


def directions(numbers: Sequence[int]) -> list[bool]:
    """Whether each change is one upwards."""
    return [later > earlier for earlier, later in pairwise(numbers)]


def test_a_ramp_is_followed_up_and_down_once_in_bounded_steps_with_cool_downs() -> None:
    _, scaler, simulation, _ = run(SETTINGS)
    assert scaler is not None
    numbers = [1, *(num for _, num, _ in scaler.changes)]
    assert max(numbers) >= 4, "three have all their memory in use, and some is to be free"
    assert numbers[-1] == 1
    ups = directions(numbers)
    assert ups == sorted(ups, reverse=True), f"{numbers} goes up and down again"
    assert all(-1 <= later - earlier <= 2 for earlier, later in pairwise(numbers))
    for (earlier_s, _, _), (later_s, _, why) in pairwise(scaler.changes):
        assert later_s - earlier_s >= 8.0, why
    assert sum(replica.up and not replica.draining for replica in simulation.replicas) == 1
    assert simulation.counts.finished == simulation.counts.arrived


def test_a_new_replica_takes_requests_when_it_has_started_and_costs_from_when_it_is_wanted() -> None:
    _, scaler, _, _ = run(SETTINGS)
    assert scaler is not None
    (first_s, first, _) = scaler.changes[0]
    taking = [(at_s, num) for at_s, _, num, _ in scaler.times if num >= first]
    assert taking[0][0] == pytest.approx(first_s + STARTUP_S, abs=1.0)
    there = [at_s for at_s, _, _, num in scaler.times if num >= first]
    assert there[0] == first_s
    assert all(taking <= there for _, _, taking, there in scaler.times)


def test_it_costs_less_than_the_most_replicas_and_is_much_faster_than_the_fewest() -> None:
    records, scaler, _, end_s = run(SETTINGS)
    assert scaler is not None
    most, _, _, most_end_s = run(None, num_replicas=MOST)
    least, _, _, _ = run(None, num_replicas=1)
    assert scaler.replica_seconds(end_s) < 0.7 * MOST * most_end_s
    assert turnaround_s(most) <= turnaround_s(records) < 0.2 * turnaround_s(least)


def test_crashes_of_replicas_are_no_reason_to_give_some_up() -> None:
    records, scaler, simulation, _ = run(
        SETTINGS, disturbances=Disturbances(crashes=((50.0, 0), (55.0, 2), (56.0, 1)), restart_s=6.0)
    )
    assert scaler is not None
    assert simulation.counts.crashes == 3
    assert not any(num < before for (at_s, num, _), (_, before, _) in zip(scaler.changes[1:], scaler.changes, strict=False)
                   if 50.0 <= at_s <= 62.0)  # fmt: skip
    assert len(records) == simulation.counts.finished


def test_a_replica_says_of_its_engine_what_the_product_says() -> None:
    _, _, simulation, _ = run(None, num_replicas=1)
    stats = stats_of(simulation.replicas[0].engine)
    assert (stats.num_running, stats.num_waiting, stats.queued_s) == (0, 0, 0.0)
    assert (stats.num_blocks, stats.max_num_seqs) == (KIND.settings.num_blocks, KIND.settings.max_num_seqs)
    assert stats.num_free_blocks == KIND.settings.num_blocks - 1, "vLLM's null block is not free"
    assert stats.preemptions > 0


TRACE = "synthetic:tenant=f,rate=20,duration=20,cv=1,spread=0,prompt_mean=100,output_mean=100"
COMMAND = [
    "simulate", "--trace", TRACE, "--pool-blocks", "60", "--policy", "adaptive", "--fixed-costs", "--known-lengths",
    "--admission", "fair",
]  # fmt: skip
SCALED = ["--autoscale", "1:4,target_queued_s=2,up_cooldown_s=5,down_delay_s=5", "--startup-s", "3"]


def test_the_command_reports_replicas_over_time_and_says_the_same_to_the_byte(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        assert main([*COMMAND, *SCALED, "--json", str(tmp_path / name)]) == 0
    a, b = (json.loads((tmp_path / name).read_text()) for name in ("a", "b"))
    assert a["arms"] == b["arms"]
    scaling = a["arms"]["adaptive"]["scaling"]
    assert scaling["changes"][0]["replicas"] > 1
    assert scaling["over_time"][0] == {"at_s": 0.0, "wanted": 1, "taking": 1, "there": 1}
    assert scaling["replica_seconds"] == pytest.approx(scaling["mean_replicas"] * a["arms"]["adaptive"]["run_end_s"])
    out = capsys.readouterr().out
    assert "replicas of adaptive: " in out
    assert scaling["changes"][0]["why"] in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--autoscale", "2"], "--autoscale must begin with MIN:MAX"),
        (["--autoscale", "3:2"], "min_replicas must not be above max_replicas"),
        (["--autoscale", "1:2,steps=3"], "--autoscale has 'steps'"),
        (["--autoscale", "1:2,max_replicas=3"], "--autoscale has 'max_replicas'"),
        (["--autoscale", "1:2,target_kv_use=much"], "--autoscale must have a number for target_kv_use"),
        (["--autoscale", "1:2", "--startup-s", "-1"], "--startup-s must be finite"),
        (["--autoscale", "1:2", "--scale", "3:2"], "--scale and --autoscale cannot both"),
        (["--autoscale", "1:2", "--plan", "ttft_p99<2s"], "--autoscale and --plan cannot both"),
        (["--autoscale", "1:2", "--admission", "first-come,fair"], "--autoscale needs predictions of who waits"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_sentence(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*COMMAND, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_settings_are_read_with_their_kinds() -> None:
    autoscaling = parse_autoscaling("2:8,max_step_up=3,target_kv_use=0.5", startup_s=7.0)
    assert autoscaling.settings == AutoscalerSettings(min_replicas=2, max_replicas=8, max_step_up=3, target_kv_use=0.5)
    assert autoscaling.startup_s == 7.0
