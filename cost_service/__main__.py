"""`python -m cost_service fit | evaluate`: learn costs from profiles, and say how well what was learned predicts."""

import argparse
import json
import logging
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from cost_service import evaluate
from cost_service.analytic import analytic_snapshot
from cost_service.calibration import (
    is_calibration,
    judged_steps,
    learned_snapshot,
    preemption_figures,
    read_preemptions,
    step_figures,
)
from cost_service.evaluate_lengths import evaluate_lengths
from cost_service.fit import snapshot_of
from cost_service.hardware import UNCERTAINTY, Datasheet, Hardware, known_hardware
from cost_service.kv_memory import kv_token_bytes
from cost_service.model_shape import ModelShape, read_config
from cost_service.profiles import load_profiles
from cost_service.result_file import check_json_file, write_json
from cost_service.step_time import MeasuredModel, StepTime
from cost_service.traces import SOURCES, load_trace

BLOCK_SIZE = 16
"""Tokens per KV block of a GPU replica, vLLM's default."""


LENGTHS_WIDTHS = (9, 9, 15, 8, 10, 13, 8)


def main(arguments: list[str] | None = None) -> int:
    """Run a command.

    Returns:
        0; 2 for a wrong option or profile, said in one sentence.
    """
    parser = argparse.ArgumentParser(prog="python -m cost_service", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    fit = commands.add_parser("fit", help="write the cost snapshots of a profile's models")
    judge = commands.add_parser("evaluate", help="judge predictions of what was not fitted")
    for command in (fit, judge):
        command.add_argument("--profile", type=Path, metavar="DIR", help="folder of profiles")
        command.add_argument(
            "--model-config", type=Path, metavar="FILE", help="config.json of the model, if not in DIR"
        )
        command.add_argument("--json", type=Path, metavar="FILE", help="write the result there; - for standard output")
    fit.add_argument(
        "--datasheet", metavar="name=X,flops=N,bytes=N,host=N",
        help="instead of a profile: the GPU's peaks per second (dense bf16, device memory, one way to host memory), or its "
        "name alone where it is known",
    )  # fmt: skip
    fit.add_argument("--block-size", type=int, default=BLOCK_SIZE, help="tokens per KV block (default: %(default)s)")
    judge.add_argument(
        "--fit-on", type=Path, action="append", default=[], metavar="DIR",
        help="fit on these profiles of the same GPU and judge all of --profile; may be given several times",
    )  # fmt: skip
    judge.add_argument(
        "--holdout", metavar="EXPR", help="rows to hold out, such as 'context > 4096' or 'rank(tokens) %% 3 == 1'"
    )
    judge.add_argument(
        "--trace", action="append", default=[], metavar="SOURCE:PATH",
        help=f"judge output lengths on a trace ({', '.join(SOURCES)}); may be given several times",
    )  # fmt: skip
    judge.add_argument(
        "--cold", action="store_true", help="judge whole steps by the GPU's datasheet alone, as if nothing was measured"
    )
    judge.add_argument("--plot", type=Path, metavar="FILE", help="draw predicted against measured (.png, .svg, .pdf)")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        check_json_file(options.json)
        result = run_fit(options) if options.command == "fit" else run_evaluate(options)
        if options.json is not None:
            write_json(result, options.json)
    except ValueError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"Error: {error.filename or 'A file'} cannot be used: {error.strerror}.", file=sys.stderr)
        return 2
    return 0


def run_evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """Judge; print tables; return the report."""
    if options.profile is None and not options.trace:
        raise ValueError("There is nothing to judge: give --profile or --trace.")
    if options.plot is not None and not options.plot.absolute().parent.is_dir():
        raise ValueError(f"--plot {options.plot} must be a file in a folder that exists.")
    report: dict[str, Any] = {}
    if options.profile is not None and is_calibration(options.profile):
        report["figures"] = preemption_figures(read_preemptions(options.profile))
        print(preemptions_table(report["figures"]))
        steps = judged_steps(options.profile)
        report["figures"]["engine_step"] = step_figures(steps)
        print(table({"engine_step": report["figures"]["engine_step"]}))
        if options.plot is not None:
            plot({"engine_step": steps}, options.plot)
    elif options.profile is not None:
        report = run_step_times(options)
    if options.trace:
        report["output_length"] = {source: evaluate_lengths(load_trace(source)) for source in options.trace}
        print(lengths_table(report["output_length"]))
    return report


def run_step_times(options: argparse.Namespace) -> dict[str, Any]:
    """Judge step times; print a table; return the report."""
    models = load(options.profile, options.model_config)
    if options.cold and (options.fit_on or options.holdout):
        raise ValueError("--cold fits nothing: leave --fit-on and --holdout out with it.")
    if options.cold:
        judged = evaluate.cold(models)
    elif options.fit_on:
        if options.holdout is not None:
            raise ValueError("--holdout splits the folder itself: leave it out with --fit-on, or --fit-on with it.")
        fitted = [model for folder in options.fit_on for model in load(folder, None)]
        judged = evaluate.transfer(fitted, models)
    else:
        judged = evaluate.split_by_gpu(models, options.holdout)
    figures = evaluate.report(judged)
    print(table(figures))
    if options.plot is not None:
        plot(judged, options.plot)
    return {"profiles": sorted({model.name for model in models}), "figures": figures}


def plot(judged: dict[str, evaluate.Judged], path: Path) -> None:
    """Draw predicted against measured."""
    from cost_service.plot import draw  # takes a second

    draw(judged, path)


def run_fit(options: argparse.Namespace) -> dict[str, Any]:
    """Fit each GPU's profiles together; return a snapshot for each."""
    if options.block_size < 1:
        raise ValueError("--block-size must be above 0.")
    if (options.profile is None) == (options.datasheet is None):
        raise ValueError("Give either --profile or --datasheet.")
    if options.datasheet is not None:
        return cold_fit(options)
    if is_calibration(options.profile):
        learned = learned_snapshot(options.profile)
        print(f"{learned.model} on {learned.hardware}: version {learned.version}", file=sys.stderr)
        return {"snapshots": {learned.model: json.loads(learned.to_json())}}
    by_gpu: dict[str, list[MeasuredModel]] = defaultdict(list)
    for model in load(options.profile, options.model_config):
        by_gpu[model.profile.hardware].append(model)
    snapshots = {}
    for gpu, models in by_gpu.items():
        if not any(model.attention for model in models):
            print(f"{gpu}: attention was not measured, so there are no step times to fit.", file=sys.stderr)
            continue
        times = StepTime(known_hardware(gpu))
        times.fit(models)
        for model in models:
            print(f"{model.name}: fitting ...", file=sys.stderr)
            snapshot = snapshot_of(model, times, block_size=options.block_size)
            snapshots[model.name] = json.loads(snapshot.to_json())
    if not snapshots:
        raise ValueError(f"{options.profile} has no profile with attention: profile it, or give another folder.")
    return {"snapshots": snapshots}


def cold_fit(options: argparse.Namespace) -> dict[str, Any]:
    """Costs of a model on a GPU that nothing was measured on."""
    if options.model_config is None:
        raise ValueError("--datasheet needs --model-config, the model's config.json.")
    hardware = known_hardware(options.datasheet) if "=" not in options.datasheet else None
    if hardware is None:
        hardware = Hardware.of_datasheet(Datasheet.parse(options.datasheet))
    config = read_config(options.model_config)
    shape = ModelShape.from_config(config, source=str(options.model_config))
    model = str(config.get("_name_or_path") or options.model_config.parent.name)
    snapshot = analytic_snapshot(
        shape, hardware, model=model, parallelism=1, block_size=options.block_size,
        block_bytes=options.block_size * kv_token_bytes(shape),
    )  # fmt: skip
    print(f"{model} on {hardware.name}: nothing was measured; steps are right within a factor of {UNCERTAINTY}.")
    return {"snapshots": {model: json.loads(snapshot.to_json())}, "uncertainty_factor": UNCERTAINTY}


def load(folder: Path, model_config: Path | None) -> list[MeasuredModel]:
    """Read the profiles of a folder with their models' shapes."""
    return [MeasuredModel.of(profile) for profile in load_profiles(folder, model_config=model_config)]


def table(figures: dict[str, dict[str, Any]]) -> str:
    """Render figures for a terminal."""
    lines = [f"{'what':<24}{'rows':>8}{'mean':>9}{'median':>9}{'p90':>9}{'bias':>9}{'in 90 %':>9}{'asked':>9}"]
    for name, one in figures.items():
        asked = f"{one['asked']:>9.0%}{'' if one['reached'] else '  missed'}" if "asked" in one else ""
        lines.append(
            f"{name:<24}{one['rows']:>8}{one['mean_error']:>9.2%}{one['median_error']:>9.2%}{one['p90_error']:>9.2%}"
            f"{one['bias']:>+9.2%}{one['interval_coverage']:>9.1%}{asked}"
        )
    return "\n".join(lines)


def preemptions_table(figures: dict[str, dict[str, Any]]) -> str:
    """Render how well preemptions were predicted for a terminal."""
    lines = [f"{'what':<32}{'preemptions':>12}{'median error':>14}{'asked':>9}"]
    for name, one in figures.items():
        asked = f"{one['asked']:>9.0%}{'' if one['reached'] else '  missed'}" if "asked" in one else ""
        lines.append(f"{name:<32}{one['preemptions']:>12}{one['median_error']:>14.1%}{asked}")
    return "\n".join(lines)


def lengths_table(reports: dict[str, dict[str, Any]]) -> str:
    """Render what is known of output lengths for a terminal."""
    names = ("requests", "loss", "own quantiles", "ratio", "held out", "oracle gain", "share")
    lines = [f"{'trace':<52}" + "".join(name.rjust(width) for name, width in zip(names, LENGTHS_WIDTHS, strict=True))]
    for source, one in reports.items():
        share = one["share_of_honest_gain"]
        cells = (
            str(one["requests"]), f"{one['loss']:.2f}", f"{one['baseline_loss']:.2f}", f"{one['loss_ratio']:.3f}",
            f"{one['held_out_loss_ratio']:.3f}", f"{one['oracle_gain']:.1%}", "-" if share is None else f"{share:.0%}",
        )  # fmt: skip
        row = "".join(cell.rjust(width) for cell, width in zip(cells, LENGTHS_WIDTHS, strict=True))
        lines.append(f"{source[-50:]:<52}{row}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
