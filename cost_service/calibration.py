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
from typing import Any, TypeVar

import msgspec
import numpy as np

from cost_service.engine_step import EngineBatch, EngineStep
from cost_service.evaluate import Judged
from cost_service.learner import CostLearner
from cost_service.model_shape import ModelShape, read_config
from cost_service.samples import Sample, StepSample
from cost_service.snapshot import CostSnapshot

CONFIG, START, SAMPLES, STEPS, PREEMPTIONS = (
    "config.json", "start.json", "samples.jsonl", "steps.jsonl", "preemptions.csv"
)  # fmt: skip

ASKED_ERROR = 0.20
"""Median relative error of a preemption that is asked for at most."""

ASKED_STEP_ERROR = 0.10
"""The same of a step."""

FITTED_SHARE = 2 / 3
"""Of the steps; the rest is judged."""

_sample, _step = msgspec.json.Decoder(Sample), msgspec.json.Decoder(StepSample)
_Read = TypeVar("_Read")


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
    folder: Path,
    start: CostSnapshot,
    samples: Iterable[Sample],
    steps: Iterable[StepSample],
    preemptions: Sequence[MeasuredPreemption],
) -> None:
    """Write the files; `config.json` is the caller's."""
    (folder / START).write_text(start.to_json() + "\n")
    for name, lines in ((SAMPLES, samples), (STEPS, steps)):
        (folder / name).write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))
    with (folder / PREEMPTIONS).open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(MeasuredPreemption)])
        writer.writeheader()
        writer.writerows(asdict(one) for one in preemptions)


def learned_snapshot(folder: Path) -> CostSnapshot:
    """Learn the costs from what a calibration measured.

    Raises:
        ValueError: A file is missing or damaged.
    """
    learner = CostLearner(CostSnapshot.from_json(_content(folder, START)))
    learner.observe(_lines(folder, SAMPLES, _sample))
    return learner.refit()


def fitted_step(folder: Path, steps: Sequence[StepSample] | None = None) -> EngineStep:
    """Learn how long the engine's steps take from all that a calibration measured, or from some of it.

    Raises:
        ValueError: A file is missing or damaged.
    """
    steps = read_steps(folder) if steps is None else steps
    shape = ModelShape.from_config(read_config(folder / CONFIG), source=f"{folder / CONFIG}")
    start = CostSnapshot.from_json(_content(folder, START))
    batches = [EngineBatch(step.num_decodes, step.decode_tokens, step.prefills) for step in steps]
    return EngineStep.fit(
        shape, batches, np.array([step.seconds for step in steps]), parallelism=start.parallelism
    )  # fmt: skip


def read_steps(folder: Path) -> list[StepSample]:
    """Read the steps of a calibration.

    Raises:
        ValueError: The file is missing or damaged.
    """
    return _lines(folder, STEPS, _step)


def judged_steps(folder: Path) -> Judged:
    """Predict the last third of the steps by what the others have taught.

    Raises:
        ValueError: A file is missing or damaged.
    """
    steps = read_steps(folder)
    cut = int(FITTED_SHARE * len(steps))
    rest = steps[cut:]
    batches = [EngineBatch(step.num_decodes, step.decode_tokens, step.prefills) for step in rest]
    estimate = fitted_step(folder, steps[:cut]).estimate(batches)
    return Judged(estimate, np.array([step.seconds for step in rest]))


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


def step_figures(judged: Judged) -> dict[str, Any]:
    """How well steps were predicted, and whether as well as is asked."""
    figures = judged.figures()
    return figures | {"asked": ASKED_STEP_ERROR, "reached": figures["median_error"] <= ASKED_STEP_ERROR}


def _content(folder: Path, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except OSError as error:
        raise ValueError(f"{folder} has no {name} to read ({error.strerror}): calibrate again.") from None


def _lines(folder: Path, name: str, decoder: "msgspec.json.Decoder[_Read]") -> list[_Read]:
    read = []
    for number, line in enumerate(_content(folder, name).splitlines(), start=1):
        try:
            read.append(decoder.decode(line))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"Line {number} of {folder / name} is none of a calibration: {error}") from None
    return read
