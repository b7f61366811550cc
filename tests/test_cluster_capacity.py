"""Goal: a plan names the fewest replicas with which conditions hold, and what they cost.

Method: the search over made-up answers (property test), conditions as users write them, and the command itself.
"""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.__main__ import main
from cluster.capacity import Condition, fewest, parse_conditions

COMMAND = [
    "simulate", "--trace", "synthetic:requests=300,rate=40,prompt_mean=2000,prompt_max=6000,output_mean=300,output_max=900",
    "--pool-blocks", "1500", "--policy", "stock,adaptive",
]  # fmt: skip


@given(needed=st.integers(1, 40), most=st.integers(1, 40))
def test_the_fewest_that_suffice_are_found(needed: int, most: int) -> None:
    asked: list[int] = []

    def meets(num: int) -> bool:
        asked.append(num)
        return num >= needed

    assert fewest(meets, most) == (needed if needed <= most else None)
    assert len(set(asked)) == len(asked), "a simulation was run twice"


def test_conditions_are_read_with_their_units() -> None:
    assert parse_conditions("ttft_p99<2s, tpot_p99 < 50ms,weighted_turnaround_mean<3") == [
        Condition("ttft_p99", 2.0), Condition("tpot_p99", 0.05), Condition("weighted_turnaround_mean", 3.0)
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text", ["", "ttft_p99", "ttft_p99>2s", "ttft<2s", "ttft_p99<fast", "ttft_p99<1.2.3s", "ttft_p99<2h"]
)
def test_conditions_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--plan"):
        parse_conditions(text)


def test_the_command_plans_for_every_policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    assert main([*COMMAND, "--plan", "ttft_p99<1s", "--gpu-hour-price", "4", "--json", str(file)]) == 0
    assert "SIMULATED: replicas for ttft_p99<1s" in capsys.readouterr().out
    report = json.loads(file.read_text())
    for one in report["plan"]["arms"].values():
        assert one["replicas"] > 1
        assert one["ttft_s_p99"] < 1.0
        assert one["price_per_million_tokens"] > 0
    assert main(["report", str(file)]) == 0
    text = file.with_suffix(".html").read_text()
    assert "For ttft_p99&lt;1s" in text
    shown = "".join(f"<td>{one['replicas']}</td>" for one in report["plan"]["arms"].values())
    assert f"<td>replicas</td>{shown}" in text
    fewer = report["plan"]["arms"]["stock"]["replicas"] - 1
    assert main([*COMMAND, "--replicas", str(fewer), "--json", str(file)]) == 0
    assert json.loads(file.read_text())["arms"]["stock"]["ttft_s_p99"] >= 1.0


def test_what_no_number_of_replicas_reaches_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    short = ["simulate", "--trace", "synthetic:requests=5,rate=1", "--policy", "stock"]
    assert main([*short, "--plan", "ttft_p50<0.0001s", "--json", str(file)]) == 0
    assert json.loads(file.read_text())["plan"]["arms"]["stock"] == {"replicas": None}
    assert "never" in capsys.readouterr().out
    assert main([*short, "--plan", "nonsense"]) == 2
    assert "--plan must be such as" in capsys.readouterr().err
