"""Goal: a result has pictures, the same for the same result; a wrong file name is refused before anything runs."""

from pathlib import Path

import pytest

from cluster.__main__ import main
from cluster.distributions import SHARES, TENANT_SHARES
from cluster.report_pictures import check_plot, of_all, of_tenants, save_plot, svg

TENANT = {"weighted_turnaround": [1.0 + share for share in TENANT_SHARES], "ttft_s": None}
SPREADS = {
    "stock": {"weighted_turnaround": [1.0 + share for share in SHARES], "ttft_s": None, "tenants": {"one<": TENANT}},
    "swap": {"weighted_turnaround": None, "ttft_s": [0.1 + share for share in SHARES], "tenants": {}},
}


def test_a_picture_is_the_same_every_time_and_stands_alone() -> None:
    for draw in (of_all(SPREADS), of_tenants(SPREADS, ["one<", "two"])):
        text = svg(draw, width=6, height=3)
        assert text == svg(draw, width=6, height=3)
        assert text.startswith("<svg")
        assert 'href="http' not in text


@pytest.mark.parametrize("ending", ["svg", "png", "pdf"])
def test_a_file_is_written_in_the_format_of_its_name(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    save_plot(path, SPREADS, ["one<"], note="SIMULATED")
    begins = {"svg": b"<?xml", "png": b"\x89PNG", "pdf": b"%PDF"}[ending]
    assert path.read_bytes().startswith(begins)


def test_another_name_is_refused_before_anything_runs(capsys: pytest.CaptureFixture[str]) -> None:
    check_plot(None)
    with pytest.raises(ValueError, match=r"must end in \.svg"):
        check_plot(Path("a.txt"))
    assert main(["simulate", "--plot", "a.txt"]) == 2
    assert main(["bench", "--plot", "a.txt"]) == 2
    assert "--plot must end in" in capsys.readouterr().err
