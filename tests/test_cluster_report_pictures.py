"""Goal: a result has pictures, the same for the same result; a wrong file name is refused before anything runs."""

import pytest

from cluster.__main__ import main
from cluster.distributions import SHARES, TENANT_SHARES
from cluster.report_pictures import of_all, of_tenants, svg

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


def test_another_name_of_a_picture_is_refused_before_anything_runs(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("simulate", "bench"):
        assert main([command, "--plot", "a.txt"]) == 2
        assert "--plot must name a .png or .svg file" in capsys.readouterr().err
