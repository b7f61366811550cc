"""Goal: a GPU that nothing was measured on has costs from its datasheet, and says how uncertain they are."""

import json
import re
from pathlib import Path

import pytest

from cost_service.__main__ import main
from cost_service.engine_step import EngineBatch, EngineStep
from cost_service.hardware import HARDWARE, UNCERTAINTY, Datasheet, Hardware, known_hardware
from cost_service.model_shape import ModelShape
from cost_service.snapshot import CostSnapshot
from tests.model_configs import CONFIGS

SHEET = "name=X9,flops=2e14,bytes=1e12,host=3e10"


@pytest.mark.parametrize(
    ("device", "name"),
    [("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA L40S", "L40S"), ("NVIDIA L4", "L4"), ("NVIDIA A100-SXM4-80GB", "A100"),
     ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTXPRO6000"), ("Tesla T4", None)],
)  # fmt: skip
def test_a_device_is_known_by_the_longest_name_in_its_own(device: str, name: str | None) -> None:
    found = known_hardware(device)
    assert (found.name if found else None) == name


def test_a_datasheet_gives_less_than_its_peaks() -> None:
    sheet = Datasheet.parse(SHEET)
    hardware = Hardware.of_datasheet(sheet)
    assert 0 < hardware.flops_per_s < sheet.flops_per_s
    assert 0 < hardware.bytes_per_s < sheet.bytes_per_s
    assert 0 < hardware.copy_bytes_per_s < sheet.host_bytes_per_s


NOT_SHEETS = [
    "", "name=X", "name=X,flops=1,bytes=1,host=0", "name=X,flops=1,bytes=1,host=fast", "name=,flops=1,bytes=1,host=1",
    "name=X,flops=1,bytes=1,host=1,host=2", "name=X,flops=nan,bytes=1,host=1",
]  # fmt: skip


@pytest.mark.parametrize("text", NOT_SHEETS)
def test_a_datasheet_that_lacks_something_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="datasheet"):
        Datasheet.parse(text)


def test_a_cold_step_has_the_intervals_of_a_guess() -> None:
    step = EngineStep.cold(ModelShape.from_config(CONFIGS["llama-3.1-8b"]), HARDWARE["H100"])
    one = step.estimate([EngineBatch(64, 64 * 1000.0)])
    assert one.high_s[0] / one.seconds[0] == pytest.approx(UNCERTAINTY)
    assert one.seconds[0] / one.low_s[0] == pytest.approx(UNCERTAINTY)
    # 16 GB of weights and 8 GB of KV at 3.35 TB/s take 7 ms at the least.
    assert 0.007 < one.seconds[0] < 0.02


def test_the_command_writes_costs_for_a_gpu_that_was_never_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, result = tmp_path / "llama" / "config.json", tmp_path / "costs.json"
    config.parent.mkdir()
    config.write_text(json.dumps(CONFIGS["llama-3.1-8b"]))
    for sheet, name in ((SHEET, "X9"), ("H100", "H100")):
        assert main(["fit", "--datasheet", sheet, "--model-config", str(config), "--json", str(result)]) == 0
        assert "nothing was measured" in capsys.readouterr().out
        document = json.loads(result.read_text())
        costs = CostSnapshot.from_json(json.dumps(document["snapshots"]["llama"]))
        assert (costs.hardware, costs.version, document["uncertainty_factor"]) == (name, 0, UNCERTAINTY)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["fit"], "Give either --profile or --datasheet"),
        (["fit", "--profile", ".", "--datasheet", SHEET], "Give either --profile or --datasheet"),
        (["fit", "--datasheet", SHEET], "needs --model-config"),
        (["fit", "--datasheet", "T4", "--model-config", "config.json"], "A datasheet must have each of"),
        (["fit", "--datasheet", SHEET, "--model-config", "nowhere.json"], "nowhere.json cannot be read"),
        (["evaluate", "--profile", ".", "--cold", "--holdout", "tokens > 3"], "--cold fits nothing|has no profile"),
    ],
)
def test_what_does_not_fit_together_is_said(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(options) == 2
    assert re.search(message, capsys.readouterr().err)
