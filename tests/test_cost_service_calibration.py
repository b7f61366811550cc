"""Goal: what a calibration measured is read back, learned from and judged, or refused with file and line.

Method: folders written by the tests; one calibration of a tiny model by the command.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cost_service.__main__ import main
from cost_service.calibration import (
    MeasuredPreemption,
    is_calibration,
    judged_steps,
    learned_snapshot,
    preemption_figures,
    read_preemptions,
    read_steps,
    write_calibration,
)
from cost_service.engine_step import EngineStep
from cost_service.model_shape import ModelShape
from cost_service.samples import StepSample
from cost_service.snapshot import CostSnapshot
from tests.engine_runs import write_weights
from tests.model_configs import CONFIGS
from tests.test_cost_service_engine_step import CORE
from tests.test_cost_service_learner import START, TRUTH, samples

STEPS = [
    StepSample(
        num_decodes=num, decode_tokens=num * context, prefills=prefills,
        seconds=EngineStep(ModelShape.from_config(CONFIGS["smollm2-135m"]), CORE).step_s(num, num * context, prefills),
    )
    for context in (50, 100, 200) for num in range(1, 17) for prefills in ((), ((0, context),))
]  # fmt: skip


def preemption(number: int, predicted_s: float, *, action: str = "swap", residual: bool = True) -> MeasuredPreemption:
    return MeasuredPreemption(round=number, action=action, residual=residual, predicted_s=predicted_s, measured_s=1.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    preemptions = [
        preemption(0, 3.0),
        preemption(1, 1.1),
        preemption(1, 1.3),
        preemption(1, 0.9),
        preemption(2, 2.0, residual=False),
    ]
    preemptions.append(preemption(1, 1.5, action="recompute"))
    write_calibration(tmp_path, START, samples(TRUTH, 400), STEPS, preemptions)
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["smollm2-135m"]))
    return tmp_path


def test_a_calibration_comes_back_as_it_was_written(folder: Path) -> None:
    assert is_calibration(folder)
    found = read_preemptions(folder)
    assert len(found) == 6
    assert found[1] == preemption(1, 1.1)
    learned = learned_snapshot(folder)
    assert learned.version == START.version + 1
    assert read_steps(folder) == STEPS
    assert learned.out_block_s == pytest.approx(TRUTH.out_block_s, rel=0.2)


def test_errors_are_those_of_rounds_that_were_not_fitted(folder: Path) -> None:
    figures = preemption_figures(read_preemptions(folder))
    assert {name: round(one["median_error"], 6) for name, one in figures.items()} == {
        "recompute_learned": 0.5, "swap_before_learning": 2.0, "swap_learned": 0.1, "swap_without_residual": 1.0
    }  # fmt: skip
    assert figures["swap_learned"]["reached"] is True
    assert figures["recompute_learned"]["reached"] is False
    assert (
        preemption_figures(
            [preemption(1, 1.0).__class__(round=1, action="swap", residual=True, predicted_s=1.0, measured_s=0.0)]
        )
        == {}
    )


def test_the_commands_read_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = folder / "result.json"
    assert main(["fit", "--profile", str(folder), "--json", str(result)]) == 0
    (document,) = json.loads(result.read_text())["snapshots"].values()
    assert CostSnapshot.from_json(json.dumps(document)) == learned_snapshot(folder)
    assert main(["evaluate", "--profile", str(folder), "--json", str(result)]) == 0
    assert "swap_learned" in capsys.readouterr().out
    figures = json.loads(result.read_text())["figures"]
    assert figures["swap_learned"]["preemptions"] == 3
    assert figures["engine_step"]["rows"] == len(STEPS) // 3
    assert figures["engine_step"]["reached"] is True


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("samples.jsonl", '{"type":"copy"}\n', "Line 1 of .*samples.jsonl is none of a calibration"),
        ("steps.jsonl", '{"seconds":1.0}\n', "Line 1 of .*steps.jsonl is none of a calibration"),
        ("config.json", '{"hidden_size":', "config.json must be JSON"),
        ("config.json", "{}", "config.json"),
        ("start.json", "{}", "must be the JSON object that the cost service writes"),
        ("preemptions.csv", "round,action\n1,swap\n", "Line 2 of .*preemptions.csv is no preemption"),
        ("preemptions.csv", "round,action,residual,predicted_s,measured_s\n1,swap,True,nan,1\n", "not finite"),
    ],
)
def test_what_is_damaged_is_named(folder: Path, file: str, text: str, message: str) -> None:
    (folder / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        (learned_snapshot(folder), read_preemptions(folder), judged_steps(folder))


def test_what_is_missing_is_named(folder: Path) -> None:
    (folder / "preemptions.csv").unlink()
    with pytest.raises(ValueError, match=r"has no preemptions\.csv: calibrate again"):
        read_preemptions(folder)
    (folder / "start.json").unlink()
    with pytest.raises(ValueError, match=r"has no start\.json to read"):
        learned_snapshot(folder)


@pytest.mark.engine
def test_the_command_measures_preemptions_of_a_real_engine(tiny_model: Path, tmp_path: Path) -> None:
    write_weights(tiny_model)
    output = tmp_path / "calibration"
    command = [sys.executable, "-m", "cluster", "calibrate", "--model", str(tiny_model), "--output", str(output)]
    told = tmp_path / "told.json"
    options = ["--rounds", "3", "--requests", "24", "--json", str(told)]
    answer = subprocess.run(
        [*command, *options], capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"},
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr[-2000:]
    assert "Round 3 of 3" in answer.stderr
    preemptions = read_preemptions(output)
    assert {one.action for one in preemptions} == {"swap", "recompute"}
    assert len({one.round for one in preemptions}) > 1
    learned = learned_snapshot(output)
    assert learned.version == 1
    assert learned.model == tiny_model.name
    # Who gives way how is chance here: some rounds have one action only.
    assert json.loads(told.read_text())["figures"] == preemption_figures(preemptions) != {}
    assert 0.0 < judged_steps(output).figures()["median_error"] < 1.0
    again = subprocess.run([*command, *options], capture_output=True, text=True, timeout=60, check=False)
    assert again.returncode == 2
    assert again.stderr.startswith("Error: --output")
