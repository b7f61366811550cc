"""Goal: `simulate` checks the bound of several replicas, says the same every time, and refuses what makes no sense."""

import json
from pathlib import Path

import pytest

from cluster.__main__ import main

FLOOD = (
    "synthetic:tenant=f,rate=40,duration=4,cv=1,spread=0,prompt_mean=100,output_mean=100/"
    "tenant=g,rate=40,duration=4,weight=3"
)
COMMAND = [
    "simulate",
    "--trace",
    FLOOD,
    "--pool-blocks",
    "60",
    "--policy",
    "adaptive",
    "--replicas",
    "2",
    "--fixed-costs",
    "--known-lengths",
]


def simulated(path: Path, *arguments: str) -> str:
    assert main([*COMMAND, *arguments, "--json", str(path)]) == 0
    return path.read_text()


def test_several_replicas_are_watched_and_the_result_is_the_same_to_the_byte(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--admission", "first-come,local,fair", "--report-loss", "0.2", "--report-delay-s", "0.02"]
    options += ["--fairness-away", "0.5:1", "--scale", "0.5:3,1:2", "--pin", "g=0:3,1:1", "--users", "f=5"]
    first = simulated(tmp_path / "a", *options)
    assert first == simulated(tmp_path / "a", *options)
    arms = json.loads(first)["arms"]
    assert list(arms) == ["first-come/adaptive", "local/adaptive", "fair/adaptive"]
    assert "fairness" not in arms["first-come/adaptive"], "nobody asked for it"
    seen = [arms[f"{name}/adaptive"]["fairness"] for name in ("local", "fair")]
    assert all(each["max_service_gap"] > 0.0 for each in seen)
    assert seen[0] != seen[1]
    assert "gap_over_bound" in capsys.readouterr().out


def test_shares_are_those_of_the_weights_and_first_come_can_be_watched_too(tmp_path: Path) -> None:
    report = json.loads(simulated(tmp_path / "a", "--admission", "first-come,fair", "--watch-fairness"))
    shares = {name: arm["fairness"]["shares"] for name, arm in report["arms"].items()}
    assert shares["fair/adaptive"]["g"] > 0.7 > 0.55 > shares["first-come/adaptive"]["g"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fairness-away", "3"], "--fairness-away must be two numbers"),
        (["--fairness-away", "3:2"], "--fairness-away must be FROM:TO"),
        (["--sync-interval-s", "0"], "--sync-interval-s must be above 0"),
        (["--scale", "3:0"], "--scale must leave at least 1 replica"),
        (["--scale", "a:1"], "--scale must be two numbers"),
        (["--users", "f"], "--users must be TENANT=N"),
        (["--pin", "f"], "--pin must be TENANT"),
        (["--report-loss", "2"], "--report-loss must be between"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_sentence(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*COMMAND, "--admission", "fair", *arguments]) == 2
    assert message in capsys.readouterr().err
