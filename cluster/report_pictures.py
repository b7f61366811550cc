"""Pictures of a result: distributions of all requests and of each tenant, as SVG in a page or as a file (`--plot`)."""

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.distributions import SHARES, TENANT_SHARES

LABELS = {"weighted_turnaround": "weighted turnaround", "ttft_s": "seconds to the first token"}
FORMATS = (".svg", ".png", ".pdf")
Draw = Callable[[Any], None]
"""Draws into a matplotlib figure."""


def svg(draw: Draw, *, width: float, height: float) -> str:
    """A picture as an element of a page; the same result gives the same text."""
    target = io.StringIO()
    _save(draw, target, "svg", width, height)
    text = target.getvalue()
    return text[text.index("<svg") :]


def check_plot(path: Path | None) -> None:
    """See that a picture can be written under that name, before anything runs.

    Raises:
        ValueError: Its ending names no format.
    """
    if path is not None and path.suffix not in FORMATS:
        raise ValueError(f"--plot must end in {', '.join(FORMATS)}: it is {path}.")


def save_plot(path: Path, spreads: Mapping[str, Mapping[str, Any]], tenants: Sequence[str], *, note: str = "") -> None:
    """Write the distributions of all arms as one picture.

    Args:
        spreads: By arm, as `cluster.distributions` has them.
        tenants: Those to show.
        note: Stands above it.
    """

    def draw(figure: Any) -> None:
        if note:
            figure.suptitle(note)
        upper, lower = figure.subfigures(2, 1)
        of_all(spreads)(upper)
        of_tenants(spreads, tenants)(lower)

    _save(draw, path, path.suffix.removeprefix("."), 10, 7.5)


def of_all(spreads: Mapping[str, Mapping[str, Any]]) -> Draw:
    """Shares of all requests up to a value."""

    def draw(figure: Any) -> None:
        for axes, (measure, label) in zip(figure.subplots(1, 2), LABELS.items(), strict=True):
            for name, spread in spreads.items():
                if spread[measure] is not None:
                    axes.plot(spread[measure], SHARES, label=name)
            axes.set(xlabel=label, ylabel="share of requests")
            if any(spread[measure] is not None for spread in spreads.values()):
                axes.set_xscale("log")
        axes.legend()

    return draw


def of_tenants(spreads: Mapping[str, Mapping[str, Any]], tenants: Sequence[str]) -> Draw:
    """Of each tenant a line from one in ten to nine in ten, and marks at the half and at 99 of 100."""
    low, half, high, most = (TENANT_SHARES.index(share) for share in (0.1, 0.5, 0.9, 0.99))

    def draw(figure: Any) -> None:
        for axes, (measure, label) in zip(figure.subplots(1, 2), LABELS.items(), strict=True):
            for number, (name, spread) in enumerate(spreads.items()):
                offset = 0.7 * ((number + 0.5) / len(spreads) - 0.5)
                shown = [
                    (place + offset, spread["tenants"][tenant][measure])
                    for place, tenant in enumerate(tenants)
                    if spread["tenants"].get(tenant, {}).get(measure) is not None
                ]
                at = [place for place, _ in shown]
                lines = axes.vlines(
                    at, [of[low] for _, of in shown], [of[high] for _, of in shown], color=f"C{number}", label=name
                )
                axes.scatter(at, [of[half] for _, of in shown], s=12, color=lines.get_color())
                axes.scatter(at, [of[most] for _, of in shown], s=12, marker="_", color=lines.get_color())
            axes.set_xticks(range(len(tenants)), tenants, rotation=60, ha="right", fontsize=7)
            axes.set_ylabel(label)
            if any(of[measure] is not None for spread in spreads.values() for of in spread["tenants"].values()):
                axes.set_yscale("log")
        axes.legend(fontsize=7)

    return draw


def _save(draw: Draw, target: Any, kind: str, width: float, height: float) -> None:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    draw(figure)
    with rc_context({"svg.hashsalt": "report"}):
        metadata = {"svg": {"Date": None, "Creator": None}, "pdf": {"CreationDate": None, "Creator": None}}.get(kind)
        figure.savefig(target, format=kind, metadata=metadata)
