"""Goal: a simulation is timed by what the user names, says so, and refuses what does not belong together."""

import json
from pathlib import Path

import pytest

from cluster.__main__ import main
from cost_service.calibration import write_calibration
from cost_service.engine_step import EngineStep
from cost_service.model_shape import ModelShape
from cost_service.samples import StepSample
from tests.model_configs import CONFIGS
from tests.test_cost_service_engine_step import CORE
from tests.test_cost_service_evaluate import made_up_profile
from tests.test_cost_service_learner import START, TRUTH, samples

SHORT = ["simulate", "--trace", "synthetic:requests=20,rate=5", "--replicas", "1", "--policy", "stock,adaptive"]


def simulated(file: Path, *options: str) -> dict[str, object]:
    assert main([*SHORT, *options, "--json", str(file)]) == 0
    report: dict[str, object] = json.loads(file.read_text())
    return report


@pytest.fixture
def calibration(tmp_path: Path) -> Path:
    folder = tmp_path / "calibration"
    folder.mkdir()
    step = EngineStep(ModelShape.from_config(CONFIGS["smollm2-135m"]), CORE)
    steps = [
        StepSample(
            num_decodes=num, decode_tokens=num * 99, prefills=prefills, seconds=step.step_s(num, num * 99, prefills)
        )
        for num in range(1, 17)
        for prefills in ((), ((0, 10 * num),))
    ]
    write_calibration(folder, START, samples(TRUTH, 400), steps, [])
    (folder / "config.json").write_text(json.dumps(CONFIGS["smollm2-135m"]))
    return folder


def test_times_come_from_a_datasheet_a_profile_or_a_calibration(tmp_path: Path, calibration: Path) -> None:
    profile = made_up_profile(tmp_path, "llama-3.1-8b")
    gpu = json.loads(json.dumps(simulated(tmp_path / "a.json")))
    measured = simulated(
        tmp_path / "b.json", "--profile", str(calibration), "--hardware", "cpu", "--pool-blocks", "500"
    )
    assert "datasheet" in gpu["simulated"]
    assert "calibration" in str(measured["simulated"])
    assert json.dumps(measured["calibration"]) != json.dumps(gpu["calibration"])
    assert main([*SHORT, "--profile", str(profile), "--model", "llama-3.1-8b", "--hardware", "cpu"]) == 2


def test_a_profile_without_attention_is_named_and_reading_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = made_up_profile(tmp_path, "llama-3.1-8b")
    gpu = made.parent.rename(tmp_path / "H100")
    (gpu / made.name / "meta.yaml").write_text("hardware: H100\n")
    next(gpu.rglob("attention.csv")).unlink()
    assert main([*SHORT, "--profile", str(gpu / made.name)]) == 2
    said, error = capsys.readouterr().err.splitlines()
    assert said.startswith("Reading ")
    assert "has no attention.csv of H100" in error
    assert "name the folder above it, H100," in error


def test_attention_that_was_measured_with_another_model_is_said_to_be(tmp_path: Path) -> None:
    for name in ("llama-3.1-8b", "llama-3.1-70b"):
        made_up_profile(tmp_path, name)
    folder = (tmp_path / "MADEUP1").rename(tmp_path / "H100")
    options = ("--profile", str(folder), "--hardware", "H100", "--model", "llama-3.1-8b")
    assert "carried over" not in str(simulated(tmp_path / "a.json", *options)["simulated"])
    (folder / "llama-3.1-8b/tp1/attention.csv").unlink()
    said = str(simulated(tmp_path / "b.json", *options)["simulated"])
    assert "carried over from H100 llama-3.1-70b tp1" in said


def test_another_block_size_than_the_calibrated_one_is_refused(
    calibration: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SHORT, "--profile", str(calibration), "--block-size", "32"]) == 2
    assert "--block-size must be 16" in capsys.readouterr().err


def test_a_device_without_room_for_the_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIGS["llama-3.1-70b"]))
    assert main([*SHORT, "--model", str(config), "--hardware", "L4"]) == 2
    assert "name --pool-blocks" in capsys.readouterr().err
