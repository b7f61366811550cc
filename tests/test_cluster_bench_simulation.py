"""Goal: the simulator is measured with as many replicas and tenants as asked, and says the same of them every time."""

from pathlib import Path

import pytest

from cluster.__main__ import main
from cluster.bench_simulation import chat


def test_tenants_are_as_many_as_asked_and_a_fifth_of_them_send_half() -> None:
    requests = chat(20_000, rate=100.0, tenants=1000, seed=1)
    sent = [int(one.tenant.removeprefix("tenant-")) for one in requests]
    assert len(set(sent)) > 990
    assert max(sent) < 1000
    assert sum(number < 200 for number in sent) / len(sent) == pytest.approx(
        0.6, abs=0.02
    )  # half, and a fifth of the rest
    assert requests == chat(20_000, rate=100.0, tenants=1000, seed=1)


def test_a_measurement_prints_speed_and_memory_of_the_arms_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--requests",
        "200",
        "--replicas",
        "3",
        "--tenants",
        "50",
        "--policy",
        "adaptive",
        "--admission",
        "fair",
    ]
    assert main(["bench-simulation", *arguments]) == 0
    out = capsys.readouterr().out
    assert "peak MiB" in out
    assert "adaptive, pressed" in out
    assert "stock" not in out


@pytest.mark.parametrize(
    "option", [["--tenants", "0"], ["--policy", "best"], ["--policy", "offload", "--admission", "fair"]]
)
def test_what_cannot_be_is_refused(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench-simulation", *option]) == 2
    assert capsys.readouterr().err.startswith("Error: ")


@pytest.mark.slow
def test_a_thousand_replicas_with_ten_thousand_tenants_give_the_same_bytes(tmp_path: Path) -> None:
    texts = []
    for name in ("a", "b"):
        trace = "synthetic:requests=1000,rate=3000,tenants=10000"
        arguments = ["--replicas", "1000", "--policy", "adaptive", "--admission", "fair", "--pool-blocks", "600"]
        assert main(["simulate", "--trace", trace, *arguments, "--json", str(tmp_path / name)]) == 0
        texts.append((tmp_path / name).read_bytes())
    assert texts[0] == texts[1]
