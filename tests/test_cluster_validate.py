"""Goal: recorded runs are simulated as they were recorded, and what is no record is refused in one sentence.

Method: a run that the simulator itself has made is found to be exact; the public runs where they are at hand.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.__main__ import main
from cluster.bench_arm import arm_names
from cluster.validate import RecordedRun, mean_times, simulated
from cost_service.calibration import write_calibration
from cost_service.engine_step import EngineStep
from cost_service.model_shape import ModelShape
from cost_service.profiled_step import ProfiledStep
from cost_service.profiles import load_profiles
from cost_service.samples import StepSample
from cost_service.step_time import MeasuredModel, StepTime
from cost_service.traces import TraceRequest
from tests.model_configs import CONFIGS
from tests.shared_data import FOLDER, needs_data
from tests.test_cost_service_engine_step import CORE
from tests.test_cost_service_evaluate import made_up_profile
from tests.test_cost_service_learner import START, TRUTH, samples

ENGINE = {"tensor_parallel_size": 1, "max_num_seqs": 8, "max_num_batched_tokens": 2048}
REQUESTS = [
    TraceRequest(arrival_s=0.01 * number, tenant="", prompt_tokens=50 + 7 * number, output_tokens=5 + number % 9)
    for number in range(40)
]


def recorded(folder: Path, profile: Path) -> Path:
    """A run with the times that the simulator gives its requests."""
    (model,) = (MeasuredModel.of(one) for one in load_profiles(profile))
    times = StepTime()
    times.fit([model])
    run = RecordedRun(model=f"maker/{model.profile.model}", engine=ENGINE, records=[])
    records = simulated(run.kind(model, ProfiledStep(model.shape, times)), REQUESTS)
    folder.mkdir()
    (folder / "meta.json").write_text(json.dumps({"model": run.model, "engine_kwargs": ENGINE}))
    (folder / "requests.jsonl").write_text(
        "".join(
            json.dumps(
                {
                    "request_id": one.request_id, "input_toks": one.prompt_tokens, "output_toks": one.output_tokens,
                    "queued_ts": 100.0 + one.arrival_s, "first_token_ts": 100.0 + (one.first_token_s or 0.0),
                    "last_token_ts": 100.0 + (one.finish_s or 0.0),
                }
            ) + "\n"
            for one in records
        )
    )  # fmt: skip
    return folder


def test_a_run_is_simulated_as_it_was_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile = made_up_profile(tmp_path, "llama-3.1-8b")
    folder, result = recorded(tmp_path / "run", profile), tmp_path / "result.json"
    assert main(["validate", "--runs", str(folder), "--profile", str(profile), "--json", str(result)]) == 0
    (figures,) = json.loads(result.read_text())["runs"].values()
    assert set(figures) == {"tpot_s_mean", "e2e_s_mean", "ttft_s_mean"}
    for one in figures.values():
        assert one["error"] == pytest.approx(0.0, abs=1e-6)
        assert one["reached"] is True
    assert "missed" not in capsys.readouterr().out


def test_times_are_means_over_finished_requests(tmp_path: Path) -> None:
    run = RecordedRun.read(recorded(tmp_path / "run", made_up_profile(tmp_path, "llama-3.1-8b")))
    one = replace(run.records[0], arrival_s=1.0, first_token_s=2.0, finish_s=5.0, output_tokens=4, delivered_tokens=4)
    assert mean_times([one]) == {"tpot_s_mean": 1.0, "e2e_s_mean": 4.0, "ttft_s_mean": 1.0}


ARMS = arm_names(["stock", "swap"], ["first-come", "fair"])


def test_a_benchmark_is_simulated_with_what_was_calibrated(tmp_path: Path) -> None:
    shape = ModelShape.from_config(CONFIGS["smollm2-135m"])
    step, calibration = EngineStep(shape, CORE), tmp_path / "calibration"
    calibration.mkdir()
    steps = [
        StepSample(
            num_decodes=num, decode_tokens=num * 99, prefills=prefills, seconds=step.step_s(num, num * 99, prefills)
        )
        for num in range(1, 17)
        for prefills in ((), ((0, 10 * num),), ((0, 99), (0, 40)))
    ]
    write_calibration(calibration, START, samples(TRUTH, 400), steps, [])
    (calibration / "config.json").write_text(json.dumps(CONFIGS["smollm2-135m"]))
    record = {
        "request_id": "a", "tenant": "t", "arrival_s": 0.0, "first_token_s": 0.2, "finish_s": 0.9, "prompt_tokens": 90,
        "output_tokens": 20, "delivered_tokens": 20,
    }  # fmt: skip
    run = {
        "records": [record | {"request_id": str(number)} for number in range(6)], "throughput_tokens_per_s": 100.0,
        "weighted_turnaround_mean": 2.0, "preemptions": 0,
    }  # fmt: skip
    settings = {
        "num_kv_blocks": 100, "block_size": 16, "max_num_seqs": 4, "max_model_len": 200, "host_pool_bytes": 1 << 20,
        "dtype": "bfloat16", "accelerator": "cpu", "policies": ["stock", "swap"], "admissions": ["first-come", "fair"],
        "known_lengths": False,
    }  # fmt: skip
    alone = {"ttft_s": 0.1, "ttft_s_per_prompt_token": 0.0, "s_per_output_token": 0.01}
    file, result = tmp_path / "bench.json", tmp_path / "result.json"
    file.write_text(
        json.dumps({"settings": settings, "calibration": alone, "arms": {arm: {"repeats": [run]} for arm in ARMS}})
    )
    command = ["validate", "--bench", str(file), "--profile", str(calibration), "--json", str(result)]
    assert main(command) == 0
    runs = json.loads(result.read_text())["runs"]
    assert tuple(runs) == ARMS
    for one in runs.values():
        assert one["throughput_tokens_per_s"]["simulated"] > 0
        assert one["preemptions"] == {"simulated": 0, "measured": 0, "asked": 0.2, "error": None, "reached": True}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "Give either --runs or --bench or --arena"),
        (["--runs", ".", "--bench", "x.json"], "Give either --runs or --bench or --arena"),
        (["--arena", "."], "not with --arena"),
        (["--runs", "{folder}/empty"], "has no requests.jsonl"),
        (["--runs", "{folder}/damaged"], "is no recorded run"),
        (["--bench", "{folder}/damaged/meta.json"], "must be a result of bench"),
    ],
)
def test_what_is_no_record_is_refused(
    tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = made_up_profile(tmp_path, "llama-3.1-8b")
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "meta.json").write_text('{"model": "a"}')
    (tmp_path / "damaged" / "requests.jsonl").write_text('{"queued_ts": 1}\n')
    given = [option.replace("{folder}", str(tmp_path)) for option in options]
    assert main(["validate", "--profile", str(profile), *given]) == 2
    assert message in capsys.readouterr().err


@needs_data
@pytest.mark.slow
def test_the_public_runs_are_simulated_nearly_as_well_as_is_asked(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    runs, profiles = FOLDER / "vllm_runs", FOLDER / "vllm_profiles" / "RTXPRO6000"
    assert main(["validate", "--runs", str(runs), "--profile", str(profiles), "--json", str(result)]) == 0
    for figures in json.loads(result.read_text())["runs"].values():
        assert abs(figures["tpot_s_mean"]["error"]) < 0.06
        assert abs(figures["e2e_s_mean"]["error"]) < 0.05
        assert abs(figures["ttft_s_mean"]["error"]) < 0.15
