"""Goal: the benchmark of the fairness scheduler drives the real object, prints every figure and refuses what it cannot run.

Method: small runs of the command.
"""

import json
from pathlib import Path

import pytest

from cluster.__main__ import main


def test_it_prints_a_line_for_each_number_of_replicas_and_what_answers_hold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.json"
    arguments = ["--tenants", "300", "--reports", "40", "--memory-reports", "40", "--json", str(file)]
    assert main(["bench-fairness-actor", *arguments]) == 0
    *runs, memory = json.loads(file.read_text())["runs"]
    assert [each["replicas"] for each in runs] == [1, 16, 64, 256]
    assert runs[0]["tenants_per_answer"] == 20, "a lone replica is told of what it said itself"
    assert runs[1]["tenants_per_answer"] > 150, "and one of many of what all have said since its last"
    assert all(each["reports_per_s"] > 0 and each["bytes_per_answer"] > 100 for each in runs)
    assert min(memory.values()) > 1.0
    assert "after 40 reports of 16 replicas" in capsys.readouterr().out


def test_it_refuses_fewer_tenants_than_a_report_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench-fairness-actor", "--tenants", "19"]) == 2
    assert "--tenants must be at least 20" in capsys.readouterr().err
