"""Goal: `python -m cluster simulate` as a user calls it: a table, the same bytes every time, and clear refusals."""

import json
import sys
from pathlib import Path

import pytest

from cluster.__main__ import main
from cluster.record_table import RecordTable
from cluster.records import RequestRecord
from cluster.report import page, read_result
from tests.interrupting import Interrupting


@pytest.fixture(name="trace")
def _trace(tmp_path: Path) -> str:
    path = tmp_path / "trace.csv"
    lines = [f"{number * 0.02},t{number % 3},{1 + number * 37 % 900},{1 + number * 53 % 300}" for number in range(150)]
    path.write_text("\n".join(["arrival_s,tenant,prompt_tokens,output_tokens", *lines]) + "\n")
    return f"csv:{path}"


def test_the_same_command_gives_the_same_bytes(trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for name in ("a", "b"):
        arguments = [
            "simulate",
            "--trace",
            trace,
            "--replicas",
            "2",
            "--policy",
            "stock,offload,recompute,swap,adaptive",
        ]
        arguments += [
            "--pool-fraction",
            "0.4",
            "--crash-interval-s",
            "20",
            "--restart-s",
            "2",
            "--check",
            "--host-gib",
            "0.5",
        ]
        assert main([*arguments, "--json", str(tmp_path / name)]) == 0
        texts.append((tmp_path / name).read_text())
    assert texts[0] == texts[1]
    report = json.loads(texts[0])
    assert list(report["arms"]) == ["stock", "offload", "recompute", "swap", "adaptive"]
    assert report["num_kv_blocks"] < report["demand_kv_blocks"]
    assert all(arm["requests"] == 150 and arm["unfinished"] == 0 for arm in report["arms"].values())
    assert report["arms"]["swap"]["swaps"] > 0 == report["arms"]["stock"]["swaps"]
    assert report["arms"]["stock"]["preemptions"] > 10
    assert all(arm["most_kv_blocks"] == report["num_kv_blocks"] - 1 for arm in report["arms"].values())
    out = capsys.readouterr().out
    assert "SIMULATED" in out
    assert "ratio to stock" in out


def test_where_memory_is_ample_the_policies_are_the_same(trace: str, tmp_path: Path) -> None:
    assert main(["simulate", "--trace", trace, "--replicas", "1", "--json", str(tmp_path / "a")]) == 0
    arms = json.loads((tmp_path / "a").read_text())["arms"]
    assert arms["stock"]["preemptions"] == 0
    assert arms["stock"] == arms["adaptive"]


def test_routers_are_compared_and_placement_finds_more_in_prefix_caches(tmp_path: Path) -> None:
    source = "synthetic:requests=300,rate=20,tenants=3,prefixes=20,prefix_tokens=2048"
    arguments = ["simulate", "--trace", source, "--replicas", "3", "--policy", "stock"]
    arguments += ["--router", "least-loaded,round-robin,placement", "--json", str(tmp_path / "a")]
    assert main(arguments) == 0
    arms = json.loads((tmp_path / "a").read_text())["arms"]
    assert list(arms) == ["least-loaded/stock", "round-robin/stock", "placement/stock"]
    assert {arm["unfinished"] for arm in arms.values()} == {0}
    shares = {name: arm["cached_share"] for name, arm in arms.items()}
    assert 0 < max(shares["least-loaded/stock"], shares["round-robin/stock"]) < shares["placement/stock"] - 0.05 < 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--replicas", "0"], "--replicas must be at least 1"),
        (["--policy", "stock,best"], "--policy has no 'best': use some of stock, offload, recompute, swap, adaptive."),
        (["--policy", "random"], "--policy has no 'random'"),
        (["--policy", "stock,stock"], "--policy names 'stock,stock', one of them twice"),
        (["--policy", "stock,offload", "--admission", "fair"], "offload is vLLM's own"),
        (["--hardware", "cpu", "--pool-blocks", "500", "--policy", "offload"], "offload is vLLM's own"),
        (["--admission", "fair-ish"], "--admission has no 'fair-ish': use some of first-come, "),
        (["--router", "placement,best"], "--router has no 'best': use some of least-loaded, "),
        (["--pool-blocks", "40"], "--bad-requests drop"),
        (["--pool-blocks", "1"], "--pool-blocks must be at least 2"),
        (["--block-size", "0"], "--block-size"),
        (["--max-num-seqs", "0"], "--max-num-seqs of a simulated engine must be at least 1"),
        (["--max-num-batched-tokens", "9"], "--max-num-batched-tokens must not be below --max-num-seqs"),
        (["--pool-fraction", "-1"], "--pool-fraction must be between 0 and 1"),
        (["--pool-fraction", "2"], "--pool-fraction must be between 0 and 1"),
        (["--plan", "ttft_p99<2s", "--gpu-hour-price", "inf"], "--gpu-hour-price must be finite"),
        (["--plan", "ttft_p99<2s", "--plot", "a.svg"], "--plan has none"),
        (["--report-loss", "2"], "--report-loss must be between 0 and 1"),
        (["--host-gib", "-1"], "--host-gib must not be negative"),
        (["--crash-interval-s", "0"], "--crash-interval-s must be above 0"),
        (["--restart-s", "-1"], "--restart-s must be above 0"),
        (["--model", "none.json"], "none.json cannot be read"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    trace: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", "--trace", trace, *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("Error: ")
    assert message in error


def test_a_share_of_0_is_a_pool_that_is_enough_for_all(trace: str, tmp_path: Path) -> None:
    path = tmp_path / "a"
    arguments = ["simulate", "--trace", trace, "--replicas", "1", "--policy", "stock", "--pool-fraction", "0"]
    assert main([*arguments, "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert report["num_kv_blocks"] > report["demand_kv_blocks"] == report["arms"]["stock"]["most_kv_blocks"]
    assert report["arms"]["stock"]["preemptions"] == 0


def test_a_result_says_what_was_simulated(trace: str, tmp_path: Path) -> None:
    path = tmp_path / "a"
    assert main(["simulate", "--trace", trace, "--replicas", "2", "--policy", "stock", "--json", str(path)]) == 0
    settings = json.loads(path.read_text())["settings"]
    assert (settings["hardware"], settings["model"], settings["replicas"]) == ("H100", "llama-3.1-8b", 2)
    text = page(read_result(path))
    assert "hardware H100, model llama-3.1-8b" in text
    assert "None" not in text


def test_what_is_described_is_written_too(trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a"
    assert main(["simulate", "--trace", trace, "--describe", "--json", str(path)]) == 0
    told = json.loads(path.read_text())["described"]
    assert (told["requests"], sorted(told["tenants"])) == (150, ["t0", "t1", "t2"])
    assert capsys.readouterr().out.startswith("150 requests in ")


@pytest.mark.parametrize("plan", [[], ["--plan", "ttft_p99<1000s"]])
def test_ctrl_c_keeps_the_arms_that_are_done(
    plan: list[str], trace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It comes when the second arm has served a quarter of its requests."""
    path = tmp_path / "a"
    stderr = Interrupting("swap")
    monkeypatch.setattr(sys, "stderr", stderr)
    arguments = ["simulate", "--trace", trace, "--replicas", "1", "--policy", "stock,swap", *plan]
    assert main([*arguments, "--json", str(path)]) == 130
    assert "Interrupted; 1 of 2 were done, and are kept." in stderr.getvalue()
    report = json.loads(path.read_text())
    assert report["partial"] is True
    assert list(report["plan"]["arms"] if plan else report["arms"]) == ["stock"]
    assert "stock" in capsys.readouterr().out
    assert "It was interrupted" in page(read_result(path))


def test_requests_that_no_replica_can_hold_are_counted(trace: str, tmp_path: Path) -> None:
    arguments = ["simulate", "--trace", trace, "--policy", "stock", "--pool-blocks", "40", "--bad-requests", "drop"]
    assert main([*arguments, "--json", str(tmp_path / "a")]) == 0
    report = json.loads((tmp_path / "a").read_text())
    assert report["dropped_requests"]["context"] > 0
    assert report["requests"] == 150 - report["dropped_requests"]["context"] == report["arms"]["stock"]["requests"]


def test_a_table_gives_back_the_records_that_it_took() -> None:
    records = [
        RequestRecord(
            request_id="7", tenant="a", arrival_s=1.0, first_token_s=2.0, finish_s=3.5, prompt_tokens=4, output_tokens=5,
            delivered_tokens=5, swaps=1, recomputes=2,
        ),
        RequestRecord(
            request_id="8", tenant="b", arrival_s=1.5, first_token_s=None, finish_s=None, prompt_tokens=4,
            output_tokens=5, delivered_tokens=0,
        ),
    ]  # fmt: skip
    table = RecordTable()
    for record in records:
        table.add(record)
    assert list(table) == records
    assert table[-1] == records[1]
    assert table[:1] == records[:1]
    with pytest.raises(IndexError, match="There are 2 records"):
        table[2]
