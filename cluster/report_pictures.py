"""Pictures of a result: distributions of all requests and of each tenant, as SVG in a page."""

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from cluster.distributions import SHARES, TENANT_SHARES

LABELS = {"weighted_turnaround": "weighted turnaround", "ttft_s": "seconds to the first token"}
FAR_APART = 3.0
Draw = Callable[[Any], None]
"""Draws into a matplotlib figure."""


def svg(draw: Draw, *, width: float, height: float) -> str:
    """A picture as an element of a page; the same result gives the same text."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    target, figure = io.StringIO(), Figure(figsize=(width, height), layout="constrained")
    draw(figure)
    with rc_context({"svg.hashsalt": "report"}):
        figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None})
    text = target.getvalue()
    return text[text.index("<svg") :]


def are_far_apart(values: Iterable[float]) -> bool:
    """Whether a logarithmic axis shows them better: on a short one its marks lie upon each other."""
    positive = [value for value in values if value > 0.0]
    return bool(positive) and max(positive) > FAR_APART * min(positive)


def of_all(spreads: Mapping[str, Mapping[str, Any]]) -> Draw:
    """Shares of all requests up to a value."""

    def draw(figure: Any) -> None:
        for axes, (measure, label) in zip(figure.subplots(1, 2), LABELS.items(), strict=True):
            for name, spread in spreads.items():
                if spread[measure] is not None:
                    axes.plot(spread[measure], SHARES, label=name)
            axes.set(xlabel=label, ylabel="share of requests")
            if are_far_apart(value for spread in spreads.values() for value in spread[measure] or ()):
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
            tenants_of = (of for spread in spreads.values() for of in spread["tenants"].values())
            if are_far_apart(value for of in tenants_of for value in of[measure] or ()):
                axes.set_yscale("log")
        axes.legend(fontsize=7)

    return draw
