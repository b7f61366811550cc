"""A picture of predicted against measured seconds, one panel for each figure."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from cost_service.evaluate import Judged

MOST_POINTS = 4000
"""Of a panel; of more rows some are drawn by chance."""


def draw(judged: Mapping[str, Judged], target: Path) -> None:
    """Write the picture; its format follows from the file's name.

    Raises:
        ValueError: A format that cannot be drawn.
        OSError: The file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(judged), 4.5), layout="constrained")
    for axes, (name, one) in zip(figure.subplots(1, len(judged), squeeze=False)[0], judged.items(), strict=True):
        chosen = np.random.default_rng(0).permutation(len(one.measured_s))[:MOST_POINTS]
        measured_ms, predicted_ms = 1e3 * one.measured_s[chosen], 1e3 * one.estimate.seconds[chosen]
        ends = [min(measured_ms.min(), predicted_ms.min()), max(measured_ms.max(), predicted_ms.max())]
        axes.plot(ends, ends, color="0.6", linewidth=1, zorder=1)
        axes.scatter(measured_ms, predicted_ms, s=3, alpha=0.4, zorder=2)
        axes.set(
            xscale="log", yscale="log", xlabel="measured, ms", ylabel="predicted, ms",
            title=f"{name}: mean error {one.figures()['mean_error']:.1%}",
        )  # fmt: skip
    figure.savefig(target)
