"""Goal: `python -m cluster bench` measures real engines, says what a wrong option is, and leaves no process behind.

Method: wrong options in this process, without engines; then the command itself, once to its end and twice cut short. A
variable in its environment marks its processes, so that those of others do not count.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from cluster import bench
from cluster.bench_arm import EngineSettings, read_engine_kwargs
from cluster.bench_progress import Progress
from cluster.bench_runs import run_arms
from cluster.bootstrap import has_nvidia_gpu
from cluster.records import RequestRecord, RunResult
from cluster.report import page
from cluster.workload import Workload

ROOT = Path(__file__).parents[1]
MARK = "ADAPTIVELLM_TEST_MARK"
SMALL = "synthetic:requests=12,rate=inf,tenants=2,output_mean=100"


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(arguments)


WITHOUT_GPU = pytest.mark.skipif(has_nvidia_gpu(), reason="there is a GPU: this is no wrong option")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "stock,swop"], "--policy has no 'swop': use some of stock, recompute, swap"),
        (["--policy", "stock,stock"], "--policy names an arm twice"),
        (["--policy", ""], "--policy has no ''"),
        (["--admission", "fair,fare"], "--admission has no 'fare': use some of first-come, fair."),
        (["--admission", "fair,fair"], "--admission names an arm twice"),
        pytest.param(["--policy", "stock,offload"], "The arm offload", marks=WITHOUT_GPU),
        pytest.param(["--random-model", "llama-8b"], "the models llama-8b need an NVIDIA GPU", marks=WITHOUT_GPU),
        (["--repeats", "0"], "--repeats must be above 0"),
        (["--max-num-seqs", "-1"], "--max-num-seqs must be above 0"),
        (["--threads", "0"], "--threads must be above 0"),
        (["--limit-s", "nan"], "--limit-s must be above 0"),
        (["--limit-s", "inf"], "--limit-s must be above 0 and finite"),
        (["--pool-fraction", "1.5"], "--pool-fraction must be between 0 and 1"),
        (["--pool-fraction", "nan"], "--pool-fraction must be between 0 and 1"),
        (["--host-pool-bytes", "-1"], "--host-pool-bytes must not be negative"),
        (["--trace", "synthetic:requets=5"], "Unknown workload key 'requets'"),
        (["--trace", "synthetic:vocab=513"], "vocab_size is 512 and the workload needs 513"),
        (
            ["--trace", "synthetic:prompt_max=5000,prompt_mean=5000,output_mean=140,spread=0"],
            "has 5140 tokens and the model's context 4096: shorten requests by --max-tokens",
        ),
        (["--trace", "csv:/nowhere/at/all.csv"], "/nowhere/at/all.csv is neither file nor folder"),
        (["--trace", "nosuch:x"], "--trace 'nosuch:x' must be SOURCE:PATH with a source of azure,"),
        (["--window", "5:1"], "--window must be FROM:TO in seconds"),
        (["--flood", "rate=0"], "rate must be above 0 and finite"),
        (["--max-tokens", "1"], "--max-tokens must be at least 2"),
        (["--describe", "--window", "900:901"], "No request is left of the --trace"),
        (["--off-pressure", "--max-num-seqs", "8"], "--off-pressure sets --max-num-seqs itself"),
        (["--model", "/nowhere/at/all"], "has no config.json"),
        (["--model", "owner/name"], "--model must be a folder"),
    ],
)
def test_a_wrong_option_is_one_sentence_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main(options(*arguments)) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("Error: ")
    assert message in printed.err


def test_the_off_pressure_preset_fills_256_places_at_once(tmp_path: Path) -> None:
    plan = bench.plan_of(options("--off-pressure"), tmp_path)
    assert (plan.engine.max_num_seqs, plan.pool_fraction) == (256, 0)
    (workload,) = set(plan.workloads)
    assert [request.arrival_s for request in workload] == [0.0] * 256
    assert {request.output_tokens for request in workload} == {64}


def test_arms_are_all_pairs_of_admission_and_policy_and_vllms_own_is_the_one_to_compare_with(tmp_path: Path) -> None:
    both = bench.plan_of(options("--policy", "stock,adaptive", "--admission", "first-come,fair"), tmp_path / "a")
    assert list(both.arms) == ["first-come/stock", "first-come/adaptive", "fair/stock", "fair/adaptive"]
    assert both.stock_arm == "first-come/stock"
    assert bench.plan_of(options("--policy", "stock,swap"), tmp_path / "b").stock_arm == "stock"
    assert bench.plan_of(options("--policy", "stock", "--admission", "fair"), tmp_path / "c").stock_arm is None


def test_a_bound_is_stated_for_fair_arms_of_several_tenants(tmp_path: Path) -> None:
    """Two tenants of weight 1 in 31 blocks of 32 tokens; 4096 may be granted ahead: 2 (2 (31 * 32) + 4096)."""
    lengths = "spread=0,prompt_mean=40,output_mean=30"
    arguments = ["--policy", "stock,swap", "--admission", "first-come,fair", "--trace"]
    plan = bench.plan_of(options(*arguments, f"synthetic:requests=9,tenants=2,{lengths}"), tmp_path / "a")
    assert plan.pair_bound("first-come/swap", 32) is None
    assert plan.pair_bound("fair/swap", 32) == 2 * (2 * 31 * 32 + 4096)
    assert plan.pair_bound("fair/stock", 32) == 2 * (2 * 32 * 30 + 4096)  # victims are the last who came, of 32 running
    one = bench.plan_of(options(*arguments, f"synthetic:requests=9,tenants=1,{lengths}"), tmp_path / "b")
    assert one.pair_bound("fair/swap", 32) is None


def test_where_no_arms_are_named_the_products_own_is_among_them(tmp_path: Path) -> None:
    assert list(bench.plan_of(options(), tmp_path).arms) == ["stock", "swap", "adaptive"]


def test_repeats_have_the_same_requests_unless_the_seed_shall_vary(tmp_path: Path) -> None:
    same = bench.plan_of(options("--repeats", "3"), tmp_path / "a").workloads
    other = bench.plan_of(options("--repeats", "3", "--vary-seed"), tmp_path / "b").workloads
    assert len(same) == len(other) == len(set(other)) == 3
    assert set(same) == {other[0]}


def test_ample_memory_holds_the_largest_requests_that_may_run_at_once() -> None:
    # 70 tokens: 3 blocks of 32 each
    requests = Workload(trace="synthetic:requests=5,spread=0,prompt_mean=40,output_mean=30").prompted(512)
    assert bench.ample_blocks(requests, 4) == 4 * 3 + 1
    assert bench.ample_blocks(requests, 9) == 5 * 3 + 1


def test_stock_is_vllms_own_scheduler_without_a_connector() -> None:
    settings: dict[str, Any] = {
        "model": "folder", "num_kv_blocks": 9, "host_pool_bytes": 77, "max_num_seqs": 4, "max_model_len": 100,
        "block_size": 32, "dtype": "float32", "load_format": "auto", "threads": 1,
        "accelerator": "cpu",
    }  # fmt: skip
    stock = EngineSettings(policy="stock", **settings).engine_arguments()
    swap = EngineSettings(policy="swap", **settings).engine_arguments()
    assert {key: swap[key] for key in stock} == stock
    assert set(swap) - set(stock) == {"scheduler_cls", "kv_transfer_config"}
    assert swap["kv_transfer_config"]["kv_connector_extra_config"] == {
        "preemption": "swap", "admission": "first-come", "host_pool_bytes": 77
    }  # fmt: skip
    fair = EngineSettings(policy="stock", admission="fair", **settings).engine_arguments()
    assert set(fair) - set(stock) == {"scheduler_cls"}  # our order alone: victims and their fate are vLLM's
    gpu = settings | {"accelerator": "gpu", "host_pool_bytes": 3 << 30}
    offload = EngineSettings(policy="offload", **gpu).engine_arguments()
    assert offload == EngineSettings(policy="stock", **gpu).engine_arguments() | {"kv_offloading_size": 3.0}
    assert "AsyncScheduler" in EngineSettings(policy="swap", **gpu).engine_arguments()["scheduler_cls"]
    unlimited = EngineSettings(policy="stock", **settings | {"num_kv_blocks": None})
    assert "num_gpu_blocks_override" not in unlimited.engine_arguments()
    third = EngineSettings(policy="stock", memory_share=1 / 3, engine_kwargs={"enforce_eager": True}, **gpu)
    assert third.engine_arguments()["gpu_memory_utilization"] == pytest.approx(0.3)  # three arms share one GPU
    assert third.engine_arguments()["enforce_eager"]


@pytest.mark.parametrize("text", ["[1]", "{", '{"model": "other"}', '{"scheduler_cls": "x.Y"}'])
def test_engine_arguments_that_are_none_or_set_by_the_benchmark_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--engine-kwargs"):
        read_engine_kwargs(text)
    assert read_engine_kwargs('{"enforce_eager": true}') == {"enforce_eager": True}


DONE = RunResult(
    records=[RequestRecord(request_id="a", tenant="t", arrival_s=0.0, first_token_s=1.0, finish_s=2.0, prompt_tokens=4,
                           output_tokens=2, delivered_tokens=2)],
    run_end_s=2.0, peak_kv_blocks=1, computed_tokens=5,
    scheduler={"steps": 2.0, "most_running": 1, "us_median_with_most_running": 9.0}, preemption_costs={},
    tokens={"a": [1, 2]},
)  # fmt: skip


def test_runs_that_are_done_need_no_engine(tmp_path: Path) -> None:
    plan = bench.plan_of(options("--policy", "stock,swap", "--repeats", "2", "--trace", SMALL), tmp_path)
    progress = Progress(tmp_path / "parts", plan.identity())
    for repeat in (1, 2):
        for policy in ("stock", "swap"):
            progress.part(f"repeat {repeat}, {policy}", lambda: asdict(DONE))
    said: list[str] = []
    runs = run_arms(plan, tmp_path, 8, said.append, Progress(tmp_path / "parts", plan.identity()))
    assert runs == {"stock": [DONE, DONE], "swap": [DONE, DONE]}
    assert said == ["4 of 4 runs were done before"]


@pytest.mark.parametrize(("num_done", "whole"), [(1, 0), (2, 1), (3, 1), (4, 2)])
def test_of_an_interrupted_benchmark_whole_repeats_are_reported(
    num_done: int, whole: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = bench.plan_of(options("--policy", "stock,swap", "--repeats", "2", "--trace", SMALL), tmp_path)
    progress = Progress(None, plan.identity())
    calibration = {"ttft_s": 0.1, "ttft_s_per_prompt_token": 0.0, "s_per_output_token": 0.1}
    alone = {"calibration": calibration, "check": {}, "ample": [asdict(DONE)], "versions": {}}
    progress.part("alone", lambda: alone)
    for name in ["repeat 1, stock", "repeat 1, swap", "repeat 2, swap", "repeat 2, stock"][:num_done]:
        progress.part(name, lambda: asdict(DONE))

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "run_arms", interrupted)
    if whole == 0:
        with pytest.raises(KeyboardInterrupt):
            bench.measure(plan, tmp_path, print, progress)
        return
    report = bench.measure(plan, tmp_path, print, progress)
    assert [len(arm["repeats"]) for arm in report["arms"].values()] == [whole, whole]
    assert report.get("partial_repeats") == (whole if whole < 2 else None)
    assert report.get("partial", False) == (whole < 2)
    assert report["ratio_to_stock"]["swap"]["throughput_tokens_per_s"]["median"] == 1


def test_the_gap_of_a_fair_arm_stands_against_the_bound(tmp_path: Path) -> None:
    arguments = ("--policy", "swap", "--admission", "fair", "--repeats", "1", "--trace", SMALL)
    plan = bench.plan_of(options(*arguments), tmp_path)
    progress = Progress(None, plan.identity())
    calibration = {"ttft_s": 0.1, "ttft_s_per_prompt_token": 0.0, "s_per_output_token": 0.1}
    alone = {"calibration": calibration, "check": {}, "ample": [asdict(DONE)], "versions": {}}
    progress.part("alone", lambda: alone)
    progress.part("repeat 1, swap", lambda: asdict(DONE))
    report = bench.measure(plan, tmp_path, print, progress)
    (run,) = report["arms"]["swap"]["repeats"]
    bound = plan.pair_bound("swap", report["settings"]["num_kv_blocks"])
    assert bound is not None
    gap = run["max_service_gap"]
    assert run["fairness"] == {"max_service_gap": gap, "bound": bound, "gap_over_bound": gap / bound}
    assert f"<td>fairness: bound</td><td>{bound:.4g}</td>" in page(report)


@pytest.mark.engine
def test_the_command_measures_every_policy_to_the_token(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    command, mark = start(
        "bench",
        "--policy",
        "stock,swap,recompute",
        "--repeats",
        "1",
        "--trace",
        SMALL,
        "--check-exact",
        "--json",
        str(file),
    )
    out, err = command.communicate(timeout=500)
    assert command.returncode == 0, err
    assert processes(mark) == []
    assert "repeat 1/1" in err
    assert list(tmp_path.iterdir()) == [file], "parts are left behind"
    assert "swap / stock" in out
    assert str(tmp_path) not in file.read_text()
    assert os.uname().nodename not in file.read_text()
    report = json.loads(file.read_text())
    assert set(report) == {
        "benchmark", "command", "machine", "settings", "calibration", "arms", "interval", "ratio_to_stock",
        "added_scheduler_us_per_step",
    }  # fmt: skip
    assert list(report["arms"]) == ["stock", "swap", "recompute"]
    assert 0 < report["calibration"]["check"]["median_error"] < 1
    settings = report["settings"]
    assert settings["num_kv_blocks"] - 1 == -(-settings["demand_kv_blocks"] * 4 // 10)  # beside vLLM's null block
    for policy, arm in report["arms"].items():
        (one,) = arm["repeats"]
        assert arm["requests_with_other_tokens"] == 0
        assert (one["requests"], one["unfinished"]) == (12, 0)
        assert sorted(one["tenants"]) == ["tenant-0", "tenant-1"]
        assert one["throughput_tokens_per_s"] > 0
        assert one["weighted_turnaround_p99"] >= one["weighted_turnaround_mean"] > 0.5
        assert one["peak_kv_blocks"] < settings["num_kv_blocks"] < settings["demand_kv_blocks"]
        assert one["preemptions"] == one["swaps" if policy == "swap" else "recomputes"] > 0
        assert one["scheduler"]["us_median"] > 0
        assert len(one["records"]) == 12
        measured = one["preemption_costs"].get(policy)
        assert policy == "stock" or measured["measured_s"] > 0 < measured["predicted_s"]
    computed = {policy: arm["repeats"][0]["computed_tokens"] for policy, arm in report["arms"].items()}
    assert computed["swap"] < computed["recompute"]
    for policy in ("swap", "recompute"):
        assert report["ratio_to_stock"][policy]["throughput_tokens_per_s"]["median"] > 0


@pytest.mark.engine
@pytest.mark.slow
def test_the_sweep_over_links_measures_a_simulated_link_and_says_so(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    command, mark = start(
        "bench-link", "--policy", "recompute,swap,adaptive", "--speeds", "100", "--random-model", "tiny",
        "--repeats", "1", "--trace", SMALL, "--json", str(file),
    )  # fmt: skip
    out, err = command.communicate(timeout=500)
    assert command.returncode == 0, err
    assert processes(mark) == []
    assert out.startswith("Link SIMULATED: ")
    report = json.loads(file.read_text())
    assert list(report["speeds"]) == ["100"]
    for speed, result in report["speeds"].items():
        assert result["link_bytes_per_s"] == pytest.approx(float(speed) * report["break_even_bytes_per_s"])
        assert list(result["arms"]) == ["recompute", "swap", "adaptive"]
        for policy, arm in result["arms"].items():
            assert arm["unfinished"] == 0
            assert arm["preemptions"] == arm["swaps"] + arm["recomputes"]
            assert policy == "adaptive" or arm[f"{policy}s"] == arm["preemptions"] > 0
        assert set(result["ratios"]["throughput_tokens_per_s"]) == {
            "adaptive/recompute", "adaptive/swap", "adaptive/best_fixed", "swap/recompute"
        }  # fmt: skip


@pytest.mark.engine
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_command_cut_short_leaves_no_engine(number: signal.Signals, status: int) -> None:
    command, mark = start("bench", "--trace", SMALL)
    try:
        wait_for(lambda: len(processes(mark)) == 2, "the first engine to start", limit_s=60)
        command.send_signal(number)
        out, err = command.communicate(timeout=60)
        assert command.returncode == status
        assert out == ""
        assert number == signal.SIGKILL or err.splitlines()[-1] == "Interrupted; all engines are ended."
        # Nobody is left to end the engine of a killed command: it ends by itself when it looks for its next line.
        wait_for(lambda: processes(mark) == [], "the engine to end", limit_s=120 if number == signal.SIGKILL else 1)
    finally:
        for process_id in processes(mark):
            os.kill(process_id, signal.SIGKILL)


@pytest.mark.engine
@pytest.mark.slow
def test_ctrl_c_keeps_the_repeats_that_engines_have_measured_and_the_command_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    arguments = ("bench", "--policy", "stock,swap", "--repeats", "2", "--trace", SMALL, "--json", str(file))
    command, mark = start(*arguments)
    assert command.stderr is not None
    assert any("repeat 1/2, swap" in line for line in command.stderr)
    command.send_signal(signal.SIGINT)
    command.communicate(timeout=60)
    assert command.returncode == 130
    assert processes(mark) == []
    assert json.loads(file.read_text())["partial_repeats"] == 1
    command, _ = start(*arguments)
    _, err = command.communicate(timeout=500)
    assert command.returncode == 0, err
    assert "of 4 runs were done before" in err
    assert "partial" not in json.loads(file.read_text())


def start(*arguments: str) -> tuple[subprocess.Popen[str], str]:
    """Start the command in a process of its own; return it and the mark of its processes."""
    mark = uuid.uuid4().hex
    command = subprocess.Popen(
        [sys.executable, "-m", "cluster", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {MARK: mark},
    )
    return command, mark


def processes(mark: str) -> list[int]:
    """Processes that carry the mark and have not ended."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:  # it has just ended, or is somebody else's
            continue
    return found


def wait_for(condition: Callable[[], bool], what: str, *, limit_s: float) -> None:
    end_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end_s, f"waited {limit_s} s for {what}"
        time.sleep(0.1)
