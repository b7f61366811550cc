"""Goal: the page of a result is what a person can read, in a browser as people have them.

Method: a simulation and the page of its result by their commands, opened in headless Chromium.
"""

from pathlib import Path

import pytest

from cluster.__main__ import main
from tests.browser import chromium, needs_chromium

pytestmark = [pytest.mark.slow, needs_chromium]


def test_the_page_of_a_result_shows_all_its_parts_fits_the_window_and_complains_of_nothing(tmp_path: Path) -> None:
    result, page_file = tmp_path / "result.json", tmp_path / "result.html"
    trace = "synthetic:requests=300,rate=300,tenants=3"
    command = [
        "simulate",
        "--trace",
        trace,
        "--policy",
        "stock,recompute,swap,adaptive",
        "--pool-fraction",
        "0.4",
        "--json",
        str(result),
    ]
    assert main(command) == 0
    assert main(["report", str(result)]) == 0
    with chromium(tmp_path / "browser") as page:
        page.open(page_file.as_uri())
        shown = page.wait_for("Simulated policies", "Comparison", "By tenant", "Preemptions", "How to repeat it")
        assert "All figures on this page are SIMULATED" in shown
        assert "throughput_tokens_per_s" in shown
        assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"), "too wide"
        sizes = page.evaluate("[...document.querySelectorAll('svg')].map(each => each.getBoundingClientRect().height)")
        assert len(sizes) == 3
        assert min(sizes) > 100, "a picture is not drawn"
        page.picture(tmp_path / "report.png")
        assert page.errors == []
