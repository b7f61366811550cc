"""`python -m cluster report`: one self-contained page (HTML) of a result file of `bench` or `simulate`.

Tables are written here, pictures are matplotlib's as SVG inside the page; nothing is loaded from elsewhere.
"""

import argparse
import html
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.bench_figures import RATIO_FIGURES, Calibration
from cluster.distributions import distributions
from cluster.records import RequestRecord
from cluster.report_pictures import of_all, of_tenants, svg
from cluster.service_curve import service_gaps

FIGURES = (*RATIO_FIGURES, "preemptions", "swaps", "recomputes", "jain_index", "max_service_gap", "unfinished")
BOUND_FIGURES = ("max_service_gap", "bound", "gap_over_bound")
"""Of the gap in service, where a bound is stated."""

LEAST_GAP = 100.0
"""Weighted tokens below which a gap is drawn to a linear scale where there is a bound."""

TITLES = {
    "simulation": "Simulated policies", "served": "Policies compared over HTTP",
    "replicas": "Replicas as one cluster",
}  # fmt: skip
MOST_TENANTS = 12
"""Of a picture or table: those with the most requests."""

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; } td, th { padding: .2rem .7rem; border-bottom: 1px solid #ddd; }
td { text-align: right; font-variant-numeric: tabular-nums; }
td:first-child, th:first-child { text-align: left; white-space: nowrap; } .table { overflow-x: auto; }
pre { background: #f5f5f5; padding: .7rem; white-space: pre-wrap; } svg { max-width: 100%; height: auto; }
.note { color: #666; }
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("result", type=Path, metavar="RESULT", help="JSON file of bench or simulate")
    parser.add_argument("--output", type=Path, metavar="FILE", help="page to write (default: RESULT with .html)")


def main(options: argparse.Namespace) -> int:
    """Write the page; 0, or 2 with one sentence for a file that cannot be used."""
    target = options.output or options.result.with_suffix(".html")
    try:
        target.write_text(page(read_result(options.result)))
    except OSError as error:
        print(f"Error: {error.filename} cannot be used: {error.strerror}.", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    print(f"Written to {target}.")
    return 0


def read_result(path: Path) -> dict[str, Any]:
    """Read a result file.

    Raises:
        ValueError: It is none, or was written without its requests.
        OSError: It cannot be read.
    """
    try:
        report = in_repeats(json.loads(path.read_text()))
        if is_plan(report):
            return report
        runs = [repeat for arm in report["arms"].values() for repeat in arm["repeats"]]
        complete = bool(runs) and all("records" in run or "distributions" in run for run in runs)
        complete = complete and "calibration" in report
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        complete = False
    if not complete:
        raise ValueError(f"{path} must be a result of bench or simulate with its requests in it: run it again.")
    result: dict[str, Any] = report
    return result


def is_plan(report: Mapping[str, Any]) -> bool:
    """Whether it is a result of `simulate --plan`, which has replicas and a price instead of runs."""
    return "plan" in report and bool(report["plan"]["arms"])


def in_repeats(report: Mapping[str, Any]) -> dict[str, Any]:
    """A report in the form of `bench`'s: the arms of `simulate` have one run each."""
    if report.get("benchmark") != "simulation" or "plan" in report:
        return dict(report)
    return {**report, "arms": {name: {"repeats": [arm]} for name, arm in report["arms"].items()}}


def page(report: Mapping[str, Any]) -> str:
    """The page of a result."""
    if is_plan(report):
        return _document("Replicas that suffice", [_settings(report), planned(report), *_repeated(report)])
    spreads, tenants = spreads_of(report), tenants_of(report)
    title = TITLES.get(report["benchmark"], "Policies compared with real engines")
    parts = [
        _settings(report),
        "<h2>Comparison</h2>", comparison(report),
        "<h2>Weighted turnaround and time to first token</h2>", svg(of_all(spreads), width=10, height=3.6),
        "<h2>By tenant</h2>", by_tenant(report), svg(of_tenants(spreads, tenants), width=10, height=4),
        _note("A tenant's line goes from one request in ten to nine in ten; marks at the half and at 99 of 100."),
        "<h2>Difference in service between tenants that wait</h2>", gaps(report),
        "<h2>Preemptions</h2>", preemptions(report), *_repeated(report),
    ]  # fmt: skip
    return _document(title, parts)


def _document(title: str, parts: Iterable[str]) -> str:
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style></head>'
        f"<body><h1>{title}</h1>{''.join(parts)}</body></html>\n"
    )


def _repeated(report: Mapping[str, Any]) -> tuple[str, ...]:
    command = html.escape(str(report.get("command", "not recorded")))
    note = "Files stand by their names alone: put their folders before them."
    return "<h2>How to repeat it</h2>", f"<pre>{command}</pre>", _note(note)


def planned(report: Mapping[str, Any]) -> str:
    """The fewest replicas of every arm for which the conditions hold, and what they reach; none: they never hold."""
    arms = report["plan"]["arms"]
    names = list(dict.fromkeys(name for one in arms.values() for name in one))
    rows = [[name, *(_number(one.get(name)) for one in arms.values())] for name in names]
    return f"<h2>For {html.escape(report['plan']['conditions'])}</h2>" + _table(["", *arms], rows)


def records_of(run: Mapping[str, Any]) -> list[RequestRecord]:
    """The requests of a run as they stand in its result."""
    return [RequestRecord(**record) for record in run["records"]]


def comparison(report: Mapping[str, Any]) -> str:
    """Medians of all arms, and ratios to stock with their intervals."""
    arms = report["arms"]
    rows = [
        [name, *(_median([run[name] for run in arm["repeats"]]) for arm in arms.values())] for name in FIGURES
    ]  # fmt: skip
    if any(bound_of(arm) is not None for arm in arms.values()):
        told = {name: [run.get("fairness") or {} for run in arm["repeats"]] for name, arm in arms.items()}
        rows += [
            [f"fairness: {name}", *(_median([one.get(name) for one in told[arm]]) for arm in arms)]
            for name in BOUND_FIGURES
        ]  # fmt: skip
    medians = _table(["median of repeats", *arms], rows)
    ratios = [
        [f"{name}, {policy} / stock", *(_number(ratio[key]) for key in ("median", "low", "high"))]
        for policy, of in report.get("ratio_to_stock", {}).items()
        for name, ratio in of.items()
    ]
    interval = html.escape(str(report.get("interval", "")))
    return medians + (_table(["ratio", "median", "from", "to"], ratios) + _note(interval) if ratios else "")


def bound_of(arm: Mapping[str, Any]) -> float | None:
    """The stated bound on the gap in the first repeat of an arm; None where none is stated."""
    bound: float | None = (arm["repeats"][0].get("fairness") or {}).get("bound")
    return bound


def spreads_of(report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """By arm the distributions over all repeats (`cluster.distributions`)."""
    calibration = Calibration(
        **{name: report["calibration"][name] for name in ("ttft_s", "ttft_s_per_prompt_token", "s_per_output_token")}
    )
    return {
        name: arm["repeats"][0]["distributions"]
        if "distributions" in arm["repeats"][0]
        else distributions((one for run in arm["repeats"] for one in records_of(run)), calibration)
        for name, arm in report["arms"].items()
    }


def tenants_of(report: Mapping[str, Any]) -> list[str]:
    """Tenants with the most requests, at most `MOST_TENANTS`."""
    requests: dict[str, int] = defaultdict(int)
    for arm in report["arms"].values():
        for run in arm["repeats"]:
            for tenant, of in run["tenants"].items():
                requests[tenant] += of["requests"]
    return sorted(requests, key=lambda tenant: (-requests[tenant], tenant))[:MOST_TENANTS]


def by_tenant(report: Mapping[str, Any]) -> str:
    """Weighted turnaround and first token of the tenants with the most requests, arm by arm."""
    arms = report["arms"]
    shown = tenants_of(report)
    heads = ["tenant", *(f"{name}: {what}" for name in arms for what in ("mean turnaround", "99 % first token, s"))]
    rows = []
    for tenant in shown:
        cells = []
        for arm in arms.values():
            runs = [run["tenants"][tenant] for run in arm["repeats"] if tenant in run["tenants"]]
            cells += [_median([run[key] for run in runs]) for key in ("weighted_turnaround_mean", "ttft_s_p99")]
        rows.append([tenant, *cells])
    left = len({tenant for arm in arms.values() for run in arm["repeats"] for tenant in run["tenants"]}) - len(shown)
    return _table(heads, rows) + (_note(f"{left} more tenants with fewer requests are left out.") if left else "")


def gaps(report: Mapping[str, Any]) -> str:
    """The greatest difference of normalised service among tenants that wait, over the time of the first repeat."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for name, arm in report["arms"].items():
            first = arm["repeats"][0]
            curve = first["service_gaps"] if "service_gaps" in first else service_gaps(records_of(first))
            axes.step([at_s for at_s, _ in curve], [gap for _, gap in curve], where="post", label=name)
        for name, arm in report["arms"].items():
            if (bound := bound_of(arm)) is not None:
                axes.axhline(bound, linestyle="--", color="0.4", label=f"bound, {name}")
                axes.set_yscale("symlog", linthresh=LEAST_GAP)  # a bound may be a hundred times the gap
        axes.set(xlabel="seconds", ylabel="weighted tokens")
        axes.legend()

    stated = any(bound_of(arm) is not None for arm in report["arms"].values())
    note = (
        "The line is drawn from the requests' times; the bound, dashed, is stated for what engines count at every step."
    )
    return svg(draw, width=10, height=3.2) + (_note(note) if stated else "")


def preemptions(report: Mapping[str, Any]) -> str:
    """How many preemptions there were of each kind, and what they were to cost and did."""
    rows = []
    for name, arm in report["arms"].items():
        costs = [run["preemption_costs"] for run in arm["repeats"] if run.get("preemption_costs")]
        for action in sorted({action for run in costs for action in run}):
            of = [run[action] for run in costs if action in run]
            count, predicted_s, measured_s = (
                sum(one[key] for one in of) for key in ("measured", "predicted_s", "measured_s")
            )
            ratio = predicted_s / measured_s if measured_s > 0 else None
            rows.append([f"{name}: {action}", *map(_number, (count, predicted_s, measured_s, ratio))])
    if not rows:
        return _note("No arm measured what its preemptions cost.")
    return _table(["arm and action", "measured", "predicted, s", "measured, s", "ratio"], rows)


def _settings(report: Mapping[str, Any]) -> str:
    facts = {**report.get("settings", {}), **report.get("machine", {})}
    facts |= {name: report[name] for name in ("requests", "num_kv_blocks", "demand_kv_blocks") if name in report}
    said = ", ".join(f"{key} {value}" for key, value in facts.items() if not isinstance(value, dict | list | None))
    simulated = report["benchmark"] == "simulation"
    note = f"All figures on this page are SIMULATED, {report.get('simulated', 'nothing here was measured')}."
    partial = "It was interrupted: what was not done by then is missing." if report.get("partial") else ""
    return (_note(html.escape(note)) if simulated else "") + _note(partial) + _note(html.escape(said))


def _table(heads: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    def row(cells: Iterable[object], kind: str) -> str:
        return "<tr>" + "".join(f"<{kind}>{html.escape(str(cell))}</{kind}>" for cell in cells) + "</tr>"

    lines = row(heads, "th") + "".join(row(cells, "td") for cells in rows)
    return f'<div class="table"><table>{lines}</table></div>'


def _note(text: str) -> str:
    return f'<p class="note">{text}</p>' if text else ""


def _median(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return _number(statistics.median(known) if known else None)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
