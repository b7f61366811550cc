"""A benchmark's ratios to stock, kept in a small file, and whether a later run has fallen behind them.

Rules:
- Only ratios are compared, each to stock in its own run: times of two machines, or of two days on one, are not alike.
- A figure has regressed where the whole interval of the run is worse than the whole interval of the baseline.
- Runs of another workload or of other engines are refused before anything is measured; how many repeats there are, and
  what a run finds out itself (blocks), may differ.
"""

import argparse
import json
import statistics
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Self

from cluster.bench_figures import RATIO_FIGURES

HIGHER_IS_BETTER = frozenset({"throughput_tokens_per_s"})
MAY_DIFFER = frozenset(
    {"policies", "admissions", "arms", "models", "repeats", "different_workloads", "num_kv_blocks", "demand_kv_blocks"}
)
"""Settings that two runs to be compared need not share."""

MACHINE = ("cores", "architecture", "python", "vllm", "torch")
LEAST_REPEATS = 2
"""Without which there is no interval."""


def add_baseline_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--save-baseline", type=Path, metavar="FILE", help="write the ratios to stock to FILE, for --baseline")
    add("--baseline", type=Path, metavar="FILE", help="fail where ratios to stock are worse than those in FILE")


class Baseline:
    """What a run is compared with, and where its own ratios are kept; either may be nothing."""

    def __init__(self, document: Mapping[str, Any] | None, target: Path | None) -> None:
        self._document, self._target = document, target

    @classmethod
    def of(cls, options: argparse.Namespace) -> Self:
        """Read what the options name.

        Raises:
            ValueError: It is no baseline, or the file to write is in no folder.
            OSError: It cannot be read.
        """
        target: Path | None = options.save_baseline
        if target is not None and (target.is_dir() or not target.absolute().parent.is_dir()):
            raise ValueError("--save-baseline must name a file in a folder that exists.")
        return cls(None if options.baseline is None else read(options.baseline), target)

    def expect(self, settings: Mapping[str, Any], arms: Collection[str], stock: str | None, repeats: int) -> None:
        """Refuse a run that could not be compared or kept, before it begins.

        Raises:
            ValueError: It has no stock arm, too few repeats, or other settings than the baseline.
        """
        if self._document is None and self._target is None:
            return
        if stock is None or len(arms) < 2 or repeats < LEAST_REPEATS:
            raise ValueError("A baseline needs the arm stock, another one, and at least 2 --repeats.")
        if self._document is None:
            return
        theirs, ours = self._document["settings"], json.loads(json.dumps(settings))
        for name in sorted((theirs.keys() | ours.keys()) - MAY_DIFFER):
            if theirs.get(name) != ours.get(name):
                raise ValueError(
                    f"--baseline was measured with {name} {theirs.get(name)!r}, and this run has {ours.get(name)!r}: "
                    "give the options of its `command`."
                )
        if missing := [arm for arm in self._document["ratio_to_stock"] if arm not in arms]:
            raise ValueError(f"--baseline has an arm {missing[0]}, and this run has none: add it to --policy.")

    def judged(self, report: Mapping[str, Any]) -> dict[str, Any]:
        """Keep the report's ratios, and return what has regressed, as it stands in a report; of an interrupted run nothing.

        Raises:
            OSError: The file cannot be written.
        """
        if "partial" in report:
            return {}
        if self._target is not None:
            self._target.write_text(json.dumps(baseline_of(report), indent=2) + "\n")
        return {} if self._document is None else {"regressions": regressions(self._document, report)}


def read(path: Path) -> dict[str, Any]:
    """Read a baseline.

    Raises:
        ValueError: It is none.
        OSError: It cannot be read.
    """
    try:
        document: dict[str, Any] = json.loads(path.read_text())
        settings, ratios = document["settings"], document["ratio_to_stock"]
        bounds = [one[end] for of in ratios.values() for one in of.values() for end in ("median", "low", "high")]
        whole = isinstance(settings, dict) and bool(bounds) and all(isinstance(one, int | float) for one in bounds)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise ValueError(f"--baseline {path.name} holds no ratios to stock: make one with --save-baseline.")
    return document


def baseline_of(report: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a report: figures, settings and the kind of machine; no requests."""
    stock = next(arm for arm in report["arms"] if arm not in report["ratio_to_stock"])
    runs = report["arms"][stock]["repeats"]
    return {
        **{name: report[name] for name in ("benchmark", "command", "settings", "interval")},
        "machine": {name: report["machine"][name] for name in MACHINE if name in report["machine"]},
        "stock": {
            name: statistics.median(run[name] for run in runs)
            for name in RATIO_FIGURES if all(run[name] is not None for run in runs)
        },
        "ratio_to_stock": {
            arm: {name: {end: one[end] for end in ("median", "low", "high")} for name, one in of.items()}
            for arm, of in report["ratio_to_stock"].items()
        },
    }  # fmt: skip


def regressions(baseline: Mapping[str, Any], report: Mapping[str, Any]) -> list[str]:
    """One sentence for every ratio that is worse than the baseline's, beyond both intervals."""
    found = []
    for arm, ratios in baseline["ratio_to_stock"].items():
        for name, before in ratios.items():
            now = report["ratio_to_stock"][arm].get(name)
            if now is None:
                found.append(f"{arm} has no {name} / stock any more; it was {before['median']:.3f}.")
            elif _is_worse(name, now, before):
                found.append(
                    f"{arm} has regressed: {name} / stock is {_said(now)}, and the baseline has {_said(before)}."
                )
    return found


def _is_worse(name: str, now: Mapping[str, float], before: Mapping[str, float]) -> bool:
    return now["high"] < before["low"] if name in HIGHER_IS_BETTER else now["low"] > before["high"]


def _said(ratio: Mapping[str, float]) -> str:
    return f"{ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})"
