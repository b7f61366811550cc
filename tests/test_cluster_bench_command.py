"""Goal: a benchmark tells how to repeat it without what is private, and ends with a status that says how it went."""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.__main__ import main
from cluster.bench_command import command_line, parts_file, run_command
from cluster.workload import Workload
from cluster.workload_summary import Summary

WORKLOAD = Summary.of(Workload(trace="synthetic:requests=4").requests())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["bench", "--json", "/a/secret/b.json", "--repeats", "2"], "bench --repeats 2"),
        (["simulate", "--trace", "csv:/secret/a.csv", "--json=/secret/b"], "simulate --trace csv:a.csv"),
        (["bench", "--plot", "a.svg", "--save-baseline=b", "--seed=1"], "bench --seed=1"),
        (["bench", "--model", "/secret/models/small/"], "bench --model small"),
        (["bench", "--model=/secret/run=3/small"], "bench --model=small"),
        (["simulate", "--plan", "ttft_p99<2s"], "simulate --plan 'ttft_p99<2s'"),
        (
            ["bench", "--engine-kwargs", '{"load": "/secret/a", "eager": true}'],
            """bench --engine-kwargs '{"load": "a", "eager": true}'""",
        ),
        (["bench", "--trace", "synthetic:rate=1/rate=2"], "bench --trace synthetic:rate=1/rate=2"),
        (["bench", "--key", "secret", "--repeats", "2"], "bench --key KEY --repeats 2"),
        (["bench", "--key=secret"], "bench --key=KEY"),
        (["bench", "--serve", "stock=http://secret:1/v1,b=http://secret:2"], "bench --serve URL"),
        (["bench", "--serve=http://secret:1"], "bench --serve=URL"),
        (["bench", "--address", "ray://secret:10001"], "bench --address ADDRESS"),
        (["bench", "--keys", "/secret/file"], "bench --keys file"),
    ],
)
def test_a_command_is_told_without_keys_hosts_and_paths(arguments: list[str], told: str) -> None:
    assert command_line(arguments) == f"python -m cluster {told}"


def test_where_results_go_changes_none_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    one, other = tmp_path / "one.json", tmp_path / "elsewhere" / "other.json"
    command = ["simulate", "--trace", "synthetic:requests=20", "--replicas", "1", "--policy", "stock"]
    for more in (["--json", str(one)], [f"--json={other}", "--plot", str(tmp_path / "a.svg")]):
        monkeypatch.setattr(sys, "argv", ["cluster", *command, *more])
        assert main([*command, *more]) == 0
    assert one.read_bytes() == other.read_bytes()
    assert shlex.split(json.loads(one.read_text())["command"]) == ["python", "-m", "cluster", *command]


def ended(report: dict[str, Any], json_file: Path | None, described: bool = False) -> int:
    options = argparse.Namespace(json=json_file, describe=described)
    return run_command(options, lambda scratch, say: report, lambda report: "a table", described=lambda _: WORKLOAD)


def test_a_whole_report_takes_the_place_of_its_parts(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    parts = parts_file(file)
    assert parts is not None
    parts.write_text("parts")
    assert ended({"figure": 1}, file) == 0
    assert json.loads(file.read_text()) == {"figure": 1}
    assert not parts.exists()


def test_of_an_interrupted_one_both_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "r.json"
    parts = parts_file(file)
    assert parts is not None
    parts.write_text("parts")
    assert ended({"partial": True, "partial_repeats": 2}, file) == 130
    assert json.loads(file.read_text())["partial"] is True
    assert parts.read_text() == "parts"
    assert capsys.readouterr().err == "Interrupted; 2 whole repeats were measured.\n"


def test_what_has_regressed_is_said_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended({"regressions": []}, None) == 0
    assert ended({"regressions": ["One is slow.", "Two is slower."]}, tmp_path / "r.json") == 1
    assert capsys.readouterr().err == "Error: One is slow.\nError: Two is slower.\n"


def test_a_workload_that_is_described_is_not_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "w.json"
    assert ended({}, file, described=True) == 0
    assert capsys.readouterr().out == WORKLOAD.text() + "\n"
    assert json.loads(file.read_text()) == {"described": WORKLOAD.figures()}
