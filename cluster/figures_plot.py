"""A picture of what arms of a benchmark or a simulation reached: one panel for each figure, one mark for each run."""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PANELS = {
    "throughput_tokens_per_s": "tokens/s",
    "weighted_turnaround_mean": "mean weighted turnaround",
    "ttft_s_p99": "99 % of times to first token, s",
    "preemptions": "preemptions",
    "jain_index": "Jain's index",
    "max_service_gap": "largest gap in service, weighted tokens",
}
"""Figures that are drawn, and what stands over them."""

SUFFIXES = (".png", ".svg")


def check_target(target: Path) -> None:
    """Refuse a file that no picture can be written to, before anything is measured.

    Raises:
        ValueError: Its name ends in nothing that can be drawn, or its folder does not exist.
    """
    if target.suffix.lower() not in SUFFIXES or not target.absolute().parent.is_dir():
        raise ValueError("--plot must name a .png or .svg file in a folder that exists.")


def draw(report: Mapping[str, Any], target: Path) -> None:
    """Write the picture of a report; its format follows from the file's name.

    Args:
        report: `arms` by name; each has `repeats`, or is one run itself.

    Raises:
        OSError: The file cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    arms = {name: arm.get("repeats", [arm]) for name, arm in report["arms"].items()}
    figure = Figure(figsize=(3 * 4, 2 * (2.2 + 0.1 * max(map(len, arms)))), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(2, 3).flat, PANELS.items(), strict=True):
        runs = {arm: [run[name] for run in of if run.get(name) is not None] for arm, of in arms.items()}
        medians = [statistics.median(values) if values else 0.0 for values in runs.values()]
        axes.bar(range(len(runs)), medians, color="0.8")
        for place, values in enumerate(runs.values()):
            axes.plot([place] * len(values), values, "k.", markersize=4)
        axes.set_title(title, fontsize="medium")
        axes.set_xticks(range(len(runs)), list(runs), rotation=30, ha="right")
    kind = "Simulated: " if report.get("benchmark") == "simulation" else ""
    figure.suptitle(f"{kind}medians, and every run as a point")
    plain = {"Date": None} if target.suffix.lower() == ".svg" else None
    with rc_context({"svg.hashsalt": "figures"}):  # the same report gives the same picture
        figure.savefig(target, metadata=plain)
