"""`python -m cluster validate`: the simulator against what real engines were recorded to do.

Three kinds of records:
- `--runs DIR`: runs of vLLM on a GPU (LLMServingSim's layout: `meta.json` and `requests.jsonl` in a folder of the engine,
  one request a line with monotonic stamps). Steps come from profiles of that GPU's operators (`--profile`).
- `--bench FILE`: a result of `python -m cluster bench` on this kind of machine. Steps, copies and prices come from a folder
  of `python -m cluster calibrate` (`--profile`).
- `--arena DIR`: runs of the VTC artifact under policies of fairness (`cluster.validate_arena`); steps come from one of them.
Every recorded request is simulated with its arrival and lengths, in an engine of the recorded settings.
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.bench_arm import FIRST_COME
from cluster.bench_command import said
from cluster.bench_figures import Calibration, figures
from cluster.records import RequestRecord
from cluster.routing import RoundRobin
from cluster.simulated_replica import ReplicaBuilder, ReplicaKind
from cluster.simulated_step import SimulatedSettings
from cluster.simulation import Simulation
from cost_service.analytic import analytic_snapshot
from cost_service.calibration import fitted_step, learned_snapshot
from cost_service.hardware import UNKNOWN, known_hardware
from cost_service.kv_memory import ELEMENT_BYTES, kv_layout
from cost_service.model_shape import ModelShape, read_config
from cost_service.output_length import OutputLength
from cost_service.profiled_step import ProfiledStep
from cost_service.profiles import load_profiles
from cost_service.result_file import write_json
from cost_service.step_time import MeasuredModel, StepTime
from cost_service.traces import TraceRequest

ASKED_RUN = {"tpot_s_mean": 0.03, "e2e_s_mean": 0.05, "ttft_s_mean": 0.15}
ASKED_BENCH = {"throughput_tokens_per_s": 0.10, "weighted_turnaround_mean": 0.10, "preemptions": 0.20}
BLOCK_SIZE = 16
AMPLE_BLOCKS = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--runs", type=Path, metavar="DIR", help="recorded runs of vLLM, or a folder of several")
    parser.add_argument("--bench", type=Path, metavar="FILE", help="result of bench")
    parser.add_argument("--arena", type=Path, metavar="DIR", help="runs of the VTC artifact")
    parser.add_argument(
        "--profile",
        type=Path,
        metavar="DIR",
        help="profiles of the GPU's operators, or a calibration; not with --arena",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results to FILE")


def main(options: argparse.Namespace) -> int:
    """Compare; 0, 2 for a wrong option or record, 130 when interrupted."""

    def compare() -> int:
        report = _report(options)
        print(table(report))
        if options.json:
            write_json(report, options.json)
        return 0

    return said(compare)


def _report(options: argparse.Namespace) -> dict[str, Any]:
    if sum(one is not None for one in (options.runs, options.bench, options.arena)) != 1:
        raise ValueError("Give either --runs or --bench or --arena.")
    if (options.profile is None) != (options.arena is not None):
        raise ValueError("Give --profile with --runs or --bench, and not with --arena.")
    if options.arena is not None:
        from cluster.validate_arena import of_arena

        return of_arena(options.arena)
    return of_runs(options.runs, options.profile) if options.runs else of_bench(options.bench, options.profile)


def of_runs(folder: Path, profiles: Path) -> dict[str, Any]:
    """Simulate each recorded run, and compare mean times.

    Raises:
        ValueError: No run, a damaged one, or no profile of its model.
    """
    paths = sorted(path.parent for path in folder.rglob("requests.jsonl"))
    if not paths:
        raise ValueError(f"{folder} has no requests.jsonl in it: name a folder of recorded runs.")
    measured = [MeasuredModel.of(profile) for profile in load_profiles(profiles)]
    times: dict[str, StepTime] = {}
    results = {}
    for path in paths:
        run = RecordedRun.read(path)
        model = run.measured(measured)
        gpu = model.profile.hardware
        if gpu not in times:
            times[gpu] = StepTime(known_hardware(gpu))
            times[gpu].fit([one for one in measured if one.profile.hardware == gpu])
        step = ProfiledStep(model.shape, times[gpu], parallelism=model.profile.parallelism)
        results[path.relative_to(folder).parts[0] if path != folder else path.name] = _compared(
            mean_times(simulated(run.kind(model, step), run.requests)), mean_times(run.records), ASKED_RUN
        )
    return {
        "benchmark": "validation",
        "what": "mean seconds of a request; the runs do not reach KV pressure",
        "runs": results,
    }


@dataclass(frozen=True, slots=True)
class RecordedRun:
    """What vLLM was recorded to do."""

    model: str
    engine: dict[str, Any]
    records: list[RequestRecord]

    @classmethod
    def read(cls, folder: Path) -> "RecordedRun":
        """Read a folder with `meta.json` and `requests.jsonl`.

        Raises:
            ValueError: A file or field is missing or damaged.
        """
        try:
            meta = json.loads((folder / "meta.json").read_text())
            lines = [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]
            first_s = min(line["queued_ts"] for line in lines)
            records = [
                RequestRecord(
                    request_id=str(line["request_id"]), tenant="", arrival_s=line["queued_ts"] - first_s,
                    first_token_s=line["first_token_ts"] - first_s, finish_s=line["last_token_ts"] - first_s,
                    prompt_tokens=line["input_toks"], output_tokens=line["output_toks"],
                    delivered_tokens=line["output_toks"],
                )
                for line in lines
            ]  # fmt: skip
            return cls(str(meta["model"]), dict(meta["engine_kwargs"]), records)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{folder} is no recorded run ({error!r}): it needs meta.json and requests.jsonl."
            ) from None

    @property
    def requests(self) -> list[TraceRequest]:
        """The requests, in the order of arrival."""
        return requests_of(self.records)

    def measured(self, models: Sequence[MeasuredModel]) -> MeasuredModel:
        """The profile of its model on as many ranks.

        Raises:
            ValueError: There is none.
        """
        ranks, name = int(self.engine.get("tensor_parallel_size", 1)), self.model.rpartition("/")[2]
        for one in models:
            if name in one.name and one.profile.parallelism == ranks:
                return one
        raise ValueError(f"No profile is of {self.model} on {ranks} ranks: name another --profile.")

    def kind(self, model: MeasuredModel, step: ProfiledStep) -> ReplicaKind:
        """The recorded engine; its KV blocks were never short."""
        block_bytes = kv_layout(model.shape, block_size=BLOCK_SIZE, parallelism=model.profile.parallelism).block_bytes
        costs = analytic_snapshot(
            model.shape, known_hardware(model.profile.hardware) or UNKNOWN, model=self.model,
            parallelism=model.profile.parallelism, block_size=BLOCK_SIZE, block_bytes=block_bytes,
        )  # fmt: skip
        settings = SimulatedSettings(
            num_blocks=AMPLE_BLOCKS, block_size=BLOCK_SIZE, max_num_seqs=int(self.engine["max_num_seqs"]),
            max_num_batched_tokens=int(self.engine["max_num_batched_tokens"]),
        )  # fmt: skip
        return ReplicaKind(settings=settings, times=step, costs=costs, block_bytes=block_bytes)


def of_bench(path: Path, calibration: Path) -> dict[str, Any]:
    """Simulate each run of a benchmark under its policy, and compare figures, medians over repeats.

    Raises:
        ValueError: The file is no such result, or the calibration is of another model.
    """
    from cluster.report import read_result, records_of

    result = read_result(path)
    if result.get("benchmark") == "simulation":
        raise ValueError(f"{path} must be a result of bench, and is one of simulate.")
    alone = Calibration(
        **{key: result["calibration"][key] for key in ("ttft_s", "ttft_s_per_prompt_token", "s_per_output_token")}
    )
    kind = _bench_kind(result["settings"], calibration)
    arms = {}
    both = itertools.product(result["settings"].get("admissions", [FIRST_COME]), result["settings"]["policies"])
    for (name_of_arm, arm), (admission, policy) in zip(result["arms"].items(), both, strict=True):
        ours: dict[str, list[float]] = {name: [] for name in ASKED_BENCH}
        lengths = None if result["settings"].get("known_lengths", True) else OutputLength()
        arm_kind = replace(kind, policy=policy, admission=admission)
        simulated(arm_kind, requests_of(records_of(arm["repeats"][0])), lengths)  # the warm-up taught lengths, too
        for run in arm["repeats"]:
            records = simulated(arm_kind, requests_of(records_of(run)), lengths)
            end_s = max(one.finish_s or 0.0 for one in records)
            one = figures(records, alone, run_end_s=end_s)
            for name, values in ours.items():
                values.append(getattr(one, name))
        measured = {name: statistics.median(run[name] for run in arm["repeats"]) for name in ASKED_BENCH}
        arms[name_of_arm] = _compared({name: statistics.median(of) for name, of in ours.items()}, measured, ASKED_BENCH)
    return {"benchmark": "validation", "what": "medians over repeats", "runs": arms}


def _bench_kind(settings: dict[str, Any], calibration: Path) -> ReplicaKind:
    shape = ModelShape.from_config(read_config(calibration / "config.json"), source=str(calibration / "config.json"))
    costs = learned_snapshot(calibration)
    element_bytes = ELEMENT_BYTES.get(settings["dtype"], 2)
    layout = kv_layout(shape, block_size=settings["block_size"], element_bytes=element_bytes)
    if costs.block_size != settings["block_size"]:
        raise ValueError(
            f"{calibration} has blocks of {costs.block_size} tokens and the benchmark {settings['block_size']}."
        )
    return ReplicaKind(
        settings=SimulatedSettings(
            num_blocks=settings["num_kv_blocks"], block_size=settings["block_size"], max_num_seqs=settings["max_num_seqs"],
            max_num_batched_tokens=max(settings["max_model_len"], 4096), max_model_len=settings["max_model_len"],
            enable_chunked_prefill=settings["accelerator"] != "cpu",
        ),
        times=fitted_step(calibration), costs=costs, block_bytes=layout.block_bytes,
        host_bytes=settings["host_pool_bytes"], weights=settings.get("weights", {}),
    )  # fmt: skip


def simulated(
    kind: ReplicaKind, requests: Sequence[TraceRequest], lengths: OutputLength | None = None
) -> list[RequestRecord]:
    """What one simulated replica makes of the requests; `lengths` as for `Simulation`."""
    records: list[RequestRecord] = []
    simulation = Simulation(
        ReplicaBuilder(kind), num_replicas=1, router=RoundRobin(), done=records.append, lengths=lengths
    )
    simulation.run(requests)
    return records


def requests_of(records: Sequence[RequestRecord]) -> list[TraceRequest]:
    """The requests that became these records, in the order of arrival."""
    return [
        TraceRequest(
            arrival_s=one.arrival_s, tenant=one.tenant, prompt_tokens=one.prompt_tokens, output_tokens=one.output_tokens
        )
        for one in sorted(records, key=lambda one: one.arrival_s)
    ]  # fmt: skip


def mean_times(records: Sequence[RequestRecord]) -> dict[str, float]:
    """Mean seconds per output token after the first, from arrival to the end, and to the first token."""
    done = [one for one in records if one.finish_s is not None and one.first_token_s is not None]

    def mean(of: Callable[[RequestRecord, float, float], float], least: int = 1) -> float:
        return statistics.fmean(
            of(one, one.first_token_s or 0.0, one.finish_s or 0.0) for one in done if one.output_tokens >= least
        )

    return {
        "tpot_s_mean": mean(lambda one, first_s, finish_s: (finish_s - first_s) / (one.output_tokens - 1), least=2),
        "e2e_s_mean": mean(lambda one, _, finish_s: finish_s - one.arrival_s),
        "ttft_s_mean": mean(lambda one, first_s, _: first_s - one.arrival_s),
    }


def _compared(ours: dict[str, float], measured: dict[str, float], asked: dict[str, float]) -> dict[str, Any]:
    return {
        name: {
            "simulated": ours[name], "measured": measured[name], "asked": most,
            "error": ours[name] / measured[name] - 1.0 if measured[name] else None,
            "reached": abs(ours[name] - measured[name]) <= most * measured[name],
        }
        for name, most in asked.items()
    }  # fmt: skip


def table(report: dict[str, Any]) -> str:
    """Render a report for a terminal."""
    lines = [
        f"SIMULATED against recorded, {report['what']}",
        f"{'':<54}{'simulated':>11}{'measured':>11}{'error':>9}{'asked':>8}",
    ]
    for name, figures_of in report["runs"].items():
        for figure, one in figures_of.items():
            error = "-" if one["error"] is None else f"{one['error']:+.1%}"
            missed = "" if one["reached"] else "  missed"
            numbers = f"{one['simulated']:>11.4g}{one['measured']:>11.4g}{error:>9}{one['asked']:>8.0%}"
            lines.append(f"{f'{name}, {figure}':<54}{numbers}{missed}")
    for pair in report.get("order", {}).get("pairs", ()):
        missed = "" if pair["same"] else "  missed: another order"
        lines.append(f"{pair['pair']:<54}{pair['simulated']:>+11.1%}{pair['measured']:>+11.1%}{missed}")
    return "\n".join(lines)
