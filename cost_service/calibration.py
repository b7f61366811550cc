"""What a calibration leaves in its folder, and what is learned and judged from it.

Files: `config.json` (the model's), `start.json` (the costs that it began with), `samples.jsonl` (what was measured, one
`cost_service.samples` value a line) and `preemptions.csv` (each measured preemption: round, action, residual, predicted_s,
measured_s). A round's predictions come from what the rounds before it have taught, so that they are judged on what was not
fitted; `residual` says whether what was learned by size was used or left out.
"""

import csv
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from cost_service.learner import CostLearner
from cost_service.samples import Sample
from cost_service.snapshot import CostSnapshot

START, SAMPLES, PREEMPTIONS = "start.json", "samples.jsonl", "preemptions.csv"

ASKED_ERROR = 0.20
"""Median relative error that is asked for at most."""

_sample = msgspec.json.Decoder(Sample)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredPreemption:
    """One preemption of a calibration."""

    round: int
    action: str
    residual: bool
    predicted_s: float
    measured_s: float


def is_calibration(folder: Path) -> bool:
    """Whether the folder was written by a calibration."""
    return (folder / SAMPLES).is_file()


def write_calibration(
    folder: Path, start: CostSnapshot, samples: Iterable[Sample], preemptions: Sequence[MeasuredPreemption]
) -> None:
    """Write the files; `config.json` is the caller's."""
    (folder / START).write_text(start.to_json() + "\n")
    (folder / SAMPLES).write_bytes(b"".join(msgspec.json.encode(sample) + b"\n" for sample in samples))
    with (folder / PREEMPTIONS).open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(MeasuredPreemption)])
        writer.writeheader()
        writer.writerows(asdict(one) for one in preemptions)


def learned_snapshot(folder: Path) -> CostSnapshot:
    """Learn the costs from what a calibration measured.

    Raises:
        ValueError: A file is missing or damaged.
    """
    try:
        learner = CostLearner(CostSnapshot.from_json((folder / START).read_text()))
        lines = (folder / SAMPLES).read_bytes().splitlines()
    except OSError as error:
        raise ValueError(f"{folder} is no complete calibration ({error.strerror}): calibrate again.") from None
    for number, line in enumerate(lines, start=1):
        try:
            learner.observe([_sample.decode(line)])
        except (ValueError, RecursionError) as error:
            raise ValueError(f"Line {number} of {folder / SAMPLES} is no sample: {error}") from None
    return learner.refit()


def read_preemptions(folder: Path) -> list[MeasuredPreemption]:
    """Read the measured preemptions of a calibration.

    Raises:
        ValueError: The file is missing, or a line of it damaged.
    """
    path = folder / PREEMPTIONS
    if not path.is_file():
        raise ValueError(f"{folder} has no {PREEMPTIONS}: calibrate again.")
    found = []
    with path.open(newline="") as file:
        for number, record in enumerate(csv.DictReader(file), start=2):
            try:
                one = MeasuredPreemption(
                    round=int(record["round"]), action=record["action"], residual=record["residual"] == "True",
                    predicted_s=float(record["predicted_s"]), measured_s=float(record["measured_s"]),
                )  # fmt: skip
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"Line {number} of {path} is no preemption ({error}): calibrate again.") from None
            if not (math.isfinite(one.predicted_s) and math.isfinite(one.measured_s)):
                raise ValueError(f"Line {number} of {path} has seconds that are not finite: calibrate again.")
            found.append(one)
    return found


def preemption_figures(preemptions: Sequence[MeasuredPreemption]) -> dict[str, dict[str, Any]]:
    """Median relative errors by action, with what was learned by size, without it, and before anything was learned."""
    groups: dict[str, list[MeasuredPreemption]] = defaultdict(list)
    for one in preemptions:
        kind = "before_learning" if one.round == 0 else "learned" if one.residual else "without_residual"
        if one.measured_s > 0.0:
            groups[f"{one.action}_{kind}"].append(one)
    figures = {}
    for name, group in sorted(groups.items()):
        errors = [abs(one.predicted_s / one.measured_s - 1.0) for one in group]
        figures[name] = {"preemptions": len(group), "median_error": float(np.median(errors))}
        if name.endswith("_learned"):
            figures[name] |= {"asked": ASKED_ERROR, "reached": figures[name]["median_error"] <= ASKED_ERROR}
    return figures
