"""Goal: a picture of a report shows every arm, and is the same for the same report."""

from pathlib import Path
from typing import Any

import pytest

from cluster.figures_plot import PANELS, check_target, draw


def report(**more: Any) -> dict[str, Any]:
    runs = [dict.fromkeys(PANELS, value) for value in (1.0, 2.0, 4.0)]
    runs[0]["preemptions"] = None  # type: ignore[assignment]  # a client over HTTP may not know
    return {"benchmark": "preemption", "arms": {"stock": {"repeats": runs}, "fair/adaptive": {"repeats": runs}}, **more}


def test_every_arm_and_figure_is_in_the_picture_and_in_nothing_but_it(tmp_path: Path) -> None:
    first, second = tmp_path / "a.svg", tmp_path / "b.svg"
    draw(report(), first)
    draw(report(), second)
    text = first.read_text()
    assert text == second.read_text()
    for said in (*PANELS.values(), "stock", "fair/adaptive"):
        assert f"<!-- {said} -->" in text
    assert "Simulated" not in text


def test_arms_without_repeats_are_one_run_each(tmp_path: Path) -> None:
    flat = {"stock": dict.fromkeys(PANELS, 1.0), "swap": dict.fromkeys(PANELS, 2.0)}
    draw(report(arms=flat, benchmark="simulation"), tmp_path / "a.svg")
    assert "<!-- Simulated: " in (tmp_path / "a.svg").read_text()


def test_a_png_is_one(tmp_path: Path) -> None:
    draw(report(), tmp_path / "a.PNG")
    assert (tmp_path / "a.PNG").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["a.pdf", "a", "none/a.png"])
def test_a_file_that_cannot_be_drawn_is_refused_before(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"--plot must name a \.png or \.svg file in a folder that exists"):
        check_target(tmp_path / name)
