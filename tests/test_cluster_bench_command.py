"""Goal: a benchmark tells how to repeat it without what is private, and ends with a status that says how it went."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from cluster.bench_command import command_line, parts_file, run_command


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["bench", "--json", "/a/secret/b.json"], "bench --json b.json"),
        (["simulate", "--trace", "csv:/secret/a.csv", "--json=/secret/b"], "simulate --trace csv:a.csv --json=b"),
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


def ended(report: dict[str, Any], json_file: Path | None, described: bool = False) -> int:
    options = argparse.Namespace(json=json_file, describe=described)
    return run_command(options, lambda scratch, say: report, lambda report: "a table", described=lambda _: "a workload")


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


def test_a_workload_that_is_described_is_not_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended({}, None, described=True) == 0
    assert capsys.readouterr().out == "a workload\n"
