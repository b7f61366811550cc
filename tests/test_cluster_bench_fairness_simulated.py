"""Goal: the experiments on fairness across replicas say what they are meant to say, and the same every time.

Method: some of them in a small part of their time here; all of them, at length, are `slow`.
"""

import argparse
import json
import sys
from dataclasses import replace
from multiprocessing import active_children
from pathlib import Path

import pytest

from cluster import bench_fairness_simulated as bench
from cluster.__main__ import main
from cluster.experiments import EXPERIMENTS
from cluster.fairness_experiments import FAIRNESS_EXPERIMENTS, in_time
from tests.interrupting import Interrupting

COMMAND = ["bench-fairness-simulated", "--jobs", "1", "--time-scale", "0.01", "--only", "two ingresses, 4"]


def test_the_list_holds_the_suites_of_the_literature_and_those_across_replicas() -> None:
    assert set(EXPERIMENTS) - {"real"} < set(FAIRNESS_EXPERIMENTS)
    intervals = {one.share.interval_s for one in FAIRNESS_EXPERIMENTS.values()}
    assert {0.05, None, 20.0} <= intervals
    for one in FAIRNESS_EXPERIMENTS.values():
        assert set(one.breaks) <= set(one.arms)
        assert one.until_s > 0.0
        assert "fair" not in one.breaks, "the bound is promised in all of them"


def test_a_part_of_the_time_keeps_rates_and_intervals_and_moves_what_happens_with_it() -> None:
    whole = FAIRNESS_EXPERIMENTS["2 -> 4 -> 2 replicas"]
    half = in_time(whole, 0.5)
    assert half.until_s == whole.until_s / 2
    assert [one.rate for one in half.streams] == [one.rate for one in whole.streams]
    assert [at_s for at_s, _ in half.disturbances.scale] == [at_s / 2 for at_s, _ in whole.disturbances.scale]
    away = in_time(FAIRNESS_EXPERIMENTS["scheduler away for 30 s"], 0.5).share
    assert away.away is not None
    assert away.away[1] - away.away[0] == 15.0
    assert away.interval_s is None, "as the product"
    pauses = in_time(FAIRNESS_EXPERIMENTS["on_off_less"], 0.5).streams[0]
    assert pauses.on == pauses.off == 9.0


def test_the_command_prints_and_writes_the_same_every_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a"
    texts = []
    for _ in range(2):
        assert main([*COMMAND, "--json", str(path)]) == 1, "in so little time nothing breaks that is to break"
        texts.append(path.read_text())
    assert texts[0] == texts[1]
    report = json.loads(texts[0])
    arms = report["experiments"]["two ingresses, 4 : 1"]
    assert list(arms) == ["first-come", "local", "fair"]
    assert report["unexpected"] == ["two ingresses, 4 : 1, first-come"]
    out = capsys.readouterr().out
    assert "SIMULATED" in out
    assert report["full_step_ratio"] > 1.0
    assert f"{report['full_step_ratio']:.3f} times as long" in out
    assert "Not as expected: two ingresses, 4 : 1, first-come." in out


def test_ctrl_c_keeps_the_experiments_that_are_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It comes when the first of two is told; the only worker works on the second one."""
    path = tmp_path / "a"
    before = set(active_children())
    monkeypatch.setattr(sys, "stderr", Interrupting("first-come"))
    assert main([*COMMAND, "--only", "pinned to 2 of 4", "--json", str(path)]) == 130
    report = json.loads(path.read_text())
    assert (report["partial"], report["partial_done"], report["partial_of"]) == (True, 1, 2)
    (name,) = report["experiments"]
    assert name in capsys.readouterr().out
    assert set(active_children()) <= before, "no worker is left when the command ends"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "no such"], "--only names none of: overload"),
        (["--time-scale", "0"], "--time-scale must be above 0"),
        (["--jobs", "0"], "--jobs must be at least 1"),
    ],
)
def test_wrong_options_are_refused_in_a_sentence(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*COMMAND[:3], *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.fixture(name="options", scope="module")
def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args([])


def test_what_messages_that_are_late_and_lost_leave_of_a_pinned_tenants_share(options: argparse.Namespace) -> None:
    kind = replace(bench._kind(options), learn=False)
    experiment = in_time(FAIRNESS_EXPERIMENTS["3 of 10 messages lost, 50 ms late"], 0.2)
    (seen,) = bench.run(experiment, kind, capacity_per_s=2.2, seed=1).values()
    assert not seen["fairness"]["broken"]
    assert seen["fairness"]["shares"]["f"] < 0.6, "0.75 without messages"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_bound_holds_and_what_is_unfair_is_found_in_all_experiments(options: argparse.Namespace) -> None:
    options.jobs = 2
    report = bench.run_all(options)
    assert not report["unexpected"], bench.table(report)
    for name, arms in report["experiments"].items():
        fair = arms["fair"]
        if "short_long" not in name:  # unequal requests: other service takes other time
            assert fair.get("service_per_s_ratio", 1.0) >= 0.98, name
    shares = {name: arms["fair"]["fairness"]["shares"] for name, arms in report["experiments"].items()}
    assert shares["pinned to 2 of 4"]["g"] == pytest.approx(0.5, rel=0.02)
    assert shares["two ingresses, 4 : 1"]["f"] == pytest.approx(0.8, rel=0.02)
    assert shares["a tenant as 20 users"]["f"] == pytest.approx(shares["a tenant as 1 user"]["f"], rel=0.02)
